"""Which `transformers` architectures train right as two stages on two ranks: autoplace beside torch's own `pipeline()`.

One training step (no dropout) of every architecture of the acceptance list, on two processes over gloo. Plain PyTorch's
loss and every gradient are what counts; tolerances are those of `measure.check`. autoplace cuts the exported graph at
half of the cost (`acceptance_cases.halves`). `torch.distributed.pipelining.pipeline()` is given the model as it is, in
a module that takes tensors by position and returns the loss (→ `_losing`), and in one without labels that returns the
scores, with a loss outside (→ `_scoring`), each time with a cut at each of a few submodules around the middle
(→ `split_points`); it counts as right if any of these runs and gives the right gradients.

Contenders run in processes of their own; a pair that is silent for too long is ended, and its architecture counts as
hanging. Rows are kept in `build/pipeline_coverage.jsonl` as they come, so that a run that was stopped goes on.

    python scripts/bench_pipeline_coverage.py [--only bert gpt2] [--fresh] [--summary]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import select
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from acceptance_models import ARCHITECTURES, names
from results import save

ROWS = Path(__file__).resolve().parent.parent / "build" / "pipeline_coverage.jsonl"
CONTENDERS = ("autoplace", "torch")
_MARK = "row: "
_MOST_POINTS = 3
"""Places where torch's `pipeline()` is asked to cut, at most."""
_NO_GRAPH = "cannot capture your model as a full graph"
"""What torch's `pipeline()` says of a model that it cannot export."""
_WAIT_S = 8.0
"""How long a rank of torch's waits for the other; a step takes a fraction of a second."""


# -- on the ranks ------------------------------------------------------------------------------------------------------


