"""What runs where, and why: the figures that are known, in words, and none that are not."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import nn

from autoplace.hardware.cluster import Cluster, Device
from autoplace.plan import Plan, Replica
from autoplace.plan_cache import facts_of
from autoplace.report import explain_plan

CPU0, CPU1 = "host0/cpu:0", "host0/cpu:1"


class Encoder(nn.Module):
    """The modules that the shared result's plans name: embeddings, encoder.layer.0-5.{attention,mlp}, head."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(1000, 50)
        layer = [nn.ModuleDict({"attention": nn.Linear(10, 10), "mlp": nn.Linear(10, 10)}) for _ in range(6)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layer)})
        self.head = nn.Linear(10, 1000, bias=False)


def _lines(text, width=100):
    assert max(map(len, text.splitlines())) <= width
    return text.splitlines()


def test_a_tuned_plan_is_explained(result):
    text = explain_plan(Encoder(), result.chosen.plan, cluster=result.cluster, result=result, mode="inference")
    lines = _lines(text)
    joined = " ".join(text.split())
    assert joined.startswith(
        "BertModel, inference, batch 8: stages: cpu:0 → cpu:1, 1 thread each, 4 microbatches, "
        "1.42x plain PyTorch (1.35-1.49), A/A noise 3.0%."
    )
    assert "run by threads of this process, not compiled, float32, 4 microbatches; proposed by heft" in joined
    first = next(line for line in lines if line.lstrip().startswith(CPU0))
    # 1000 * 50 of the embeddings and 3 layers of 2 * 110, times 4 bytes.
    assert first.split()[-4:] == ["1", "0.203", "9.40", "15.1"]
    assert "encoder.layer.0-2" in text and "encoder.layer.3-5, head" in text
    assert "Checked against plain PyTorch: same output, loss and 101 gradients." in text
    assert "Captured by export: 412 ops in 14 groups." in text
    assert "Energy: 1.36 J per pass, plain PyTorch 1.93 J (source: model)." in text
    assert "The plan comes from a tuning in this process." in text


def test_the_best_alternatives_are_listed_with_their_verdicts(result):
    text = explain_plan(Encoder(), result.chosen.plan, cluster=result.cluster, result=result, mode="inference")
    table = text[text.index("instead of") : text.index("Checked")]
    assert "heft" not in re.sub(r"slower than heft x4", "", table)
    labels = ["plain", "replicas 0.50/0.50", "single cpu:0", "random 3", "annealing"]
    positions = [table.index(f"\n {label} ") for label in labels]
    assert positions == sorted(positions)
    assert "slower than heft x4" in table and "failed" in table
    extra = tuple(dataclasses.replace(result.candidates[-1], label=f"random {i}") for i in range(4, 30))
    longer = dataclasses.replace(result, candidates=(*result.candidates, *extra))
    text = explain_plan(Encoder(), result.chosen.plan, cluster=result.cluster, result=longer, mode="inference")
    assert "random 29" not in text


def test_plain_pytorch_that_was_kept_says_why(result):
    plain = dataclasses.replace(result.candidates[0], kept=True, verdict="kept: nothing beats it beyond the noise")
    others = [dataclasses.replace(c, kept=False) for c in result.candidates[1:]]
    kept = dataclasses.replace(result, candidates=(plain, *others))
    text = explain_plan(Encoder(), Plan.plain(), cluster=result.cluster, result=kept, mode="inference")
    assert "plain PyTorch: nothing beat it beyond the noise (A/A noise 3.0%)." in text
    assert "the whole model" in text and "How:" not in text
    later = facts_of(kept)
    text = explain_plan(Encoder(), Plan.plain(), cluster=result.cluster, facts=later, mode="inference")
    assert "BertModel, inference, batch 8: plain PyTorch: nothing beat it beyond the noise (A/A noise 3.0%)." in text


