import itertools
import signal
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, DynamicCache, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from autoplace.errors import ExecutionError
from autoplace.plan import Plan
from autoplace.runtime import Identity, InlineDevice, Replicas, SingleDevice, Stages, build_executor
from autoplace.runtime.copies import Copies

A, B = "host0/cpu:0", "host0/cpu:1"
IDS = torch.tensor([[(7 * i + 3 * j) % 50 for j in range(9)] for i in range(6)])


class ResidualCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        out = self.body(x)
        out += x
        out = self.act(out)
        return self.head(out.mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def bert():
    config = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    return BertModel(config).eval()


def plans(make_plan, assignment):
    """Every family, uneven shares and several microbatches."""
    return [
        make_plan(B),
        make_plan(A, microbatches=3),
        make_plan(A, B),
        make_plan(A, B, shares=[0.7, 0.3]),
        make_plan(A, B, shares=[0.34, 0.66], microbatches=2),
        *[make_plan(assignment, microbatches=m) for m in (1, 2, 3)],
        make_plan(assignment, B, microbatches=1),
        make_plan(assignment, {k: A if v == B else B for k, v in assignment.items()}, microbatches=2),
    ]


def test_the_plan_chooses_the_executor(cluster, make_plan):
    net = mlp()
    stages = {"0": A, "2": B}
    for plan, kind in [
        (Plan.plain(), Identity),
        (make_plan(A), InlineDevice),
        (make_plan(A, microbatches=2), SingleDevice),
        (make_plan(A, B), Replicas),
        (make_plan(stages), Stages),
        (make_plan(stages, A), Stages),
    ]:
        with build_executor(net, plan, cluster) as executor:
            assert type(executor) is kind
            assert executor(torch.ones(4, 8)).shape == (4, 4)


def test_mlp(make_plan, compare):
    for plan in [*plans(make_plan, {"0": A, "1": A, "2": B}), Plan.plain()]:
        compare(mlp(), plan, [torch.randn(6, 8)])


@pytest.mark.parametrize("microbatches", [1, 2])
def test_every_assignment_of_a_chain(make_plan, compare, microbatches):
    net, x = mlp(), torch.randn(5, 8)
    for devices in itertools.product((A, B), repeat=3):
        compare(net, make_plan(dict(zip("012", devices, strict=True)), microbatches=microbatches), [x])


def test_bert_with_keyword_inputs(make_plan, compare):
    mask = torch.ones_like(IDS)
    mask[1::2, 6:] = 0
    assignment = {"embeddings": A, "encoder.layer.0": A, "encoder.layer.1": B, "encoder.layer.2": A, "pooler": B}
    net = bert()
    for plan in plans(make_plan, assignment):
        compare(
            net,
            plan,
            kwargs={"input_ids": IDS, "attention_mask": mask},
            pick=lambda y: y.last_hidden_state.square().mean() + y.pooler_output.mean(),
        )


def test_vit(make_plan, compare):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8
    )
    net = ViTModel(config).eval()
    layers = sorted(n for n, m in net.named_modules() if type(m).__name__ == "ViTLayer")
    assert len(layers) == 2
    assignment = {"embeddings": A, layers[0]: B, layers[1]: A, "pooler": B}
    for plan in plans(make_plan, assignment):
        compare(net, plan, [torch.randn(6, 3, 16, 16)], pick=lambda y: y.last_hidden_state.square().mean())


def test_gpt2_with_tied_weights_and_its_own_loss(make_plan, compare):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    net = GPT2LMHeadModel(config).eval()
    assert net.lm_head.weight is net.transformer.wte.weight
    assignment = {"transformer.wte": A, "transformer.h.0": A, "transformer.h.1": B, "lm_head": B}
    kwargs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    for plan in plans(make_plan, assignment):
        output = compare(net, plan, kwargs=kwargs, pick=lambda y: y.loss)
        assert output.loss.dim() == 0


def test_residual_cnn_with_inplace_activation_and_unused_parameters(make_plan, compare):
    net = ResidualCNN()
    assignment = {"stem": A, "norm": B, "act": A, "body": B, "head": A}
    for plan in plans(make_plan, assignment):
        compare(net, plan, [torch.randn(6, 3, 8, 8)])


def test_stand_ins_on_another_device_give_the_same(make_plan, compare, monkeypatch):
    monkeypatch.setattr(Copies, "needed", lambda self, module: True)
    net = ResidualCNN()
    for plan in plans(make_plan, {"stem": A, "norm": B, "act": A, "body": B, "head": A}):
        compare(net, plan, [torch.randn(6, 3, 8, 8)])


