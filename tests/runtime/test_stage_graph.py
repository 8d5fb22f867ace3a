import itertools
import signal
import threading
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from autoplace.errors import ExecutionError
from autoplace.graph import split
from autoplace.runtime import build_executor
from autoplace.runtime.stage_graph import StageGraph
from autoplace.runtime.standins import Standins

A, B = "host0/cpu:0", "host0/cpu:1"
IDS = torch.tensor([[(7 * i + 3 * j) % 50 for j in range(7)] for i in range(6)])


@pytest.fixture(autouse=True)
def no_stage_is_too_small(monkeypatch):
    monkeypatch.setattr(split, "_SMALL_US", 0.0)


@pytest.fixture
def graph_plan(make_plan):
    def make(*replicas, **knobs):
        return make_plan(*replicas, engine="graph", **knobs)

    return make


def tower(width, depth=2):
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.GELU())])


class Towers(nn.Module):
    """Two branches and a join; the second input is a keyword."""

    def __init__(self, width=8, depth=2):
        super().__init__()
        self.left, self.right, self.head = tower(width, depth), tower(width, depth), nn.Linear(2 * width, 3)

    def forward(self, x, *, y, scale=1.0):
        return self.head(torch.cat([self.left(x), self.right(y) * scale], -1))


class Skips(nn.Module):
    """A U: what the first half makes is read by the second half, one after another, with residuals and in-place ops."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.up = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        kept = []
        for layer in self.down:
            x = self.act(layer(x))
            kept.append(x)
        for layer in self.up:
            x = layer(x + kept.pop())
            x += 1.0
        y = x.clone()
        y[:, 0] = 2.0 * y[:, 1]
        return x.mean(), y


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.body, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm1d(4, track_running_stats=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        x = self.act(self.body(x) + x)
        return self.head(self.last(x.mean((2, 3))))


def test_two_towers_run_as_stages_of_their_own(cluster, graph_plan, compare):
    net, x, y = Towers(), torch.randn(6, 8), torch.randn(6, 8)
    assignment = {"left": A, "right": B, "head": A}
    for microbatches in (1, 2, 3):
        compare(net, graph_plan(assignment, microbatches=microbatches), [x], {"y": y})
    with build_executor(net, graph_plan(assignment), cluster) as executor:
        assert type(executor) is StageGraph
        executor(x, y=y).sum().backward()
        labels = [(s.resource, s.label) for s in executor.timeline()]
        busy = executor.busy_ms()
    forward, backward = [one for one in labels if "backward" not in one[1]], [s for s in labels if "backward" in s[1]]
    assert sorted(forward[:2]) == [(A, "left.0 … left.3"), (B, "right.0 … right.3")]
    assert forward[2:] == [(A, "head")]
    assert backward[0] == (A, "head backward") and len(backward) == 3
    assert set(busy) == {A, B} and min(busy.values()) > 0


def test_every_assignment_of_a_u(graph_plan, compare):
    net, x = Skips(), torch.randn(5, 6)
    names = ["down.0", "down.1", "down.2", "up.0", "up.1", "up.2"]
    for devices in itertools.islice(itertools.product((A, B), repeat=6), 1, 63, 5):
        compare(net, graph_plan(dict(zip(names, devices, strict=True))), [x], pick=lambda o: o[0] + o[1].square().sum())


def test_replicas_of_stages_and_uneven_shares(graph_plan, compare):
    net, x, y = Towers(), torch.randn(7, 8), torch.randn(7, 8)
    one = {"left": A, "right": B, "head": B}
    for plan in (
        graph_plan(one, B, shares=[0.7, 0.3]),
        graph_plan(one, {k: A if v == B else B for k, v in one.items()}, microbatches=2),
    ):
        compare(net, plan, [x], {"y": y})


def test_clip_with_a_tower_on_each_device(graph_plan, compare):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 49, **sizes},
        vision_config={"image_size": 16, "patch_size": 8, **sizes},
        projection_dim=12,
    )
    net = CLIPModel(config).eval()
    kwargs = {"input_ids": IDS, "pixel_values": torch.randn(6, 3, 16, 16)}
    plan = graph_plan({"vision_model": A, "visual_projection": A, "text_model": B, "text_projection": B})
    output = compare(net, plan, kwargs=kwargs, pick=lambda o: o.logits_per_image.square().mean())
    assert output.logits_per_text.shape == (6, 6)


def test_gpt2_with_tied_weights_on_both_devices(graph_plan, compare):
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    net = GPT2LMHeadModel(config).eval()
    assert net.lm_head.weight is net.transformer.wte.weight
    assignment = {"transformer.wte": A, "transformer.h.0": A, "transformer.h.1": B, "lm_head": B}
    kwargs = {"labels": IDS, "input_ids": IDS, "use_cache": False}
    for microbatches in (1, 2, 3):
        compare(net, graph_plan(assignment, microbatches=microbatches), kwargs=kwargs, pick=lambda o: o.loss)


def test_t5_whose_output_holds_a_cache(cluster, graph_plan, compare):
    config = T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=50, decoder_start_token_id=0, pad_token_id=0
    )
    net = T5ForConditionalGeneration(config).eval()
    plan = graph_plan({"encoder": A, "decoder": B, "lm_head": B})
    kwargs = {"input_ids": IDS, "labels": IDS[:, :5].contiguous()}
    compare(net, plan, kwargs={**kwargs, "use_cache": False}, pick=lambda o: o.loss)
    with build_executor(net, plan, cluster) as executor, torch.no_grad():
        got, expected = executor(**kwargs), net(**kwargs)
    assert type(got) is type(expected) and got.keys() == expected.keys()
    torch.testing.assert_close(got.logits, expected.logits)
    assert type(got.past_key_values) is type(expected.past_key_values)
    keys, wanted = (o.past_key_values.self_attention_cache.layers[1].keys for o in (got, expected))
    torch.testing.assert_close(keys, wanted)


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm(cluster, graph_plan, compare, training):
    net, x = Normed().train(training), torch.randn(6, 3, 8, 8)
    plan = graph_plan({"conv": A, "norm": B, "body": A, "last": B, "head": A})
    if not training:
        compare(net, plan, [x])
        compare(net, plan.with_(microbatches=2, channels_last=True), [x])
        return
    start = {k: v.clone() for k, v in net.state_dict().items()}
    expected = net(x)
    expected.square().mean().backward()
    grads = [p.grad for p in net.parameters()]
    after = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(start)
    net.zero_grad(set_to_none=True)
    with build_executor(net, plan, cluster) as executor:
        output = executor(x)
        output.square().mean().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close([p.grad for p in net.parameters()], grads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(net.state_dict()), after)
    assert net.norm.num_batches_tracked == 1


def test_dropout_in_training_and_its_rate_when_changed(cluster, graph_plan):
    net = nn.Sequential(nn.Dropout(0.25), nn.Identity(), nn.Dropout(0.5)).train()
    x = torch.ones(4, 3000, requires_grad=True)
    with build_executor(net, graph_plan({"0": A, "2": B}, microbatches=2), cluster) as executor:
        first, second = executor(x), executor(x)
        (grad,) = torch.autograd.grad(first.sum(), x)
        assert torch.equal(grad, first.detach()), "the backward has the forward's masks"
        assert not torch.equal(first, second) and not torch.equal(first[:2], first[2:])
        kept = torch.stack([(executor(x) != 0).float().mean() for _ in range(5)]).mean()
        assert abs(kept - 0.375) < 0.01
        assert abs(torch.stack([executor(x).mean() for _ in range(5)]).mean() - 1) < 0.03
        net[0].p = net[2].p = 0.0
        assert torch.equal(executor(x), x)
        net[2].p = 0.5
        net.eval()
        assert torch.equal(executor(x), x)


def test_weights_are_the_models_own(cluster, graph_plan):
    net, x, y = Towers(), torch.randn(4, 8), torch.randn(4, 8)
    with build_executor(net, graph_plan({"left": A, "right": B, "head": A}), cluster) as executor, torch.no_grad():
        executor(x, y=y)
        net.load_state_dict({k: v + 0.1 for k, v in net.state_dict().items()})
        torch.testing.assert_close(executor(x, y=y), net(x, y=y))
        net.head.weight.data = net.head.weight.data * 2
        torch.testing.assert_close(executor(x, y=y), net(x, y=y))
        net.head.bias = nn.Parameter(torch.ones(3))
        torch.testing.assert_close(executor(x, y=y), net(x, y=y))
        assert len(list(executor._caches[0]._programs.values())) == 1, "none of this needs another export"


def test_stand_ins_on_another_device_give_the_same(graph_plan, compare, monkeypatch):
    monkeypatch.setattr(Standins, "local", lambda self, weight: False)
    net, x, y = Towers(), torch.randn(6, 8), torch.randn(6, 8)
    for _ in range(2):
        compare(net, graph_plan({"left": A, "right": B, "head": A}, microbatches=2), [x], {"y": y})
        with torch.no_grad():
            net.head.weight.add_(1.0)
    compare(Normed().eval(), graph_plan({"conv": A, "norm": B}), [torch.randn(2, 3, 8, 8)])


def test_stand_ins_bring_statistics_home(cluster, graph_plan, monkeypatch):
    monkeypatch.setattr(Standins, "local", lambda self, weight: False)
    net = Normed().train()
    with build_executor(net, graph_plan({"conv": A, "norm": B, "head": A}), cluster) as executor:
        executor(torch.randn(6, 3, 8, 8)).sum().backward()
    assert net.norm.num_batches_tracked == 1 and net.norm.running_mean.abs().sum() > 0


@dataclass
class Answer:
    score: torch.Tensor
    name: str
    parts: list
    nothing: None = None


def test_outputs_of_any_type_and_inputs_that_pass_through(cluster, graph_plan):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 4)

        def forward(self, x, flag="no", extra=None):
            y = self.b(self.a(x))
            return Answer(y, flag, [x, x.shape[0], (y.argmax(-1), {"w": self.a.weight, "e": extra})])

    net = Net()
    for microbatches in (1, 2):
        x = torch.randn(4, 4, requires_grad=True)
        with build_executor(net, graph_plan({"a": A, "b": B}, microbatches=microbatches), cluster) as executor:
            if microbatches == 2:
                with pytest.raises(ExecutionError):
                    executor(x)  # a weight among the outputs has no batch to merge along
                continue
            got, expected = executor(x, flag="yes"), net(x, flag="yes")
            assert executor(x, extra=torch.ones(2)).parts[2][1]["e"].shape == (2,)
        assert type(got) is Answer and got.name == "yes" and got.nothing is None
        assert got.parts[0] is x and got.parts[1] == 4
        torch.testing.assert_close(got.score, expected.score)
        assert torch.equal(got.parts[2][0], expected.parts[2][0])
        wanted = [x, *net.parameters()]
        for out in (got, expected):
            loss = out.score.sum() + out.parts[2][1]["w"].square().sum() + out.parts[0].sum()
            grads = torch.autograd.grad(loss, wanted)
            if out is got:
                first = grads
        torch.testing.assert_close(first, grads)


def test_batch_sizes_and_values_of_other_inputs(cluster, graph_plan):
    net = Towers().eval()
    with build_executor(net, graph_plan({"left": A, "right": B, "head": A}), cluster) as executor, torch.no_grad():
        for size in (4, 7, 2, 1, 9):
            x, y = torch.randn(size, 8), torch.randn(size, 8)
            torch.testing.assert_close(executor(x, y=y), net(x, y=y))
        assert executor._caches[0]._count == 2, "one for batches, one for a batch of one"
        for scale in (2.0, 3.0):
            torch.testing.assert_close(executor(y=y, x=x, scale=scale), net(x, y=y, scale=scale))
        for scale in range(4, 8):
            executor(x, y=y, scale=float(scale))
        with pytest.raises(ExecutionError, match="more than 8 ways"):
            executor(x, y=y, scale=8.0)
        torch.testing.assert_close(executor(x, y=y), net(x, y=y))


def test_retained_graphs_and_freed_ones(cluster, graph_plan):
    net, x, y = Towers(), torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    with build_executor(net, graph_plan({"left": A, "right": B, "head": A}, microbatches=2), cluster) as executor:
        loss = executor(x, y=y).square().sum()
        first = torch.autograd.grad(loss, [x, *net.parameters()], retain_graph=True)
        second = torch.autograd.grad(loss, [x, *net.parameters()])
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        with pytest.raises((ExecutionError, RuntimeError), match=r"freed|second time"):
            loss.backward()
        other = executor(x, y=y).sum()
    other.backward()
    grads = [p.grad for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    net(x, y=y).sum().backward()
    torch.testing.assert_close(grads, [p.grad for p in net.parameters()], msg="a backward after close")


def test_modes_reach_the_stages(cluster, graph_plan):
    net, x, y = Towers().eval(), torch.randn(4, 8), torch.randn(4, 8)
    with build_executor(net, graph_plan({"left": A, "right": B, "head": A}), cluster) as executor:
        assert executor(x, y=y).requires_grad
        with torch.no_grad():
            assert not executor(x, y=y).requires_grad
        with torch.inference_mode():
            assert executor(x, y=y).is_inference()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, expected = executor(x, y=y), net(x, y=y)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected)
    with build_executor(net, graph_plan({"left": A, "right": B}, precision="bfloat16"), cluster) as executor:
        assert executor(x, y=y).dtype == torch.bfloat16
        executor(x, y=y).sum().backward()
    assert net.left[0].weight.grad.dtype == torch.float32
    net.left.requires_grad_(False)
    net.zero_grad(set_to_none=True)
    with build_executor(net, graph_plan({"left": A, "right": B, "head": A}), cluster) as executor:
        executor(x, y=y).sum().backward()
    assert net.left[0].weight.grad is None and net.right[0].weight.grad is not None


class Attends(nn.Module):
    """Asks for the type of a value, as attention does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        q = self.a(x)
        weights = torch.softmax(q @ q.mT, -1, dtype=torch.float32).to(q.dtype)
        return self.b(weights @ q), weights


