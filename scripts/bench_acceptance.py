"""Does the wrapper keep every model's results? Some seventy `transformers` architectures, in eval and in training.

Each one is wrapped with every executor forced in turn (one device; two replicas; stages by modules in two microbatches;
stages cut from the exported graph; replicas in processes, for a few architectures unless `--processes all`) and with
the planner's own choice, and compared with plain PyTorch: outputs, loss, every gradient, every buffer, the keys of
`state_dict`. The table also says which rung of the capture ladder was reached, and why not a higher one.

Every architecture runs in a process of its own with a time limit, so that one that hangs does not stop the others. Rows
are kept in `build/acceptance.jsonl` as they come; what is there is not run again unless it failed, or with `--fresh`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from acceptance_cases import EXECUTORS, FREE, TOLERANCES, run_case
from acceptance_models import ARCHITECTURES, names
from results import provenance, save

ROWS = Path(__file__).resolve().parent.parent / "build" / "acceptance.jsonl"
IN_PROCESSES = ("bert", "gpt2", "t5", "vit", "patchtsmixer")
"""Architectures whose replicas run in processes, too: starting them takes seconds."""
MODES = ("eval", "training")
WANTED_EXPORTS = 40
_MARK = "row: "
"""What a row of a worker's output starts with; other lines are the libraries' own."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="architectures to run; all without it")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--executors", nargs="+", choices=(*EXECUTORS, FREE), default=[*EXECUTORS, FREE])
    parser.add_argument("--processes", choices=("few", "all"), default="few")
    parser.add_argument("--budget-s", type=float, default=3.0, help="seconds for the planner's own choice")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds that one architecture may take")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=ROWS, help="where rows are kept as they come")
    parser.add_argument("--fresh", action="store_true", help="forget the rows that are there")
    parser.add_argument("--summary", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def executors_of(name: str, options: argparse.Namespace) -> list[str]:
    """Return the columns to fill for an architecture."""
    in_processes = options.processes == "all" or name in IN_PROCESSES
    return [e for e in options.executors if e != "processes" or in_processes]


def read_rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return (architecture, mode) to row; of each cell the last one counts, and lines cut short are left out."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            before = rows.get((row["name"], row["mode"]), {})
            rows[row["name"], row["mode"]] = {**row, "cells": {**before.get("cells", {}), **row["cells"]}}
        except (ValueError, KeyError):
            continue
    return rows


def missing(rows: dict[tuple[str, str], dict[str, Any]], options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Return the architectures and modes that have not run with all executors asked for, or failed."""
    left = []
    for name in names(options.only):
        wanted = set(executors_of(name, options))
        done = {m: rows.get((name, m), {}).get("cells", {}) for m in options.modes}
        modes = [m for m, cells in done.items() if not wanted <= cells.keys() or _failed(cells[e] for e in wanted)]
        left += [(name, modes)] if modes else []
    return left


def _failed(cells: Iterable[dict[str, Any]]) -> bool:
    return any(cell["status"] == "FAIL" for cell in cells)


def run_here(name: str, options: argparse.Namespace) -> None:
    """Run one architecture in this process and print its rows; what a worker does."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    executors = executors_of(name, options)
    forced = [e for e in executors if e != FREE]
    commit = provenance(seed=0)["commit"]
    for mode in options.modes:
        budget_s = options.budget_s if FREE in executors else None
        row = run_case(name, training=mode == "training", executors=forced, budget_s=budget_s)
        for cell in row["cells"].values():
            cell["commit"] = commit
        print(_MARK + json.dumps(row), flush=True)


def run_apart(name: str, modes: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one architecture in a process of its own, and end that process with all of its own at the time limit."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name, "--modes", *modes, "--budget-s",
               str(options.budget_s), "--processes", options.processes, "--executors", *options.executors]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        own = {"AUTOPLACE_CACHE_DIR": folder, "AUTOPLACE_DATA_DIR": folder, "OMP_NUM_THREADS": "1"}
        worker = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **own},
            start_new_session=True,
        )
        try:
            out, err = worker.communicate(timeout=options.limit_s * len(modes))
            story = f"its process ended with {worker.returncode}: {err.strip()[-200:]}"
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            out, err = worker.communicate()
            story = f"it took more than {options.limit_s:g} s"
    rows = [json.loads(line.removeprefix(_MARK)) for line in out.splitlines() if line.startswith(_MARK)]
    known = {row["mode"] for row in rows}
    family = ARCHITECTURES[name].family
    lost = [{"name": name, "family": family, "mode": m, "cells": {}, "error": story} for m in modes if m not in known]
    return rows + lost


def run_all(left: Iterable[tuple[str, list[str]]], options: argparse.Namespace) -> None:
    """Run what is missing and keep every row as it comes."""
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.workers) as pool, options.rows.open("a", encoding="utf-8") as kept:
        futures = [pool.submit(run_apart, name, modes, options) for name, modes in left]
        for number, future in enumerate(as_completed(futures), 1):
            for row in future.result():
                kept.write(json.dumps(row) + "\n")
                kept.flush()
                print(f"[{number}/{len(futures)}] {line_of(row)}", flush=True)


