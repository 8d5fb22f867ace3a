import gc
import os
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from autoplace.errors import ExecutionError
from autoplace.hardware.cluster import Cluster, Device, Link
from autoplace.plan import Plan, Replica
from autoplace.runtime import DeviceWorker, build_executor
from autoplace.runtime.processes import ProcessReplicas

HERE = Path(__file__).parent
A, B = "host0/cpu:0", "host0/cpu:1"


@pytest.fixture(scope="module")
def models():
    sys.path.insert(0, str(HERE))
    import remote_models

    yield remote_models
    sys.path.remove(str(HERE))


def processes_plan(*shares, **knobs):
    replicas = tuple(Replica(assignment={".": d}, share=s) for d, s in zip((A, B), shares, strict=True))
    return Plan(replicas=replicas, strategy="test", engine="processes", **knobs)


@pytest.fixture(scope="module")
def two_cores():
    cores = sorted(os.sched_getaffinity(0))
    return Cluster(
        devices=(
            Device(name=A, kind="cpu", cores=(cores[0],)),
            Device(name=B, kind="cpu", cores=(cores[-1],)),
            Device(name="host0/cuda:0", kind="cuda"),
        ),
        default_link=Link(latency_ms=0.0, bytes_per_ms=1e9),
    )


@pytest.fixture(scope="module")
def shared(models, two_cores):
    """One model and executor for many tests; uneven shares."""
    torch.manual_seed(0)
    model = models.Many().eval()
    with ProcessReplicas(model, processes_plan(0.7, 0.3), two_cores) as executor:
        yield model, executor


@pytest.fixture
def both(shared):
    """The shared pair, without gradients and in evaluation mode."""
    model, executor = shared
    model.zero_grad(set_to_none=True)
    yield model, executor
    model.eval().requires_grad_(True)
    model.zero_grad(set_to_none=True)


def ids(batch=6):
    return torch.arange(batch * 4).reshape(batch, 4) % 9


def gradients(call, model, x, **kwargs):
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    output = call(ids(len(x)), x, **kwargs)
    (
        output.hidden.square().mean() + output.scores.sin().mean() + (output.loss if output.loss is not None else 0)
    ).backward()
    found = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    model.zero_grad(set_to_none=True)
    return output, found