def test_types_that_the_model_asks_for_follow_autocast(cluster, graph_plan):
    net, x = Attends(), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = net(x)
    with build_executor(net, graph_plan({"a": A, "b": B}), cluster) as executor:
        assert executor(x)[1].dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = executor(x)
    torch.testing.assert_close(got, expected)
    with build_executor(net, graph_plan({"a": A, "b": B}, precision="bfloat16"), cluster) as executor:
        torch.testing.assert_close(executor(x), expected)


def test_objects_among_the_inputs_are_refused(cluster, graph_plan):
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    net = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        cache = net(IDS).past_key_values
    plan = graph_plan({"transformer.wte": A, "transformer.h": B, "lm_head": A})
    with build_executor(net, plan, cluster) as executor, pytest.raises(ExecutionError, match="DynamicCache"):
        executor(IDS[:, :1], past_key_values=cache)


def test_compiled_stages(cluster, graph_plan, compare, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda fn, **_: compiled.append(fn) or fn)
    net, x, y = Towers(), torch.randn(4, 8), torch.randn(4, 8)
    with build_executor(net, graph_plan({"left": A, "right": B, "head": A}, compiled=True), cluster) as executor:
        for _ in range(2):
            torch.testing.assert_close(executor(x, y=y), net(x, y=y))
    assert len(compiled) == 3