def test_stand_ins_follow_the_originals(cluster, make_plan, monkeypatch):
    monkeypatch.setattr(Copies, "needed", lambda self, module: True)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.0))
    x = torch.randn(8, 3)
    with build_executor(net, make_plan(A), cluster) as executor:
        with torch.inference_mode():
            executor(x)
        plain = nn.BatchNorm1d(3)
        executor(x).sum().backward()
        assert net[1].num_batches_tracked.item() == 2, "running statistics come home"
        assert not torch.equal(net[1].running_mean, plain.running_mean)
        with torch.no_grad():
            net[0].weight.mul_(2)
        net.eval()
        with torch.no_grad():
            torch.testing.assert_close(executor(x), net(x))
        net[0].weight.data = net[0].weight.data * 3
        with torch.no_grad():
            torch.testing.assert_close(executor(x), net(x))
        net.train()
        net[2].p = 1.0
        assert executor(x).abs().sum() == 0


def test_inputs_pass_through_and_none_stays_none(cluster, make_plan):
    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)
            self.last = nn.Linear(2, 2)

        def forward(self, x, flag=None):
            return {"x": x, "y": self.last(self.lin(x)), "none": None, "n": x.argmax(-1), "flag": flag}

    net, x = Passing(), torch.randn(4, 2, requires_grad=True)
    for plan in (make_plan(A), make_plan(A, B), make_plan({"lin": A, "last": B}, microbatches=2)):
        with build_executor(net, plan, cluster) as executor:
            got = executor(x, flag="yes")
        assert got["none"] is None and got["flag"] == "yes"
        assert not got["n"].requires_grad and torch.equal(got["n"], x.argmax(-1))
        (grad,) = torch.autograd.grad(got["x"].sum() * 3 + 0 * got["y"].sum(), x)
        assert torch.allclose(grad, torch.full_like(x, 3.0))


def test_a_single_device_hands_back_an_untouched_input_itself(cluster, make_plan):
    x = torch.randn(4, 2, requires_grad=True)
    with build_executor(nn.Identity(), make_plan(A), cluster) as executor:
        assert executor(x) is x


def test_exceptions_keep_their_type_and_place(cluster, make_plan):
    class Breaks(nn.Module):
        def forward(self, x):
            if (x > 0).any():
                raise LookupError("from the model")
            return x

    net = nn.Sequential(nn.Linear(2, 2), Breaks())
    net[0].weight.data.fill_(1.0)
    for plan in (
        make_plan(A),
        make_plan(A, B),
        make_plan({"0": A, "1": B}),
        make_plan({"0": A, "1": B}, microbatches=2),
    ):
        with build_executor(net, plan, cluster) as executor:
            with pytest.raises(LookupError, match="from the model") as caught:
                executor(torch.ones(4, 2))
            assert caught.traceback[-1].path.name == "test_executors.py"
            assert executor(-10 * torch.ones(4, 2)).shape == (4, 2), "it goes on after an exception"


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_small_batches_run_on_the_parts_that_get_samples(cluster, make_plan, batch):
    net, x = mlp(), torch.randn(batch, 8)
    for plan in (
        make_plan(A, B),
        make_plan(A, B, shares=[0.1, 0.9], microbatches=2),
        make_plan({"0": A, "1": A, "2": B}, microbatches=4),
    ):
        net.zero_grad()
        expected = net(x)
        expected.sum().backward()
        grads = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        with build_executor(net, plan, cluster) as executor:
            y = executor(x)
            y.sum().backward()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close([p.grad for p in net.parameters()], grads)


def test_inputs_without_a_batch_are_refused(cluster, make_plan):
    no_batch = pytest.raises(ExecutionError, match="no tensor with a batch dimension")
    with build_executor(nn.Identity(), make_plan(A, B), cluster) as executor, no_batch:
        executor(torch.tensor(1.0))


def test_plans_that_cannot_be_built(cluster, make_plan):
    for plan, words in [
        (make_plan({"7": A}), "'7'"),
        (make_plan("host0/cuda:3"), "cluster does not have"),
        (make_plan(A, precision="int3"), "precision"),
    ]:
        with pytest.raises(ExecutionError, match=words):
            build_executor(mlp(), plan, cluster)
    with pytest.raises(ExecutionError, match="shape"):
        Replicas(mlp(), make_plan(A), cluster)


