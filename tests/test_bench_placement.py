"""The placement benchmark: what it runs, how it keeps it, and what its tables say of it."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from autoplace.errors import InfeasibleError
from autoplace.graph.opgraph import OpGraph
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.policy.network import PolicyNetwork
from autoplace.policy.policy import Policy
from autoplace.problem import Objective, Problem
from autoplace.strategies.annealing import AnnealingStrategy

SCRIPTS = Path(__file__).parent.parent / "scripts"
if not SCRIPTS.exists():
    pytest.skip("needs the repository's scripts", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

import bench_ablation  # noqa: E402
import bench_placement  # noqa: E402
import placement_parts  # noqa: E402
import placement_runs  # noqa: E402
import placement_tables  # noqa: E402
import results as kept  # noqa: E402
from placement_runs import HEURISTICS, Answer, Method, Run  # noqa: E402
from placement_tables import Results  # noqa: E402


@dataclass(frozen=True)
class Example:
    problem: Problem
    tags: frozenset[str]


def chain(name, *, ops=8, goal="latency", memory=math.inf):
    """A chain on two devices, each fast at half of the ops."""
    random = np.random.default_rng(len(name))
    devices = tuple(Device(name=f"host0/cuda:{i}", kind="cuda", memory_bytes=memory) for i in range(2))
    return Problem(
        graph=OpGraph.build(
            names=[f"op{i}" for i in range(ops)],
            edges=[(i, [i + 1], 1e4) for i in range(ops - 1)],
            weight_bytes=[10] * ops,
        ),
        cluster=Cluster(devices=devices, default_link=Link(latency_ms=0.05, bytes_per_ms=1e6)),
        latency_ms=random.uniform(0.5, 3.0, (ops, 2)),
        objective=Objective(goal=goal),
        name=name,
    )


@pytest.fixture(scope="module")
def cases():
    return [
        Example(chain("wide", goal="throughput"), frozenset({"operator", "throughput"})),
        Example(chain("tight", memory=50.0), frozenset({"memory", "latency"})),
        Example(chain("little", ops=6), frozenset({"small", "latency"})),
    ]


def found(assignment):
    return Method(place=lambda problem, budget, seed: Answer(assignment=np.asarray(assignment), evaluations=3))


def row(case, method, value, *, budget="", seed=0, policy="", **more):
    """A row as `make_run` writes it."""
    key = {"problem": case.problem.name, "fingerprint": case.problem.fingerprint, "method": method, "budget": budget}
    rest = {"seed": seed, "policy": policy, "objective": value, "seconds": 1.0, "evaluations": 1, "commit": "c"}
    return {**key, **rest, **more}


def results(rows, cases, *, policy=""):
    names = {r["method"] for r in rows}
    return Results(rows, cases, {name: Method(place=None, policy=policy) for name in names})


# Runs


def test_a_plan_is_scored_afresh_and_a_bad_one_is_infeasible(cases):
    tight = cases[1].problem
    halves = placement_runs.make_run(Run(problem="tight", method="m"), found([0] * 4 + [1] * 4), tight)
    path = tight.latency_ms[:4, 0].sum() + tight.latency_ms[4:, 1].sum() + 0.05 + 1e4 / 1e6
    assert halves["objective"] == pytest.approx(path) and halves["evaluations"] == 3 and halves["seconds"] >= 0
    assert placement_runs.make_run(Run(problem="tight", method="m"), found([0] * 8), tight)["objective"] is None


def test_what_cannot_be_placed_is_a_result_and_what_breaks_is_not(cases, tmp_path):
    def refuse(problem, budget, seed):
        raise InfeasibleError("no room; add memory")

    def crash(problem, budget, seed):
        raise ZeroDivisionError("oops")

    methods = {"refuse": Method(place=refuse), "crash": Method(place=crash)}
    runs = [Run(problem="wide", method=name) for name in methods]
    placement_runs.make_runs(runs, methods, cases, tmp_path / "r.jsonl")
    refused, crashed = placement_runs.read_rows(tmp_path / "r.jsonl")
    assert refused["objective"] is None and "no room" in refused["reason"] and "error" not in refused
    assert crashed["error"] == "ZeroDivisionError: oops"
    assert placement_runs.missing(runs, methods, cases, tmp_path / "r.jsonl") == runs[1:]


def test_what_is_kept_is_not_run_again(cases, tmp_path):
    calls = []

    def place(problem, budget, seed):
        calls.append((problem.name, budget, seed))
        return Answer(assignment=np.zeros(problem.num_ops, np.int32))

    path, methods = tmp_path / "deep" / "r.jsonl", {"m": Method(place=place)}
    runs = [Run(problem="wide", method="m", budget="5e", seed=s) for s in range(3)]
    placement_runs.make_runs(runs[:2], methods, cases, path)
    placement_runs.make_runs(runs, methods, cases, path)
    assert calls == [("wide", "5e", 0), ("wide", "5e", 1), ("wide", "5e", 2)]
    another = {"m": Method(place=place, policy="abc")}
    assert placement_runs.missing(runs, another, cases, path) == runs, "another policy has to run for itself"


def test_a_torn_line_loses_no_other(tmp_path, cases):
    path = tmp_path / "r.jsonl"
    placement_runs.append_row(path, row(cases[0], "m", 1.0))
    with path.open("a") as stream:
        stream.write('{"problem": "wi')
    placement_runs.append_row(path, row(cases[0], "m", 2.0, seed=1))
    assert [r["objective"] for r in placement_runs.read_rows(path)] == [1.0, 2.0]


def test_a_run_starts_from_a_problem_on_which_nothing_was_computed(cases):
    problem = cases[0].problem
    assert problem.can_run.all() and len(problem.graph.topological_order) == 8
    copy = placement_runs.fresh(problem)
    assert "can_run" in vars(problem) and "can_run" not in vars(copy)
    assert "topological_order" in vars(problem.graph) and "topological_order" not in vars(copy.graph)
    assert copy.fingerprint == problem.fingerprint


def test_every_policy_has_its_digest():
    one, other = (Policy.of(PolicyNetwork(seed=s)) for s in (0, 1))
    assert placement_runs.policy_digest(one) == placement_runs.policy_digest(Policy.of(PolicyNetwork(seed=0)))
    assert placement_runs.policy_digest(one) != placement_runs.policy_digest(other)
    assert placement_runs.policy_digest(None) == ""


def test_budgets_are_read():
    assert placement_runs.parse_budget("200e").evaluations == 200
    assert placement_runs.parse_budget("0.5s").seconds == 0.5
    assert not placement_runs.parse_budget("").start().limited


def test_the_warm_up_meets_every_semantics_and_tag(cases):
    seen = []

    def place(problem, budget, seed):
        seen.append(problem)
        raise InfeasibleError("nothing fits; add memory")

    placement_parts.warm_up({"m": Method(place=place), "cold": Method(place=None, warm=False)}, cases)
    assert len({(p.objective.goal, p.semantics) for p in seen}) == 64
    assert {"wide", "tight", "little"} <= {p.name for p in seen}


# What is planned


def test_methods_take_turns_at_every_budget(cases):
    options = bench_placement.parse(["--seeds", "2", "--seconds", "1", "10", "--seeds-seconds", "2", "1"])
    groups = bench_placement.planned(cases[:1], options)
    assert [{r.seed % placement_tables.AGAIN for r in group} for group in groups] == [{0}, {1}]
    first = [(r.method, r.budget, r.seed) for r in groups[0]]
    assert [m for m, _, _ in first[:6]] == [*HEURISTICS, "greedy"]
    turns = first[6:]
    assert turns[:3] == [("annealing", "50e", 0), ("guided", "50e", 0), ("unguided", "50e", 0)]
    assert ("annealing", "200e", placement_tables.AGAIN) in turns
    assert turns[-3:] == [("annealing", "10s", 0), ("guided", "10s", 0), ("unguided", "10s", 0)]
    assert not any(r.budget == "10s" for r in groups[1]), "ten seconds have one seed"


def test_small_problems_are_for_the_optimum_alone(cases):
    groups = bench_placement.planned(cases[2:], bench_placement.parse(["--seeds", "1"]))
    searched = {(r.method, r.budget) for group in groups for r in group if r.budget}
    pairs = {(m, b) for m in ("annealing", "guided") for b in ("2000e", "10s")}
    assert searched == {*pairs, ("exact", "60s")}


def test_only_what_the_tables_want_is_run(cases):
    def methods(*tables):
        runs = bench_placement.planned(cases, bench_placement.parse(["--tables", *tables]))
        return {(r.problem, r.method, r.budget) for group in runs for r in group if r.budget}

    assert methods("zero-shot") == set()
    assert methods("dp") == {("wide", "guided", "60s")}
    assert {b for _, _, b in methods("evaluations")} == {"50e", "200e", "2000e"}
    assert {m for _, m, _ in methods("ablation")} == {"guided", "unguided"}
    assert methods("noise") == {(p, "annealing", "200e") for p in ("wide", "tight")}


def test_the_estimate_adds_the_seconds(cases):
    runs = [Run(problem="wide", method="m", budget=b) for b in ("10s", "60s", "1000e")]
    assert bench_placement.estimate_s(runs[:2], cases) == pytest.approx(70.0)
    assert bench_placement.estimate_s(runs, cases) > 70.0


# Tables


def test_a_ratio_below_one_means_that_the_first_is_better(cases):
    rows = [row(case, "guided", 1.0, budget="5e") for case in cases]
    rows += [row(case, "annealing", 2.0, budget="5e") for case in cases]
    made = results(rows, cases)
    whole, *kinds = made.compare(made.arm("guided", "5e"), made.arm("annealing", "5e"))
    assert whole["geometric_mean"] == pytest.approx(0.5) and whole["wins"] == 3 and whole["verdict"] == "better"
    assert {k["kind"]: k["problems"] for k in kinds} == {"operator": 1, "memory": 1, "throughput": 1, "latency": 2}
    assert made.log_ratios["wide"] == {"guided 5e / annealing 5e": pytest.approx(math.log(0.5))}


def test_rows_of_another_policy_or_problem_are_left_alone(cases):
    rows = [row(cases[0], "guided", 1.0, policy="new"), row(cases[0], "guided", 9.0, policy="old")]
    rows.append({**row(cases[1], "guided", 9.0, policy="new"), "fingerprint": "another"})
    made = results(rows, cases, policy="new")
    assert made.objectives("wide", "guided") == {0: 1.0} and made.objectives("tight", "guided") == {}


def test_the_noise_pairs_a_seed_with_its_second(cases):
    rows = [row(cases[0], "annealing", v, budget="5e", seed=s) for s, v in ((0, 1.0), (1, 2.0), (100, 2.0), (101, 1.0))]
    made = results(rows, cases)
    noise = placement_tables.noise(made, "annealing", "5e")
    assert noise["rows"][0]["geometric_mean"] == pytest.approx(1.0) and noise["pairs"] == 2
    assert noise["log_ratio_sd_of_one_pair"] == pytest.approx(math.log(2) * math.sqrt(2))
    assert made.objectives("wide", "annealing", "5e") == {0: 1.0, 1: 2.0}


def test_a_plan_worse_than_a_heuristic_is_named(cases):
    wide, tight, little = cases
    rows = [row(case, name, 2.0 if name == "dp" else 3.0) for case in cases for name in HEURISTICS]
    rows += [row(wide, "guided", 2.0 * (1 + 1e-12), budget="5e"), row(wide, "guided", 2.1, budget="5e", seed=1)]
    rows += [row(tight, "guided", None, budget="5e"), row(little, "guided", 1.5, budget="5e")]
    checks = placement_tables.never_worse(results(rows, cases), "guided")
    assert checks["checked"] == 4 and len(checks["worse"]) == len(checks["infeasible"]) == 1
    assert "wide 5e seed 1" in checks["worse"][0] and "tight" in checks["infeasible"][0]


def test_nothing_is_worse_than_heuristics_that_find_nothing(cases):
    rows = [row(cases[0], name, None) for name in HEURISTICS] + [row(cases[0], "guided", None, budget="5e")]
    assert placement_tables.never_worse(results(rows, cases), "guided") == {"checked": 0, "worse": [], "infeasible": []}


def test_only_proven_optima_count(cases):
    wide, tight, little = cases
    rows = [row(c, "exact", 1.0, budget="60s", proven=c is not tight) for c in cases]
    rows += [row(wide, "guided", 1.005, budget="5e"), row(little, "guided", 1.00005, budget="5e")]
    rows += [row(tight, "guided", 0.5, budget="5e")]
    made = results(rows, cases)
    figures = placement_tables.against_exact(made, [made.arm("guided", "5e")])
    assert (figures["tried"], figures["proven"], figures["below_the_optimum"]) == (3, 2, [])
    whole = figures["rows"][0]
    assert whole["within_1_percent"] == 1.0 and whole["within_0.01_percent"] == 0.5
    assert whole["worst"] == pytest.approx(1.005)


def test_a_plan_below_a_proven_optimum_is_an_error_of_the_solver(cases):
    rows = [row(cases[0], "exact", 1.0, budget="60s", proven=True), row(cases[0], "guided", 0.9, budget="5e")]
    made = results(rows, cases)
    assert placement_tables.against_exact(made, [made.arm("guided", "5e")])["below_the_optimum"] == ["wide: guided 5e"]


def test_what_was_spent_is_told_as_part_of_the_budget(cases):
    rows = [row(cases[0], "guided", 1.0, budget="2s", seed=s, seconds=v) for s, v in ((0, 1.0), (1, 3.0))]
    spent = results(rows, cases).spent("guided", "2s")
    assert (spent["runs"], spent["most_of_budget"], spent["median_of_budget"]) == (2, 1.5, 1.0)
    assert spent["over"] == 1


# The whole


SMALL_BUDGETS = "--evaluations 20 60 --seeds 2 --seconds 0.1 0.2 --seeds-seconds 2 1 --exact-seconds 5 --noise-at 20e"


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    few = placement_parts.tiny_problems()[:2]
    monkeypatch.setattr(placement_parts, "tiny_problems", lambda: few)
    return tmp_path


def test_the_benchmark_runs_resumes_and_keeps_its_tables(cases, saved, capsys):
    options = bench_placement.parse([*SMALL_BUDGETS.split(), "--runs", str(saved / "runs.jsonl"), "--name", "tried"])
    methods = bench_placement.make_methods(Policy.of(PolicyNetwork(seed=0)))
    groups = bench_placement.planned(cases, options)
    for part in ("0/2", "1/2", "0/2"):
        options.part = part
        placement_parts.make_part(groups, methods, cases, options)
    lines = (saved / "runs.jsonl").read_text().splitlines()
    assert len(lines) == sum(map(len, groups)), "the second part 0 had nothing left to run"
    assert bench_placement.summarise(options, cases, methods), capsys.readouterr().out
    shown = capsys.readouterr().out
    assert "worse than a heuristic: 0" in shown and "broken: 0" in shown
    data = json.loads((saved / "tried.json").read_text())
    assert data["policy"]["digest"] == methods["guided"].policy and data["provenance"]["commit"]
    check_figures(data)


def check_figures(data):
    """Every figure follows from the objectives that are kept beside it."""
    tables, problems = data["tables"], {p["name"]: p for p in data["problems"]}
    whole = next(r for r in tables["evaluations"] if r["ours"] == "guided 60e" and r["kind"] == "all")
    ratios = []
    for name in ("wide", "tight"):
        ours, others = (problems[name]["objectives"][f"{m} 60e"] for m in ("guided", "annealing"))
        ratios.append(np.mean([math.log(ours[s] / others[s]) for s in ("0", "1")]))
        assert problems[name]["log_ratios"]["guided 60e / annealing 60e"] == pytest.approx(ratios[-1])
    assert whole["geometric_mean"] == pytest.approx(math.exp(np.mean(ratios))) and whole["problems"] == 2
    assert tables["exact"]["proven"] == 1 and tables["exact"]["rows"][0]["within_1_percent"] == 1.0
    assert tables["never_worse"]["checked"] == 2 * (2 * 2 + 2 + 1) + 3
    assert all(r["most_of_budget"] <= 1.0 for r in tables["spent"] if r["budget"].endswith("e"))


def test_a_search_that_falls_behind_makes_the_benchmark_fail(cases, saved, capsys):
    options = bench_placement.parse(["--tables", "evaluations", "--runs", str(saved / "runs.jsonl"), "--name", "tried"])
    methods = bench_placement.make_methods(Policy.of(PolicyNetwork(seed=0)))
    for name in HEURISTICS:
        placement_runs.append_row(options.runs, row(cases[0], name, 1.0))
    guided = row(cases[0], "guided", 1.5, budget="50e", policy=methods["guided"].policy)
    placement_runs.append_row(options.runs, guided)
    assert not bench_placement.summarise(options, cases, methods)
    assert "worse than a heuristic: 1" in capsys.readouterr().out


def test_the_ablation_compares_policies_with_the_first(cases, saved, capsys):
    options = bench_ablation.parse(["full=a", "less=b", "--seeds", "1", "--runs", str(saved / "runs.jsonl")])
    policies = {name: Policy.of(PolicyNetwork(seed=s)) for s, (name, _) in enumerate(options.policies)}
    methods = bench_ablation.make_methods(policies)
    groups = bench_ablation.planned(cases, list(policies), 1)
    assert [r.method for r in groups[0]] == [f"{k}@{n}" for k in bench_ablation.KINDS for n in ("full", "less")]
    options.part = "0/1"
    placement_parts.make_part(groups, methods, cases, options)
    assert bench_ablation.summarise(options, cases, policies, methods), capsys.readouterr().out
    data = json.loads((saved / "ablation.json").read_text())
    objectives = [p["objectives"] for p in data["problems"]]
    logs = [math.log(o["guided@less 200e"]["0"] / o["guided@full 200e"]["0"]) for o in objectives]
    assert data["tables"]["ratios"]["guided"][0]["geometric_mean"] == pytest.approx(math.exp(np.mean(logs)))
    assert set(data["tables"]["infeasible_runs"]) == set(methods)
    assert [p["name"] for p in data["policies"]] == ["full", "less"]


@pytest.mark.parametrize("policies", [["full=a"], ["full=a", "full=b"], ["full=a", "b"]])
def test_an_ablation_needs_two_named_policies(policies):
    with pytest.raises(SystemExit):
        bench_ablation.parse(policies)


def test_a_strategy_is_a_method(cases):
    answer = placement_runs.by_strategy(AnnealingStrategy).place(cases[0].problem, "30e", 0)
    assert answer.evaluations == 30 and answer.assignment.shape == (8,)