def test_an_exception_in_a_stage_reaches_the_caller(cluster, graph_plan):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Embedding(5, 4), nn.Linear(4, 4)

        def forward(self, x, ids):
            return self.c(self.a(x) + self.b(ids))

    net, ids = Net(), torch.tensor([0, 1, 2, 3])
    with build_executor(net, graph_plan({"a": A, "b": B, "c": A}, microbatches=2), cluster) as executor:
        executor(torch.ones(4, 4), ids)
        for _ in range(20):
            with pytest.raises(IndexError, match="index out of range"):
                executor(torch.ones(4, 4), ids + 3)
        assert executor(torch.ones(4, 4), ids).shape == (4, 4), "it goes on after an exception"


def test_what_cannot_be_split_is_told(cluster, graph_plan):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else self.b(x)

    class Inplace(Branching):
        def forward(self, x):
            x.add_(1)
            return self.b(self.a(x))

    class Checkpointed(Branching):
        reentrant = False

        def forward(self, x):
            return self.b(checkpoint(self.a, x, use_reentrant=self.reentrant))

    class Reentrant(Checkpointed):
        reentrant = True

    for kind, words in [
        (Branching, "cannot be exported"),
        (Inplace, "modifies an input"),
        (Checkpointed, "checkpoints"),
        (Reentrant, "checkpoints"),
    ]:
        with build_executor(kind(), graph_plan({"a": A, "b": B}), cluster) as executor:
            for _ in range(2):
                with pytest.raises(ExecutionError, match=words):
                    executor(torch.ones(2, 4))
    assert checkpoint(nn.Identity(), torch.ones(1), use_reentrant=False) == 1
    with pytest.raises(ExecutionError, match="'7'"):
        build_executor(Branching(), graph_plan({"7": A, "b": B}), cluster)
    with pytest.raises(ExecutionError, match="cluster does not have"):
        build_executor(Branching(), graph_plan({"a": A, "b": "host0/cuda:5"}), cluster)