def test_engines(cluster, make_plan):
    stages = {"0": A, "2": B}
    with build_executor(mlp(), make_plan(stages, engine="graph"), cluster) as executor:
        assert type(executor).__name__ == "StageGraph"
    for plan in (make_plan(stages, engine="processes"), make_plan(A, B, engine="graph")):
        with pytest.raises(ExecutionError, match="use the engine 'threads'"):
            build_executor(mlp(), plan, cluster)


def test_closing_gives_forward_back(cluster, make_plan):
    net = mlp()
    executor = build_executor(net, make_plan({"0": A, "1": A, "2": B}), cluster)
    assert "forward" in vars(net[0])
    executor.close()
    executor.close()
    assert all("forward" not in vars(m) for m in net.modules())
    with pytest.raises(ExecutionError, match="closed"):
        executor(torch.ones(2, 8))


def test_hooks_fire_once_per_part(cluster, make_plan):
    net, fired = mlp(), []
    net.register_forward_hook(lambda *_: fired.append("root"))
    net[2].register_forward_pre_hook(lambda *_: fired.append("pre"))
    net[2].register_forward_hook(lambda *_: fired.append("post"))
    for plan, parts in [
        (make_plan(A), 1),
        (make_plan(A, B), 2),
        (make_plan({"0": A, "2": B}), 1),
        (make_plan({"0": A, "2": B}, microbatches=3), 3),
    ]:
        fired.clear()
        with build_executor(net, plan, cluster) as executor:
            executor(torch.ones(6, 8))
        assert sorted(fired) == sorted(["root", "pre", "post"] * parts)


