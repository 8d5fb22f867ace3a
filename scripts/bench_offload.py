"""A model larger than the GPU memory that it may use: plain PyTorch on the CPU, `accelerate`, and `OptimizedParallel`.

Each contender lives in a process of its own, all of them under the same cap
(`torch.cuda.set_per_process_memory_fraction`), and passes are timed in turns, one contender at a time:

    cpu          the model as it is, on the CPU with all threads
    accelerate   `infer_auto_device_map` with the cap as `max_memory`, then `dispatch_model`: layers that do not fit
                 stay in host memory, and are copied to the GPU at every pass
    autoplace    the wrapper around the model on the CPU, tuned under the cap by its defaults

The model is a decoder of the Llama type with random weights, run for inference on two kinds of batch: a few tokens,
where reading weights takes the time, and many, where arithmetic does. Outputs are compared with the CPU's.

    python scripts/bench_offload.py                # needs a CUDA device and the package accelerate
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp
from results import save

from autoplace.measure.protocol import aa_noise, pair_ratios

CONTENDERS = ("cpu", "accelerate", "autoplace")
SHAPES = {"few tokens": (1, 32), "many tokens": (8, 128)}
"""Name to (batch, length)."""
_HEADROOM = 0.85
"""What `accelerate` may fill of the cap: it keeps room for the largest layer itself, but not for activations."""


def build(layers: int) -> torch.nn.Module:
    """Return the model, with the same random weights at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=16,
            use_cache=False,
        )
    ).eval()


def inputs(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return token ids, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(0, 8000, shape, generator=generator), "use_cache": False}


def contender(
    name: str, shape: tuple[int, int], options: argparse.Namespace
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return what a contender calls, and facts about it."""
    model = build(options.layers)
    cap_bytes = int(options.cap * sum(p.nbytes for p in model.parameters()))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(cap_bytes / total, 0)
    if name == "cpu":
        return model, {}
    if name == "accelerate":
        import accelerate

        limits = {0: int(_HEADROOM * cap_bytes), "cpu": 1 << 40}
        blocks = list(model._no_split_modules or [])
        device_map = accelerate.infer_auto_device_map(model, max_memory=limits, no_split_module_classes=blocks)
        on_gpu = sum(1 for where in device_map.values() if where == 0)
        facts = {
            "version": accelerate.__version__,
            "modules_on_gpu": on_gpu,
            "modules_off": len(device_map) - on_gpu,
        }
        return accelerate.dispatch_model(model, device_map), facts
    from autoplace import OptimizedParallel

    wrapper = OptimizedParallel(model, track=False, cache=False, replan=False, budget_s=options.budget, progress=False)
    start = time.perf_counter()
    with torch.no_grad():
        result = wrapper.tune(inputs(shape))
    kept = result.chosen.plan
    rows = [
        {
            "plan": c.label,
            "measured_ms": c.measured.latency_ms if c.measured is not None and c.measured.feasible else None,
            "verdict": c.verdict,
        }
        for c in result.candidates
        if c.measured is not None
    ]
    facts = {
        "plan": result.chosen.label,
        "shape": kept.shape,
        "devices": sorted({d for r in kept.replicas for d in r.assignment.values()}),
        "tuning_s": round(time.perf_counter() - start, 1),
        "explain": wrapper.explain(),
        "measured": rows,
        "notes": list(result.notes),
    }
    return wrapper, facts


def serve(pipe: Connection, name: str, shape: tuple[int, int], options: argparse.Namespace) -> None:
    """Run passes when told to; the answers are facts, then milliseconds, then (on None) the output and the peak."""
    warnings.simplefilter("ignore")
    try:
        call, facts = contender(name, shape, options)
        given = inputs(shape)
        with torch.no_grad():
            call(**given)
        pipe.send(facts)
        while pipe.recv() is not None:
            start = time.perf_counter()
            with torch.no_grad():
                logits = call(**given).logits
                logits = logits.cpu()  # the caller's inputs are there, and this waits for the GPU
            pipe.send((time.perf_counter() - start) * 1e3)
        pipe.send((logits.numpy(), torch.cuda.max_memory_reserved()))
    except Exception:
        pipe.send(traceback.format_exc())


def run(shape: tuple[int, int], options: argparse.Namespace) -> dict[str, Any]:
    """Return one shape's row."""
    spawn = mp.get_context("spawn")
    pipes: dict[str, Connection] = {}
    row: dict[str, Any] = {"batch": shape[0], "length": shape[1], "facts": {}, "failures": {}}
    processes = []
    for name in CONTENDERS:  # one after the other, so that nothing runs beside a tuning
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(theirs, name, shape, options), daemon=True)
        process.start()
        processes.append(process)
        answer = ours.recv()
        row["failures" if isinstance(answer, str) else "facts"][name] = answer
        if not isinstance(answer, str):
            pipes[name] = ours
    turns = [*pipes, "cpu"]  # the CPU's twice a round, for the noise
    samples: dict[str, list[float]] = {name: [] for name in [*pipes, "again"]}
    for round_number in range(options.rounds + 1):
        for position, name in enumerate(turns):
            for timed in (False, True):
                pipes[name].send(True)
                ms = pipes[name].recv()
                if timed and round_number:
                    samples["again" if position == len(pipes) else name].append(ms)
    outputs = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        outputs[name], reserved = pipe.recv()
        row["facts"][name]["gpu_reserved_bytes"] = reserved
    for process in processes:
        process.join(10)
    plain = torch.from_numpy(outputs["cpu"])
    row["errors"] = {
        name: float((torch.from_numpy(value) - plain).abs().max() / plain.abs().max())
        for name, value in outputs.items()
        if name != "cpu"
    }
    row["noise"] = aa_noise(samples["cpu"], samples["again"])
    row["ms"] = {name: round(statistics.median(values), 3) for name, values in samples.items()}
    if "autoplace" in samples:
        row["autoplace_over"] = {}
        for name in samples:
            if name in pipes and name != "autoplace":
                ratio, quartiles = pair_ratios(samples[name], samples["autoplace"])
                row["autoplace_over"][name] = {"ratio": ratio, "quartiles": list(quartiles)}
    return row


def main() -> None:
    """Run both shapes, print a table, keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--cap", type=float, default=0.6, help="GPU memory that may be used, in parts of the weights")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=60.0, help="wall seconds of a tuning's real runs")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and PyTorch sees none")
    rows = {}
    for name in options.shapes:
        rows[name] = row = run(SHAPES[name], options)
        print(f"{name} {SHAPES[name]}: ms {row['ms']}, A/A noise {row['noise']:.1%}, errors {row['errors']}")
        for other, figures in row.get("autoplace_over", {}).items():
            low, high = figures["quartiles"]
            print(f"  autoplace over {other}: {figures['ratio']:.3f} ({low:.2f}-{high:.2f})")
        for failed, reason in row["failures"].items():
            print(f"  {failed} failed: {reason}")
        if "autoplace" in row["facts"]:
            print(row["facts"]["autoplace"]["explain"])
    save("offload", seed=0, data={"gpu": torch.cuda.get_device_name(0), "cap": options.cap, "rows": rows})


if __name__ == "__main__":
    main()