def assert_same(got, expected):
    output, grads = got
    plain, plain_grads = expected
    assert type(output) is type(plain) and output.note == plain.note
    for name in ("hidden", "scores", "loss"):
        torch.testing.assert_close(getattr(output, name), getattr(plain, name))
    assert grads.keys() == plain_grads.keys()
    for name, grad in plain_grads.items():
        torch.testing.assert_close(grads[name], grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("batch", [6, 10, 2])
def test_outputs_and_gradients_are_those_of_plain_pytorch(both, batch):
    model, executor = both
    x = torch.randn(batch, 4, 8)
    got = gradients(executor, model, x, labels=ids(batch), note="yes")
    assert_same(got, gradients(model, model, x, labels=ids(batch), note="yes"))
    assert got[1]["unused.weight"] is None and got[1]["embed.weight"] is not None
    with torch.no_grad():
        torch.testing.assert_close(executor(ids(batch)).scores, model(ids(batch)).scores)


@pytest.mark.parametrize("batch", [1, 0])
def test_batches_too_small_to_split_run_whole(both, batch):
    model, executor = both
    x = torch.randn(batch, 4, 8)
    assert_same(gradients(executor, model, x), gradients(model, model, x))
    with torch.no_grad():
        model.scale.mul_(2)
        executor(ids(batch))
        torch.testing.assert_close(executor(ids(6)).hidden, model(ids(6)).hidden)
        model.scale.fill_(1)


def test_parameters_are_shared_and_stay_the_same_objects(both):
    model, executor = both
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    assert model.head.weight is model.embed.weight and model.mid.weight.is_shared()
    for _ in range(3):
        optimizer.zero_grad()
        executor(ids(), labels=ids()).loss.backward()
        optimizer.step()
    assert not torch.equal(model.mid.weight, before["mid.weight"])
    with torch.no_grad():
        torch.testing.assert_close(executor(ids()).scores, model(ids()).scores)
        model.load_state_dict({**before, "head.weight": before["embed.weight"], "scale": model.scale})
        torch.testing.assert_close(executor(ids()).scores, model(ids()).scores)


def test_gradients_accumulate(both):
    model, executor = both
    for call in (executor, model):
        model.zero_grad(set_to_none=True)
        for _ in range(2):
            call(ids()).scores.square().mean().backward()
        if call is executor:
            got = model.mid.weight.grad.clone()
    torch.testing.assert_close(got, model.mid.weight.grad)


def test_several_graphs_live_at_once_in_any_order(both):
    model, executor = both
    first, second = executor(ids()).hidden.sum(), executor(ids(4)).hidden.square().sum()
    weight = model.mid.weight
    again = [torch.autograd.grad(second, weight, retain_graph=True)[0] for _ in range(2)]
    torch.testing.assert_close(again[0], again[1])
    torch.testing.assert_close(again[0], torch.autograd.grad(model(ids(4)).hidden.square().sum(), weight)[0])
    torch.testing.assert_close(
        torch.autograd.grad(first, weight)[0], torch.autograd.grad(model(ids()).hidden.sum(), weight)[0]
    )
    with pytest.raises((ExecutionError, RuntimeError), match=r"freed|second time"):
        torch.autograd.grad(first, weight)


def test_gradients_of_gradients_are_refused(both):
    model, executor = both
    with pytest.raises(ExecutionError, match="create_graph"):
        torch.autograd.grad(executor(ids()).hidden.square().sum(), model.mid.weight, create_graph=True)
    assert executor(ids()).hidden.shape == (6, 4, 8)


def test_a_graph_that_is_dropped_is_freed_there(both):
    _, executor = both
    process = executor._processes[0]
    executor(ids())
    output = executor(ids())
    process.dropped.clear()
    del output
    gc.collect()
    assert len(process.dropped) == 1
    executor(ids(2))
    assert len(process.dropped) <= 1


def test_frozen_parameters_get_no_gradient(both):
    model, executor = both
    model.mid.requires_grad_(False)
    x = torch.randn(6, 4, 8)
    got = gradients(executor, model, x)
    assert got[1]["mid.weight"] is None
    assert_same(got, gradients(model, model, x))
    model.requires_grad_(False)
    assert not executor(ids()).scores.requires_grad


def test_dropout_follows_the_module_and_the_seed(both):
    model, executor = both
    model.train()
    model.dropout.p = 0.5
    one = torch.zeros(6, 4, dtype=torch.long)
    torch.manual_seed(3)
    first, second = executor(one).hidden, executor(one).hidden
    torch.manual_seed(3)
    assert torch.equal(executor(one).hidden, first) and not torch.equal(first, second)
    rate = (torch.cat([executor(one).hidden for _ in range(20)]) == 0).float().mean(dim=(1, 2)).reshape(20, 6).mean(0)
    assert ((rate > 0.3) & (rate < 0.7)).all(), "every part drops about half"
    assert not torch.equal(first[0] == 0, first[-1] == 0)
    model.dropout.p = 1.0
    assert executor(one).hidden.abs().sum() == 0
    model.eval()
    torch.testing.assert_close(executor(one).hidden, model(one).hidden)
    model.dropout.p = 0.0


def test_a_model_that_draws_nothing_leaves_the_generator_alone(both):
    _, executor = both
    executor(ids())
    before = torch.get_rng_state()
    executor(ids())
    assert torch.equal(torch.get_rng_state(), before)


def test_buffers_follow_the_module(both):
    model, executor = both
    with torch.no_grad():
        executor(ids())
        model.scale.mul_(3)
        torch.testing.assert_close(executor(ids()).hidden, model(ids()).hidden)
        own, model.scale = model.scale, torch.full((8,), 5.0)
        torch.testing.assert_close(executor(ids()).hidden, model(ids()).hidden)
        model.scale = own
        model.scale.data.fill_(1.0)
        torch.testing.assert_close(executor(ids()).hidden, model(ids()).hidden)


def test_modes_of_the_caller_are_carried(both):
    model, executor = both
    with torch.inference_mode():
        assert executor(ids()).scores.is_inference()
    assert executor(ids()).scores.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        output, plain = executor(ids()), model(ids())
        assert output.scores.dtype == plain.scores.dtype == torch.bfloat16
        torch.testing.assert_close(output.scores, plain.scores, rtol=2e-2, atol=2e-2)


def test_exceptions_of_the_model_keep_their_type_and_bring_their_traceback(both):
    _, executor = both
    bad = ids()
    bad[-1, 0] = 12
    with pytest.raises(LookupError, match="from the model") as caught:
        executor(bad)
    assert "remote_models.py" in str(caught.value.__cause__)
    bad[-1, 0] = 11
    with pytest.raises(ExecutionError, match="Unkind: one and two"):
        executor(bad)
    bad[0, 0] = 12
    with pytest.raises(LookupError, match="from the model") as caught:
        executor(bad)
    assert caught.traceback[-1].path.name == "remote_models.py"
    assert executor(ids()).hidden.shape == (6, 4, 8)


def test_an_interrupted_pass_leaves_the_executor_usable(both):
    model, executor = both
    take = executor._processes[0].take

    def interrupt():
        raise KeyboardInterrupt

    executor._processes[0].take = interrupt
    with pytest.raises(KeyboardInterrupt):
        executor(ids(10))
    executor._processes[0].take = take
    x = torch.randn(6, 4, 8)
    assert_same(gradients(executor, model, x), gradients(model, model, x))


def test_parameters_that_are_replaced_are_noticed(both):
    model, executor = both
    own = model.mid.weight.data
    model.mid.weight.data = own.clone()
    with pytest.raises(ExecutionError, match="replaced"):
        executor(ids())
    model.mid.weight.data = own
    assert executor(ids()).hidden.shape == (6, 4, 8)
    parameter, model.mid.bias = model.mid.bias, nn.Parameter(torch.zeros(8))
    with pytest.raises(ExecutionError, match="replaced"):
        executor(ids())
    model.mid.bias = parameter
    assert executor(ids()).hidden.shape == (6, 4, 8)


def test_hooks_that_come_later_are_noticed(both):
    model, executor = both
    handle = model.mid.register_forward_hook(lambda *_: None)
    with pytest.raises(ExecutionError, match="hook"):
        executor(ids())
    handle.remove()
    assert executor(ids()).hidden.shape == (6, 4, 8)


def test_tensor_hooks_see_the_summed_gradient_once(both):
    model, executor = both
    seen = []
    handle = model.mid.weight.register_hook(lambda grad: seen.append(grad.clone()))
    executor(ids()).hidden.square().mean().backward()
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], model.mid.weight.grad)


