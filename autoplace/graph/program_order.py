"""`in_program_order`: what the executors add to a model's graph: within a part of a batch, ops run one after another.

An executor calls the model's own code, which calls its modules in program order and waits for each; two branches of one
microbatch never run at once. A tensor of no bytes from each op to the next says so: free on one device, one hand-over
between two. Problems that come from files keep their graph as it is.
"""

from __future__ import annotations

from autoplace.graph.opgraph import OpGraph

__all__ = ["in_program_order"]


def in_program_order(graph: OpGraph) -> OpGraph:
    """Return the graph with a tensor of no bytes between neighbours that no tensor connects.

    Args:
        graph: Ops in execution order, which is topological.
    """
    connected = {(int(producer), int(consumer)) for producer, consumer, _ in graph.edge_list}
    edges = graph.tensors()
    edges += [(op, [op + 1], 0.0) for op in range(graph.num_ops - 1) if (op, op + 1) not in connected]
    return OpGraph.build(
        names=graph.names,
        edges=edges,
        kinds=graph.kinds,
        modules=graph.modules,
        flops=graph.flops.tolist(),
        bytes_moved=graph.bytes_moved.tolist(),
        weight_bytes=graph.weight_bytes.tolist(),
        activation_bytes=graph.activation_bytes.tolist(),
        frees=graph.frees.tolist(),
        colocate=graph.colocate.tolist(),
    )