def test_plain_pytorch_after_a_plan_that_drifted_does_not_claim_the_plans_figures(result):
    text = explain_plan(Encoder(), Plan.plain(), cluster=result.cluster, result=result, mode="inference")
    head = " ".join(text.split("\n\n")[0].split())
    assert head == "BertModel, inference, batch 8: plain PyTorch; the tuning had kept heft x4."


def test_a_cached_plan_is_explained_by_its_facts(result):
    facts = {**facts_of(result), "date": "2026-11-24", "origin": "the plan cache"}
    text = explain_plan(Encoder(), result.chosen.plan, cluster=result.cluster, facts=facts, mode="training", width=120)
    joined = " ".join(text.split())
    assert "1.42x plain PyTorch (1.35-1.49), A/A noise 3.0%" in joined
    assert "The plan comes from the plan cache, tuned on 2026-11-24 with torch 2.13.0, python 3.11.7." in joined
    assert "Captured by export." in joined
    assert "busy ms" not in joined and "instead of" not in joined and "Energy" not in joined


def test_what_is_not_known_is_left_out(result):
    plan = Plan(
        replicas=(
            Replica(assignment={".": CPU0}, share=0.75),
            Replica(assignment={".": "host0/cuda:7"}, share=0.25),
        ),
        strategy="by hand",
        compiled=True,
        channels_last=True,
        precision="bfloat16",
        engine="processes",
    )
    text = explain_plan(nn.Linear(4, 4), plan, cluster=result.cluster, mode="inference")
    assert "x plain" not in text and "noise" not in text and "busy" not in text and "Captured" not in text
    assert "comes from" not in text and "nan" not in text.lower() and "None" not in text
    assert "processes that share the parameters' memory, compiled, bfloat16, images channels last" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.lstrip().startswith("host0/")}
    assert rows[CPU0] == [CPU0, "the", "whole", "model", "75%", "1", "8e-05"]
    assert rows["host0/cuda:7"] == ["host0/cuda:7", "the", "whole", "model", "25%", "8e-05"], "no cores, no threads"
    assert explain_plan(nn.Linear(4, 4), Plan.plain(), cluster=result.cluster, mode="inference").startswith(
        "Linear, inference: plain PyTorch.\n"
    )


def test_a_plan_for_another_model_gives_no_sizes(result):
    text = explain_plan(nn.Linear(4, 4), result.chosen.plan, cluster=result.cluster, mode="inference")
    assert "parameters MB" not in text and "encoder.layer.0-2" in text


def test_models_without_parameters_and_plain_compiled_plans(result):
    text = explain_plan(nn.ReLU(), Plan.plain().with_(compiled=True), cluster=result.cluster, mode="inference")
    assert text.startswith("ReLU, inference: plain torch.compile.")
    assert "the whole model" in text


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_text_fits_its_width(result, width):
    for plan in (result.chosen.plan, Plan.plain(), result.candidates[2].plan):
        text = explain_plan(Encoder(), plan, cluster=result.cluster, result=result, mode="inference", width=width)
        assert _lines(text, width) and not text.endswith("\n\n") and "\x1b" not in text


def test_markup_in_names_is_only_text(result):
    odd = dataclasses.replace(result, model_name="[red]x[/nonsense]")
    plan = Plan(replicas=(Replica(assignment={"[bold]a": CPU0, "b": CPU1}),), strategy="[x]")
    text = explain_plan(Encoder(), plan, cluster=odd.cluster, result=odd, mode="inference")
    assert "[red]x[/nonsense]" in text and "[bold]a" in text and "[x]" in text


def test_each_device_of_a_plain_model_on_two_devices_has_its_row():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    cluster = Cluster(devices=(Device(name=CPU0, kind="cpu"),))
    text = explain_plan(model, Plan.plain(), cluster=cluster, mode="training")
    assert text.count("those whose parameters are here") == 2 and " meta " in text
    assert re.search(rf"cpu .*\b{torch.get_num_threads()}\b", text)