def worker(contender: str, wanted: Sequence[str], microbatches: int) -> None:
    """Run architectures one after the other on this rank; rank 0 prints a row each."""
    import torch
    import torch.distributed as dist
    import transformers

    from autoplace.runtime.distributed import Session

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    session = Session.join()
    for name in wanted:
        start = time.perf_counter()
        try:
            run = _autoplace if contender == "autoplace" else _torch
            verdict = run(name, session, microbatches)
        except Exception as error:
            verdict = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        told = next((text for text in session.gather(verdict) if text), "")
        if session.rank == 0:
            row = {"name": name, "contender": contender, "ok": not told, "reason": told,
                   "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip
            print(_MARK + json.dumps(row), flush=True)
    dist.destroy_process_group()


def _case(name: str) -> Any:
    import torch
    from acceptance_cases import _Case

    torch.manual_seed(0)
    return _Case(name, training=True)


def _autoplace(name: str, session: Any, microbatches: int) -> str:
    """Return what is wrong with autoplace's step, or nothing."""
    from acceptance_cases import halves

    from autoplace.graph.capture import capture
    from autoplace.graph.coarsen import coarsen
    from autoplace.measure.preserve import no_dropout
    from autoplace.plan import Plan, Replica
    from autoplace.runtime.distributed.runner import DistributedModel

    case = _case(name)
    with no_dropout(case.model):
        case.expected = case.pass_(case.model)
        captured = capture(case.workload)
        groups = coarsen(captured.graph, max_groups=32, called=captured.called).graph
        devices = {f"host0/cpu:{i}": member for i, member in enumerate(session.members)}
        assignment = {group: devices[device] for group, device in halves(groups).items()}
        if len(set(assignment.values())) < 2:
            return "the model's groups do not divide into two halves"
        plan = Plan(replicas=(Replica(assignment=assignment),), strategy="halves", microbatches=microbatches)
        runner = DistributedModel(case.model, plan, session)
        try:
            loss = float(runner.train_step(case.inputs))
            grads = {
                n: p.grad
                for n, p in case.model.named_parameters()
                if p.grad is not None and session.rank in runner.holders(n)
            }
            return _differs(case.expected, loss, grads, session)
        finally:
            runner.close()


def _torch(name: str, session: Any, microbatches: int) -> str:
    """Return what is wrong with the best of torch's own splits, or nothing."""
    from autoplace.measure.preserve import no_dropout

    case = _case(name)
    reasons = []
    if hasattr(getattr(case.model, "config", None), "use_cache"):
        case.model.config.use_cache = False  # its exporter does not know the cache's type
    with no_dropout(case.model):
        case.expected = case.pass_(case.model)
        without: set[Any] = set()
        for form, point in product((_scoring, _as_it_is, _losing), split_points(case.model)):
            if form in without:
                continue
            case.model.zero_grad(set_to_none=True)
            try:
                reason = _torch_at(case, form(case), point, session, microbatches)
            except Exception as error:
                reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
            told = [text for text in session.gather(reason) if text]
            if not told:
                return ""
            reason = next((text for text in told if "Timed out" not in text), told[0])  # else it waited for the other
            reasons.append(f"at {point}: {reason}")
            if _NO_GRAPH in reason:  # wherever it is to be cut
                without.add(form)
    return "; ".join(reasons[:1]) or "no submodule to cut at"


class _Form(NamedTuple):
    """How a model is handed to torch's `pipeline()`."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    prefix: str
    """Of the model's names in the module."""
    loss: Callable[[Any], Any]
    """Of the module's output."""
    expected: dict[str, Any]
    """Plain PyTorch's loss and gradients."""


def _as_it_is(case: Any) -> _Form:
    from autoplace.workload import default_loss

    return _Form(case.model, (), dict(case.inputs), "", default_loss, case.expected)


def _losing(case: Any) -> _Form:
    """Return the model in a module that takes tensors by position and returns the loss, one number a microbatch."""
    import torch

    from autoplace.workload import default_loss

    names = tuple(case.inputs)

    class Losing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.model

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return default_loss(self.model(**dict(zip(names, inputs, strict=True)))).reshape(1)

    return _Form(Losing(), tuple(case.inputs.values()), {}, "model.", torch.mean, case.expected)


def _scoring(case: Any) -> _Form:
    """Return the model in a module that takes all but the labels by position and returns the first of its outputs.

    The loss is that output's mean square, for plain PyTorch as well: what torch's pipeline takes best.
    """
    import torch
    from torch.utils import _pytree as pytree

    labels = ARCHITECTURES[case.workload.name].labels
    inputs = {name: value for name, value in case.inputs.items() if name not in labels}
    makers = ("_shift_right", "prepare_decoder_input_ids_from_labels")
    shift: Any = next((found for name in makers if (found := getattr(case.model, name, None)) is not None), None)
    if shift is not None and "labels" in labels and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = shift(case.inputs["labels"])
    names = tuple(inputs)

    class Scoring(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.model

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            output = pytree.tree_leaves(self.model(**dict(zip(names, tensors, strict=True))))
            return next(t for t in output if isinstance(t, torch.Tensor) and t.is_floating_point() and t.requires_grad)

    def loss(scores: torch.Tensor) -> torch.Tensor:
        return scores.float().square().mean()

    module = Scoring()
    torch.manual_seed(0)
    case.model.zero_grad(set_to_none=True)
    value = loss(module(*inputs.values()))
    value.backward()
    grads = {name: p.grad for name, p in case.model.named_parameters()}
    case.model.zero_grad(set_to_none=True)
    return _Form(module, tuple(inputs.values()), {}, "model.", loss, {"loss": value.detach(), "grads": grads})


def split_points(model: Any) -> list[str]:
    """Return submodules to cut before: the middle layers of the longest lists of layers, then the children's middle."""
    import torch

    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1]
    lists.sort(key=lambda found: -sum(p.numel() for p in found[1].parameters()))
    points = [f"{path}.{len(layers) // 2}" for path, layers in lists]
    inner: Any = model
    path = ""
    while len(children := [(n, c) for n, c in inner.named_children() if any(True for _ in c.parameters())]) == 1:
        path, inner = f"{path}{children[0][0]}.", children[0][1]
    points += [path + children[len(children) // 2][0]] if len(children) > 1 else []
    return list(dict.fromkeys(points))[:_MOST_POINTS]


def _torch_at(case: Any, form: _Form, point: str, session: Any, microbatches: int) -> str:
    import torch
    from torch.distributed.pipelining import ScheduleGPipe, SplitPoint, pipeline

    def part(value: Any) -> Any:
        return value[: len(value) // microbatches]

    pipe = pipeline(
        form.module,
        mb_args=tuple(map(part, form.args)),
        mb_kwargs={key: part(value) for key, value in form.kwargs.items()},
        split_spec={form.prefix + point: SplitPoint.BEGINNING},
    )
    if pipe.num_stages != 2:
        raise ValueError(f"it made {pipe.num_stages} stages")
    # Where one rank fails the other waits for it; in a group of its own it does so for seconds, and the next try runs.
    own = torch.distributed.new_group(timeout=datetime.timedelta(seconds=_WAIT_S))
    stage = pipe.build_stage(session.rank, torch.device("cpu"), own)
    schedule = ScheduleGPipe(stage, microbatches, loss_fn=lambda output, _target: form.loss(output))
    losses: list[torch.Tensor] = []
    # A stage takes the inputs that it uses itself by keyword; the first one refuses others.
    takes = {node.name for node in stage.submod.graph.nodes if node.op == "placeholder"}
    feed = {key: value for key, value in form.kwargs.items() if key in takes}
    targets = torch.zeros(microbatches) if session.rank else None
    schedule.step(*(form.args if session.rank == 0 else ()), **feed, target=targets, losses=losses)
    loss = torch.stack(losses).mean().item() if losses else 0.0
    loss = max(session.gather(loss), key=abs)
    grads = {n.removeprefix(form.prefix): p.grad for n, p in stage.submod.named_parameters() if p.grad is not None}
    return _differs(form.expected, loss, grads, session)


def _differs(plain: dict[str, Any], loss: float, grads: dict[str, Any], session: Any) -> str:
    """Return the first difference from plain PyTorch's loss and gradients on rank 0, nothing on the others."""
    import torch
    from acceptance_cases import compare

    found: dict[str, Any] = dict.fromkeys(plain["grads"])
    for theirs in session.gather({n: g.detach().clone() for n, g in grads.items()}):
        for name, grad in theirs.items():
            if (
                name in found
                and found[name] is not None
                and not torch.allclose(found[name], grad, rtol=1e-3, atol=1e-6)
            ):
                return f"the ranks have different gradients of {name!r}"
            if name in found:
                found[name] = grad
    expected = {"loss": plain["loss"].detach(), "grads": plain["grads"]}
    why, _, _ = compare(expected, {"loss": torch.tensor(loss, dtype=expected["loss"].dtype), "grads": found})
    return why


# -- the parent --------------------------------------------------------------------------------------------------------


def run_pair(contender: str, wanted: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run architectures on a pair of processes until all are done, one is silent too long, or one of torch's failed.

    What failed while the other rank waited leaves a thread of gloo's behind that takes a core.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
               "AUTOPLACE_TIMEOUT_S": str(options.limit_s)}  # fmt: skip
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", contender, "--only", *wanted,
                   "--microbatches", str(options.microbatches)]  # fmt: skip
        stdout = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        pair.append(subprocess.Popen(command, env={**os.environ, **own}, stdout=stdout, stderr=subprocess.DEVNULL))
    try:
        yield from _rows_of(pair[0], contender, wanted, options.limit_s)
    finally:
        for process in pair:
            process.kill()
            process.wait()


def _rows_of(
    process: subprocess.Popen[bytes], contender: str, wanted: Sequence[str], limit_s: float
) -> Iterator[dict[str, Any]]:
    """Read the rows that rank 0 prints; the last is one of our own where it ended or hung before all were there."""
    assert process.stdout is not None
    buffer, left = b"", list(wanted)
    while left:
        ready, _, _ = select.select([process.stdout], [], [], limit_s)
        chunk = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
        if not chunk:
            why = "it hung" if not ready else "its process died"
            yield {"name": left[0], "contender": contender, "ok": False, "reason": why}
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            if line.startswith(_MARK.encode()):
                row = json.loads(line[len(_MARK) :])
                left.remove(row["name"])
                yield row
                if contender == "torch" and not row["ok"]:
                    return


def _line(row: dict[str, Any]) -> str:
    return f"{row['contender']:<10}{row['name']:<26}{'ok' if row['ok'] else row['reason']}"


def report(rows: dict[tuple[str, str], dict[str, Any]], wanted: Sequence[str], options: argparse.Namespace) -> int:
    """Print the table and the counts, and keep them."""
    print(f"{'architecture':<26}{'family':<18}{'autoplace':<12}torch pipeline()")
    for name in wanted:
        cells = [rows.get((c, name)) for c in CONTENDERS]
        words = ["-" if c is None else "ok" if c["ok"] else c["reason"] for c in cells]
        print(f"{name:<26}{ARCHITECTURES[name].family:<18}{words[0][:60]:<12} {words[1][:90]}")
    ran = {c: count for c in CONTENDERS if (count := sum((c, n) in rows for n in wanted))}
    counts = {c: sum(rows[c, n]["ok"] for n in wanted if (c, n) in rows) for c in ran}
    print("; ".join(f"{c}: {counts[c]} of {ran[c]} right" for c in ran))
    if not options.only:
        kept = [rows[c, n] for n in wanted for c in CONTENDERS if (c, n) in rows]
        data = {"right": counts, "of": ran, "microbatches": options.microbatches, "rows": kept}
        print(save("pipeline_coverage", seed=0, data=data))
    return 0


def main() -> int:
    """Run what is missing and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="architectures to run; all without it")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=150.0, help="seconds that one architecture may be silent")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    parser.add_argument("--summary", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.only, options.microbatches)
        return 0
    if options.fresh:
        ROWS.unlink(missing_ok=True)
    wanted = names(options.only)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []:
        row = json.loads(line)
        rows[row["contender"], row["name"]] = row
    ROWS.parent.mkdir(exist_ok=True)
    for contender in [] if options.summary else options.contenders:
        while left := [n for n in wanted if (contender, n) not in rows]:
            for row in run_pair(contender, left, options):
                rows[row["contender"], row["name"]] = row
                print(_line(row), flush=True)
                with ROWS.open("a", encoding="utf-8") as kept:
                    kept.write(json.dumps(row) + "\n")
    return report(rows, wanted, options)


if __name__ == "__main__":
    sys.exit(main())