def test_hooks_are_refused_whenever_they_come(cluster, graph_plan):
    net, x, y = Towers(), torch.randn(4, 8), torch.randn(4, 8)
    with build_executor(net, graph_plan({"left": A, "right": B}), cluster) as executor:
        executor(x, y=y)
        for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
            handle = getattr(net.left[0], f"register_{register}")(lambda *_: None)
            with pytest.raises(ExecutionError, match="hooks"):
                executor(x, y=y)
            handle.remove()
        executor(x, y=y)


def test_parameter_hooks_fire_once_with_the_whole_gradient(cluster, graph_plan):
    net, x, y = Towers(), torch.randn(4, 8), torch.randn(4, 8)
    fired = []
    net.head.weight.register_hook(fired.append)
    with build_executor(net, graph_plan({"left": A, "right": B}, microbatches=2), cluster) as executor:
        executor(x, y=y).sum().backward()
    assert len(fired) == 1
    torch.testing.assert_close(fired[0], net.head.weight.grad)


def test_branches_run_at_the_same_time(cluster, graph_plan):
    net = Towers(256, depth=3)
    x, y = torch.randn(512, 256), torch.randn(512, 256)
    with build_executor(net, graph_plan({"left": A, "right": B, "head": A}), cluster) as executor:
        executor(x, y=y).sum().backward()
        for _ in range(20):
            executor.timeline()
            executor(x, y=y).sum().backward()
            spans = {s.label: s for s in executor.timeline()}
            pairs = [[spans[f"{side}.0 … {side}.5{way}"] for side in ("left", "right")] for way in ("", " backward")]
            if all(max(a.start_ms, b.start_ms) < min(a.end_ms, b.end_ms) for a, b in pairs):
                return
    pytest.fail("the two branches never overlapped")


