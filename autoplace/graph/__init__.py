"""From a model to an `OpGraph`: the graph itself, capture and coarsening."""

from autoplace.graph.opgraph import OpGraph

__all__ = ["OpGraph"]