def test_modules_run_on_their_device_and_glue_in_the_caller(cluster, make_plan):
    class Spy(nn.Linear):
        def forward(self, x):
            where.append(threading.current_thread().name)
            return super().forward(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Spy(2, 2), Spy(2, 2)

        def forward(self, x):
            where.append(threading.current_thread().name)
            return self.b(self.a(x))

    where = []
    net = Net()
    here = threading.current_thread().name
    with build_executor(net, make_plan({"a": A, "b": B}), cluster) as executor:
        executor(torch.ones(2, 2))
        assert where == [here, A, B]
        where.clear()
        net(torch.ones(2, 2))
        assert where == [here] * 3, "calls from outside the executor stay where they are"
        assert set(executor.busy_ms()) == {A, B}
    where.clear()
    with build_executor(net, make_plan(A, B), cluster) as executor:
        executor(torch.ones(2, 2))
    assert sorted(where) == [A] * 3 + [B] * 3


def test_further_calls_of_a_module_go_where_the_plan_says(cluster, make_plan):
    where = []

    class Shared(nn.Linear):
        def forward(self, x):
            where.append(threading.current_thread().name)
            return super().forward(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = Shared(2, 2)

        def forward(self, x):
            return self.lin(self.lin(x))

    with build_executor(Net(), make_plan({"lin": A, "lin#1": B}), cluster) as executor:
        executor(torch.ones(2, 2))
        executor(torch.ones(2, 2))
    assert where == [A, B, A, B]


def test_several_threads_may_call_at_once(cluster, make_plan):
    net = mlp().eval()
    inputs = [torch.randn(4, 8) for _ in range(4)]
    for plan in (make_plan(A, B), make_plan({"0": A, "1": A, "2": B}, microbatches=2)):
        results = [None] * 4
        with build_executor(net, plan, cluster) as executor:

            def call(i, executor=executor, results=results):
                for _ in range(5):
                    results[i] = executor(inputs[i])

            threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for x, y in zip(inputs, results, strict=True):
            torch.testing.assert_close(y, net(x))


def test_two_executors_share_a_model(cluster, make_plan):
    net, x = mlp(), torch.randn(4, 8)
    first = build_executor(net, make_plan({"0": A, "2": B}), cluster)
    second = build_executor(net, make_plan({"0": B, "2": A}), cluster)
    first.close()
    torch.testing.assert_close(second(x), net(x))
    assert "forward" in vars(net[0])
    second.close()
    assert "forward" not in vars(net[0])


def test_precision_and_threads(cluster, make_plan):
    net = mlp()
    for plan in (make_plan(A, precision="bfloat16"), make_plan(A, B, precision="bfloat16")):
        with build_executor(net, plan, cluster) as executor:
            assert executor(torch.ones(4, 8)).dtype == torch.bfloat16
    with build_executor(net, Plan.plain().with_(precision="bfloat16"), cluster) as executor:
        assert executor(torch.ones(4, 8)).dtype == torch.bfloat16
    seen = []
    net.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    with build_executor(net, make_plan(A, threads={A: 3}), cluster) as executor:
        executor(torch.ones(4, 8))
        busy = executor.busy_ms()
    assert seen == [3]
    assert busy[A] > 0 and busy[B] == busy[A], "a wide worker keeps every group busy"


def test_dropout_draws_other_numbers_in_every_part_and_call(cluster, make_plan):
    net = nn.Dropout(0.5)
    x = torch.ones(2, 4000)
    with build_executor(net, make_plan(A, B), cluster) as executor:
        first, second = executor(x), executor(x)
    for y in (first[0], first[1], second[0]):
        assert 0.4 < (y == 0).float().mean() < 0.6
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)


def test_an_interrupt_leaves_the_executor_usable(cluster, make_plan):
    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(float(x.sum()))
            return x

    def interrupt(*_):
        raise KeyboardInterrupt

    net = nn.Sequential(Slow(), nn.Identity())
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for plan in (make_plan(A), make_plan(A, B), make_plan({"0": A, "1": B}, microbatches=2)):
            with build_executor(net, plan, cluster) as executor:
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(KeyboardInterrupt):
                    executor(torch.full((2, 1), 0.15))
                assert torch.equal(executor(torch.zeros(2, 1)), torch.zeros(2, 1))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_compiled_plans_go_through_torch_compile_once_per_module(cluster, make_plan, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda fn, **_: compiled.append(fn) or fn)
    x = torch.randn(4, 8)
    for plan, count in [
        (make_plan(A, B, compiled=True), 1),
        (make_plan({"0": A, "1": A, "2": B}, compiled=True, microbatches=2), 3),
        (make_plan({"0": A, "1": A, "2": B}, compiled=True), 3),
    ]:
        net = mlp()
        compiled.clear()
        for _ in range(2):  # an executor that is built again finds what the first had compiled
            with build_executor(net, plan, cluster) as executor:
                for _ in range(2):
                    torch.testing.assert_close(executor(x), net(x))
        assert len(compiled) == count


def test_outputs_with_a_row_per_token(make_plan, compare):
    class PerToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return {"rows": self.second(self.first(x)).flatten(0, 1), "samples": x.sum(1)}

    weights = torch.arange(10.0).reshape(10, 1)
    for plan in plans(make_plan, {"first": A, "second": B}):
        compare(PerToken(), plan, [torch.randn(5, 2, 3)], pick=lambda y: (y["rows"] * weights).sum())


@pytest.mark.parametrize("plan", [(A,), (A, B), ({"transformer.h.0": A, "transformer.h.1": B},)])
def test_caches_among_the_outputs_are_merged(cluster, make_plan, plan):
    config = GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=8)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 16, (4, 5))
    expected = model(input_ids=ids)
    with build_executor(model, make_plan(*plan, microbatches=2), cluster) as executor:
        output = executor(input_ids=ids)
    assert type(output.past_key_values) is type(expected.past_key_values)
    for got, plain in zip(output.past_key_values.layers, expected.past_key_values.layers, strict=True):
        torch.testing.assert_close((got.keys, got.values), (plain.keys, plain.values))
    token = ids[:, :1]
    torch.testing.assert_close(
        model(input_ids=token, past_key_values=output.past_key_values).logits,
        model(input_ids=token, past_key_values=expected.past_key_values).logits,
    )