def test_several_threads_and_modes_at_once(cluster, graph_plan):
    net, results = Towers().eval(), [None] * 4
    inputs = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(4)]
    with build_executor(net, graph_plan({"left": A, "right": B, "head": A}, microbatches=2), cluster) as executor:

        def call(i):
            with torch.set_grad_enabled(i % 2 == 0):
                for _ in range(10):
                    results[i] = executor(inputs[i][0], y=inputs[i][1])

        threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, ((x, y), got) in enumerate(zip(inputs, results, strict=True)):
        assert got.requires_grad == (i % 2 == 0)
        torch.testing.assert_close(got, net(x, y=y))


def test_values_are_freed_when_their_last_reader_is_done(cluster, graph_plan):
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    with build_executor(net, graph_plan({"0": A, "1": B, "2": A, "3": B}), cluster) as executor, torch.no_grad():
        executor(torch.ones(2, 4))
        program = next(iter(executor._caches[0]._programs.values()))[0]
        seen = []
        for stage in program.split.stages:
            run = stage.module.forward

            def watched(*args, run=run):
                seen.append(len(live[0]._values))
                return run(*args)

            stage.module.forward = watched
        live = []
        make = executor._part

        def part(*args):
            live.append(make(*args))
            return live[-1]

        executor._part = part
        executor(torch.ones(2, 4))
    assert seen == [1, 1, 1, 1]


def test_an_interrupt_leaves_the_executor_usable(cluster, graph_plan):
    def interrupt(*_):
        raise KeyboardInterrupt

    net, x, y = Towers(), torch.randn(4, 8), torch.randn(4, 8)
    before = signal.signal(signal.SIGALRM, interrupt)
    gate = threading.Event()
    try:
        with build_executor(net, graph_plan({"left": A, "right": B}), cluster) as executor:
            executor(x, y=y)
            executor._workers.by_name[B].submit(lambda: gate.wait(10))
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                executor(x, y=y)
            gate.set()
            torch.testing.assert_close(executor(x, y=y), net(x, y=y))
    finally:
        gate.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_closed_executors_say_so(cluster, graph_plan):
    net, x, y = Towers(), torch.randn(4, 8), torch.randn(4, 8)
    executor = build_executor(net, graph_plan({"left": A, "right": B}), cluster)
    executor(x, y=y)
    before = threading.active_count()
    executor.close()
    executor.close()
    with pytest.raises(ExecutionError, match="closed"):
        executor(x, y=y)
    deadline = time.monotonic() + 5
    while threading.active_count() > before - 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before - 2