def test_inputs_that_do_not_travel_are_refused(both):
    _, executor = both
    with pytest.raises(ExecutionError, match="split"):
        executor(ids(), note=object())
    with pytest.raises(ExecutionError, match="pickled"):
        executor(ids(), note=lambda: None)
    with pytest.raises(ExecutionError, match="sparse"):
        executor(ids(), torch.zeros(6, 4, 8).to_sparse())
    assert executor(ids()).hidden.shape == (6, 4, 8)


def test_several_threads_may_call_at_once(both):
    model, executor = both
    expected = torch.autograd.grad(model(ids()).hidden.square().sum(), model.mid.weight)[0]
    found = []

    def work():
        for _ in range(5):
            found.append(torch.autograd.grad(executor(ids()).hidden.square().sum(), model.mid.weight)[0])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for grad in found:
        torch.testing.assert_close(grad, expected)


def test_the_calling_thread_keeps_its_cores_and_threads(both):
    _, executor = both
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    executor(ids()).hidden.sum().backward()
    assert os.sched_getaffinity(0) == cores and torch.get_num_threads() == threads


def test_busy_times_and_timeline(both):
    _, executor = both
    executor.busy_ms(), executor.timeline()
    executor(ids()).hidden.sum().backward()
    busy, spans = executor.busy_ms(), executor.timeline()
    assert set(busy) == {A, B} and min(busy.values()) > 0
    labels = [(span.resource, span.label) for span in spans]
    assert sorted(labels) == sorted([(d, w) for d in (A, B) for w in ("model", "model backward")])
    assert min(s.start_ms for s in spans) >= 0 and all(s.end_ms >= s.start_ms for s in spans)
    assert max(s.end_ms for s in spans) < 60_000