def line_of(row: dict[str, Any]) -> str:
    """Return one row of the table, with the reasons of failures below it."""
    cells = row["cells"]
    texts = [f"{_short(cells.get(e)):<8}" for e in (*EXECUTORS, FREE)]
    choice = cells.get(FREE, {}).get("plan", "")
    head = f"{row['name']:<24}{row['family']:<16}{row['mode']:<9}{row.get('rung', '?'):<9}{''.join(texts)} {choice}"
    notes = [f"error: {row['error']}"] if "error" in row else []
    notes += [f"{e}: {cell['reason']}" for e, cell in cells.items() if cell["status"] == "FAIL"]
    return "\n    ".join([head, *notes])


def _short(cell: dict[str, Any] | None) -> str:
    """Return a cell's word; `ok/1` are stages that ran on the whole batch alone."""
    if cell is None:
        return "-"
    return "ok/1" if "parts_refused" in cell and cell["status"] == "ok" else str(cell["status"])


def reasons(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return why the rung is not the first, and why plans were refused: reason to what it was said of."""
    found: dict[str, list[str]] = {}
    for row in rows:
        where = f"{row['name']} ({row['mode']})"
        if row.get("rung_reason"):
            found.setdefault(f"{row['rung']}: {row['rung_reason']}", []).append(where)
        for executor, cell in row["cells"].items():
            for reason in (cell["reason"] if cell["status"] == "refused" else "", cell.get("parts_refused")):
                if reason:
                    found.setdefault(f"refused: {reason}", []).append(f"{where} {executor}")
    return found


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the issue asks for: how many work, how many are captured whole, what every executor did."""
    good = [r for r in rows if "error" not in r and not _failed(r["cells"].values())]
    rungs = {
        mode: {rung: sum(r["mode"] == mode and r.get("rung") == rung for r in rows) for rung in _RUNGS}
        for mode in MODES
    }
    cells = [(e, r["cells"][e]) for e in (*EXECUTORS, FREE) for r in rows if e in r["cells"]]
    return {
        "architectures": len({r["name"] for r in rows}),
        "families": len({r["family"] for r in rows}),
        "rows": len(rows),
        "rows_that_work": len(good),
        "rungs": rungs,
        "executors": {
            executor: {s: sum(c["status"] == s for e, c in cells if e == executor) for s in ("ok", "refused", "FAIL")}
            for executor in (*EXECUTORS, FREE)
        },
        "largest_output_error": max((c.get("output_error", 0.0) for _, c in cells), default=0.0),
        "largest_gradient_strain": max((c.get("gradient_strain", 0.0) for _, c in cells), default=0.0),
    }


_RUNGS = ("export", "dispatch", "module")


def report(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """Print the table, the reasons and the counts; return the counts and whether all is as it must be."""
    head = "".join(f"{e:<8}" for e in ("single", "replicas", "stages", "graph", "procs", FREE))
    print(f"{'architecture':<24}{'family':<16}{'mode':<9}{'rung':<9}{head} choice")
    for row in rows:
        print(line_of(row))
    for reason, places in reasons(rows).items():
        shown = ", ".join(places[:6]) + (f" and {len(places) - 6} more" if len(places) > 6 else "")
        print(f"- {reason}\n    {shown}")
    found = counts(rows)
    print(
        f"{found['architectures']} architectures of {found['families']} families; {found['rows_that_work']} of "
        f"{found['rows']} rows work; rungs {found['rungs']}"
    )
    for executor, told in found["executors"].items():
        print(f"{executor:<12}{told}")
    print(
        f"tolerances: outputs, loss and buffers {TOLERANCES.rtol_float32:g} of their largest entry (at least "
        f"{TOLERANCES.floor:g}), gradients {TOLERANCES.rtol_float32:g} of their largest entry plus "
        f"{TOLERANCES.gradient_floor:g} of the largest of all; largest error of an output "
        f"{found['largest_output_error']:.2g}, of a gradient {found['largest_gradient_strain']:.2g} of what is allowed"
    )
    return found, found["rows_that_work"] == found["rows"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the table and keep it; 1 when something failed."""
    options = parse(argv)
    if options.one:
        run_here(options.one, options)
        return 0
    if options.fresh:
        options.rows.unlink(missing_ok=True)
    if not options.summary:
        run_all(missing(read_rows(options.rows), options), options)
    kept = read_rows(options.rows)
    rows = [kept[name, mode] for name in names(options.only) for mode in options.modes if (name, mode) in kept]
    found, fine = report(rows)
    whole = not options.only and len(options.modes) == len(MODES)
    if whole:
        fine = fine and found["rungs"]["eval"]["export"] >= WANTED_EXPORTS
        commits = sorted({c.get("commit", "not recorded") for row in rows for c in row["cells"].values()})
        data = {"counts": found, "commits": commits, "tolerances": vars(TOLERANCES), "rows": rows}
        print(save("acceptance", seed=0, data=data))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