def test_a_cache_among_the_inputs_is_never_split(cluster, make_plan):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()
    ids = torch.randint(0, 16, (4, 3))
    cache, expected = DynamicCache(), model(input_ids=ids)
    split = build_executor(model, make_plan(A, B), cluster)
    with split, pytest.raises(ExecutionError, match="DynamicCache cannot be split"):
        split(input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == 0, "no part has touched it"
    with build_executor(model, make_plan(A), cluster) as executor:
        output = executor(input_ids=ids, past_key_values=cache)
    assert output.past_key_values is cache and cache.get_seq_length() == 3
    torch.testing.assert_close(cache.layers[0].keys, expected.past_key_values.layers[0].keys)


def test_a_timeline_shows_what_ran_on_each_device(cluster, make_plan):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with build_executor(model, make_plan({"0": A, "1": B}, microbatches=2), cluster) as executor:
        executor(torch.randn(4, 4)).sum().backward()
        spans = executor.timeline()
        assert executor.timeline() == ()
    labels = [(s.resource, s.label) for s in spans]
    assert sorted(labels) == sorted([(A, "0"), (A, "0 backward"), (B, "1"), (B, "1 backward")] * 2)
    assert spans[0].start_ms == 0.0 and all(s.end_ms >= s.start_ms for s in spans)


class Slow(nn.Module):
    """Takes a while, as a layer does."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        time.sleep(0.01)
        return x * self.scale


def test_parts_follow_each_other_through_the_stages(cluster, make_plan):
    model = nn.Sequential(Slow(), Slow(), Slow(), Slow())
    plan = make_plan({"0": A, "1": A, "2": B, "3": B}, microbatches=3)
    with build_executor(model, plan, cluster) as executor:
        executor(torch.ones(3, 1)).sum().backward()
        spans = executor.timeline()
    on = {device: [s.label for s in spans if s.resource == device] for device in (A, B)}
    assert on[A] == ["0", "1"] * 3 + ["1 backward", "0 backward"] * 3
    assert on[B] == ["2", "3"] * 3 + ["3 backward", "2 backward"] * 3
    assert model[0].scale.grad == 3 * 8


def test_a_part_that_fails_gives_its_turn_up(cluster, make_plan):
    class Picky(nn.Module):
        def forward(self, x):
            if (x == 0).any():
                raise ValueError("no zeros")
            return x

    model = nn.Sequential(Picky(), nn.Identity(), nn.Linear(1, 1))
    with build_executor(model, make_plan({"0": A, "1": A, "2": B}, microbatches=3), cluster) as executor:
        with pytest.raises(ValueError, match="no zeros"):
            executor(torch.tensor([[0.0], [1.0], [2.0]]))
        assert executor(torch.ones(3, 1)).shape == (3, 1)


@pytest.mark.parametrize("replicas", [(A,), (A, B), ({"0": A, "1": B},)])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_modes_of_the_caller_hold_in_the_workers(cluster, make_plan, replicas, microbatches):
    class Modes(nn.Linear):
        def forward(self, x):
            seen.append(
                (
                    torch.is_grad_enabled(),
                    torch.is_inference_mode_enabled(),
                    torch.is_autocast_enabled("cpu"),
                    torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
                )
            )
            return super().forward(x)

    seen = []
    net = nn.Sequential(Modes(4, 4), Modes(4, 4))
    with build_executor(net, make_plan(*replicas, microbatches=microbatches), cluster) as executor:
        for context, modes, dtype in [
            (torch.no_grad(), (False, False, False, None), torch.float32),
            (torch.inference_mode(), (False, True, False, None), torch.float32),
            (torch.autocast("cpu", dtype=torch.bfloat16), (True, False, True, torch.bfloat16), torch.bfloat16),
            (torch.autocast("cpu", dtype=torch.float16), (True, False, True, torch.float16), torch.float16),
        ]:
            seen.clear()
            with context:
                y = executor(torch.ones(4, 4))
            assert set(seen) == {modes}
            assert y.dtype == dtype and y.requires_grad == modes[0] and y.is_inference() == modes[1]
            if y.requires_grad:
                y.float().sum().backward()


class Checkpointed(nn.Module):
    """A layer whose activations are computed again in the backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.reentrant = reentrant
        self.calls = 0

    def inner(self, x):
        self.calls += 1
        return torch.tanh(self.lin(x))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


CHECKPOINTED = [((A,), 1), ((A,), 2), ((A, B), 1), (({"0": A, "1": B},), 1), (({"0": A, "1": B},), 2)]


@pytest.mark.parametrize(("replicas", "microbatches"), CHECKPOINTED)
def test_checkpointed_layers_give_plain_gradients(make_plan, compare, replicas, microbatches):
    net = nn.Sequential(Checkpointed(False), Checkpointed(False))
    compare(net, make_plan(*replicas, microbatches=microbatches), [torch.randn(6, 4)])
    assert all(module.calls >= 4 for module in net), "two forwards with gradients, each computed again"


@pytest.mark.parametrize(("replicas", "microbatches"), CHECKPOINTED)
def test_reentrant_checkpoints_are_plain_inline_and_refused_by_workers(
    cluster, make_plan, compare, replicas, microbatches
):
    net = nn.Sequential(Checkpointed(True), Checkpointed(True))
    plan = make_plan(*replicas, microbatches=microbatches)
    if plan.shape == "single" and microbatches == 1:
        compare(net, plan, [torch.randn(6, 4)])
        return
    with build_executor(net, plan, cluster) as executor:
        loss = executor(torch.randn(6, 4, requires_grad=True)).sum()
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            loss.backward()
        assert all(p.grad is None for p in net.parameters())