def test_a_forked_child_is_refused_and_the_parent_goes_on(both):
    model, executor = both
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            executor(ids())
        except ExecutionError as error:
            code = 0 if "forked" in str(error) else 2
        finally:
            executor.close()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    x = torch.randn(6, 4, 8)
    assert_same(gradients(executor, model, x), gradients(model, model, x))


def test_gpt2_with_tied_weights_and_its_own_loss(two_cores, compare):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0)
    net = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(50, (6, 8))
    net(tokens, output_hidden_states=True)  # which leaves recorders on its modules
    kwargs = {"input_ids": tokens, "labels": tokens, "use_cache": False, "output_hidden_states": True}
    output = compare(net, processes_plan(0.5, 0.5), kwargs=kwargs, pick=lambda y: y.loss)
    assert output.loss.dim() == 0 and len(output.hidden_states) == 3
    assert net.lm_head.weight is net.transformer.wte.weight


def test_knobs_reach_every_process(models, two_cores):
    net, x = models.Picture(), torch.randn(8, 3, 6, 6, requires_grad=True)
    plan = processes_plan(0.5, 0.5, microbatches=2, channels_last=True, precision="bfloat16")
    with build_executor(net, plan, two_cores) as executor:
        output = executor(x)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), net(x), rtol=5e-2, atol=2e-2)
        got = torch.autograd.grad(output.float().square().sum(), [x, *net.parameters()])
        expected = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0.1, atol=3e-2)
        executor(torch.randn(64, 3, 40, 40)).float().sum().backward()  # larger than the memory made first
        small = executor(torch.randn(3, 3, 6, 6))
        assert small.shape == (3, 2)


def test_the_first_replica_in_a_worker_and_sparse_gradients(two_cores, monkeypatch):
    """As where it has several threads on some of the cores, which takes more cores than a test may ask for."""

    def own_place(self, seat):
        self._pin = frozenset()
        worker = DeviceWorker(seat.device, seat.threads)
        return worker, worker

    monkeypatch.setattr(ProcessReplicas, "_own_place", own_place)
    net = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    with ProcessReplicas(net, processes_plan(0.5, 0.5), two_cores) as executor:
        thread = executor._worker
        for _ in range(2):
            got = torch.autograd.grad(executor(ids()).square().sum(), list(net.parameters()))
            expected = torch.autograd.grad(net(ids()).square().sum(), list(net.parameters()))
            assert got[0].is_sparse
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a.to_dense(), b.to_dense())
    assert not thread.alive


def test_inputs_modified_in_place_are_refused(models, two_cores):
    executor = ProcessReplicas(models.InPlace(), processes_plan(0.5, 0.5), two_cores)
    with executor, pytest.raises(ExecutionError, match="in place"):
        executor(torch.zeros(4, 2))


def test_plans_that_do_not_fit_are_refused(two_cores):
    net = nn.Linear(2, 2)
    halves = (Replica(assignment={".": A}, share=0.5), Replica(assignment={".": "host0/cuda:0"}, share=0.5))
    for plan, words in [
        (Plan(replicas=halves, strategy="t", engine="processes"), "CPU core groups"),
        (processes_plan(0.5, 0.5, precision="int3"), "precision"),
        (Plan(replicas=(Replica(assignment={".": A}),), strategy="t", engine="processes"), "shape"),
    ]:
        with pytest.raises(ExecutionError, match=words):
            ProcessReplicas(net, plan, two_cores)
    assert not net.weight.is_shared()
