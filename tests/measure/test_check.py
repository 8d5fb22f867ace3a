import threading

import pytest
import torch
from torch import nn

from autoplace.errors import ExecutionError
from autoplace.measure import CheckConfig, Reference, check_plan
from autoplace.measure.preserve import no_dropout
from autoplace.plan import Plan
from autoplace.runtime import Identity, build_executor
from autoplace.workload import Workload

A, B = "host0/cpu:0", "host0/cpu:1"


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def workload(model, training=True, batch=6, **fields):
    return Workload(model=model, args=(torch.randn(batch, 4),), training=training, **fields)


class Wrong(Identity):
    """Calls the model and spoils something."""

    def __init__(self, model, cluster, spoil, plan=None):
        super().__init__(model, plan or Plan.plain(), cluster)
        self.spoil = spoil

    def __call__(self, *args, **kwargs):
        return self.spoil(self.model(*args, **kwargs))


@pytest.mark.parametrize("training", [False, True])
def test_right_plans_pass(cluster, make_plan, training):
    work = workload(mlp(), training)
    reference = Reference(work)
    assert not reference.noisy
    for plan in (
        Plan.plain(),
        make_plan(A),
        make_plan(A, B),
        make_plan({"0": A, "1": A, "2": B}, microbatches=3),
    ):
        with build_executor(work.model, plan, cluster) as executor:
            report = check_plan(work, executor, reference=reference)
        assert report.ok, report.reason
        assert report.max_output_error < 1e-5 and report.max_gradient_error < 1e-5


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda y: y * 1.001, "output 0 differs"),
        (lambda y: y.double(), "torch.float64"),
        (lambda y: y[:-1], "shape"),
        (lambda y: (y,), "structure"),
        (lambda y: y + torch.nan, "output 0 differs"),
        (lambda y: y.detach().requires_grad_(), "gradient of '0.weight' is missing"),
        (lambda y: 1.001 * y - 0.001 * y.detach(), "the gradient of"),
    ],
)
def test_wrong_executors_are_caught(cluster, spoil, words):
    work = workload(mlp())
    report = check_plan(work, Wrong(work.model, cluster, spoil))
    assert not report.ok
    assert words in report.reason


def test_a_gradient_that_should_not_be_there_is_caught(cluster):
    model = mlp()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    work = workload(model)
    report = check_plan(work, Wrong(model, cluster, lambda y: y + 0 * model.unused.weight.sum()))
    assert "gradient of 'unused.weight' is there" in report.reason


def test_lower_precision_has_its_own_tolerance(cluster, make_plan):
    work = workload(mlp())
    with build_executor(work.model, make_plan(A, precision="bfloat16"), cluster) as executor:
        assert check_plan(work, executor).ok
    spoiled = Wrong(work.model, cluster, lambda y: 1.2 * y, make_plan(A, precision="bfloat16"))
    assert not check_plan(work, spoiled).ok
    config = CheckConfig()
    assert config.rtol(torch.float64) < config.rtol(torch.float32) < config.rtol(torch.bfloat16)
    assert config.rtol(torch.float32, "bfloat16") == config.rtol_bfloat16


def test_batch_norm_over_parts_is_caught(cluster, make_plan):
    class Conv(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    work = workload(Conv(), training=True, batch=12)
    for plan in (make_plan(A, B), make_plan({"0": A, "1": B, "2": A}, microbatches=2)):
        with build_executor(work.model, plan, cluster) as executor:
            report = check_plan(work, executor)
        assert not report.ok and "differs from plain" in report.reason
    with build_executor(work.model, make_plan({"0": A, "1": B, "2": A}), cluster) as executor:
        assert check_plan(work, executor).ok, "one part computes the same"
    evaluation = workload(work.model, training=False)
    with build_executor(work.model, make_plan(A, B), cluster) as executor:
        assert check_plan(evaluation, executor).ok


def test_wrong_buffers_are_caught(cluster):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    work = workload(model)

    def spoil(y):
        model[1].running_mean.data.add_(1.0)
        return y

    report = check_plan(work, Wrong(model, cluster, spoil))
    assert "buffer '1.running_mean'" in report.reason


def test_nan_in_plain_pytorch_is_said(cluster):
    work = Workload(model=mlp(), args=(torch.full((2, 4), torch.nan),))
    report = check_plan(work, Identity(work.model, Plan.plain(), cluster))
    assert not report.ok and "plain PyTorch's own output holds NaN" in report.reason


def test_infinities_at_the_same_places_are_equal(cluster, make_plan):
    class Masked(nn.Module):
        def forward(self, x):
            return x.masked_fill(x < 0, -torch.inf)

    work = workload(Masked(), training=False)
    with build_executor(work.model, make_plan(A, B), cluster) as executor:
        assert check_plan(work, executor).ok
    assert not check_plan(work, Wrong(work.model, cluster, lambda y: -y)).ok


def test_noise_in_the_model_is_named(cluster, make_plan):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    work = workload(Noisy(), training=False)
    assert Reference(work).noisy
    with build_executor(work.model, make_plan(A, B), cluster) as executor:
        report = check_plan(work, executor)
    assert not report.ok and "random numbers besides dropout" in report.reason
    with build_executor(work.model, make_plan(A), cluster) as executor:
        assert check_plan(work, executor).ok, "one part draws the same numbers"


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.drop, self.norm = nn.Linear(4, 4), nn.Dropout(0.3), nn.BatchNorm1d(4)
        self.attention_dropout = 0.5
        self.gamma = 0.25

    def forward(self, x):
        x = nn.functional.dropout(self.lin(x), self.attention_dropout, self.training)
        return self.norm(self.drop(x)) * self.gamma


def test_dropout_is_off_meanwhile_and_the_model_is_left_as_it_was(cluster, make_plan):
    model = Dropping()
    work = workload(model, batch=8)
    model.eval()
    model.drop.train()
    grad = model.lin.weight.grad = torch.ones(4, 4)
    kept = grad.clone()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    with build_executor(model, make_plan({"lin": A, "drop": B, "norm": B}), cluster) as executor:
        report = check_plan(work, executor)
        assert report.ok, report.reason
        broken = Wrong(model, cluster, lambda y: y.no_such_thing)
        with pytest.raises(AttributeError):
            check_plan(work, broken)
    assert (model.drop.p, model.attention_dropout, model.gamma) == (0.3, 0.5, 0.25)
    assert (model.training, model.drop.training, model.norm.training) == (False, True, False)
    assert model.lin.weight.grad is grad and torch.equal(grad, kept)
    assert model.lin.bias.grad is None
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_no_dropout_reaches_configs():
    class Config:
        def __init__(self):
            self.attn_pdrop, self.size = 0.1, 0.5

    model = nn.Module()
    model.config = Config()
    with no_dropout(model):
        assert (model.config.attn_pdrop, model.config.size) == (0.0, 0.5)
    assert model.config.attn_pdrop == 0.1


class OnCopies(Identity):
    """Runs on a copy of the weights that it makes once."""

    def __init__(self, model, cluster):
        super().__init__(model, Plan.plain(), cluster)
        self.copies = {name: p.detach().clone() for name, p in model.named_parameters()}

    def __call__(self, *args, **kwargs):
        stale = {
            name: c + (p - p.detach())
            for (name, p), c in zip(self.model.named_parameters(), self.copies.values(), strict=True)
        }
        return torch.func.functional_call(self.model, stale, args, kwargs)


def test_weights_that_nobody_refreshes_are_caught_by_the_optimizer_step(cluster):
    work = workload(mlp())
    report = check_plan(work, OnCopies(work.model, cluster))
    assert not report.ok and report.reason.endswith("after an optimizer step")
    assert "output 0 differs" in report.reason
    blind = CheckConfig(step_size=0.0)
    assert check_plan(work, OnCopies(work.model, cluster), config=blind).ok, "nothing else tells it"


def test_the_step_is_what_plain_gradient_descent_makes(cluster, make_plan):
    work = workload(mlp())
    values = {name: p.detach().clone() for name, p in work.model.named_parameters()}
    reference = Reference(work)
    grads = reference.run.grads
    largest = max(float(g.abs().max()) for g in grads.values())
    assert reference.learning_rate * largest == pytest.approx(0.01 * max(float(v.abs().max()) for v in values.values()))
    for name, stepped in reference.after_step.stepped.items():
        torch.testing.assert_close(stepped, values[name] - reference.learning_rate * grads[name])
        assert not torch.equal(stepped, values[name])
    assert Reference(workload(mlp(), training=False)).after_step is None


def test_parameters_and_the_graphs_over_them_outlive_the_step(cluster, make_plan):
    work = workload(mlp())
    values = {name: p.detach().clone() for name, p in work.model.named_parameters()}
    pending = work.model(torch.randn(3, 4)).sum()
    versions = [p._version for p in work.model.parameters()]
    with build_executor(work.model, make_plan(A, B), cluster) as executor:
        assert check_plan(work, executor).ok
    assert versions == [p._version for p in work.model.parameters()]
    assert all(torch.equal(p, values[name]) for name, p in work.model.named_parameters())
    pending.backward()
    assert all(p.grad is not None for p in work.model.parameters())


def test_parameters_are_put_back_when_the_pass_after_the_step_hangs(cluster):
    goes_on = threading.Event()

    class Hangs(Identity):
        calls = 0

        def __call__(self, *args, **kwargs):
            self.calls += 1
            if self.calls == 2:
                goes_on.wait(10.0)
            return self.model(*args, **kwargs)

    work = workload(mlp())
    values = {name: p.detach().clone() for name, p in work.model.named_parameters()}
    with pytest.raises(ExecutionError, match="did not finish"):
        check_plan(work, Hangs(work.model, Plan.plain(), cluster), limit_s=0.3)
    goes_on.set()
    assert all(torch.equal(p, values[name]) for name, p in work.model.named_parameters())


def test_outputs_of_other_types_and_outputs_that_are_inputs(cluster):
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            y = self.lin(x)
            return {"y": y, "best": y.argmax(1), "positive": y > 0, "x": x, "first": x[:2], "n": len(x), "none": None}

    work = workload(Many())
    assert check_plan(work, Identity(work.model, Plan.plain(), cluster)).ok
    for key, words in (("best", "output 1"), ("positive", "output 2")):
        wrong = Wrong(
            work.model,
            cluster,
            lambda y, key=key: {**y, key: 1 - y[key].long()} if key == "best" else {**y, key: ~y[key]},
        )
        assert words in check_plan(work, wrong).reason


def test_inputs_that_the_model_writes_into_and_their_gradients(cluster):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x, y):
            x += 1.0
            return self.lin(x) * y

    x, y = torch.zeros(3, 4), torch.randn(3, 4, requires_grad=True)
    work = Workload(model=Writes(), args=(x, y), training=True)
    assert check_plan(work, Identity(work.model, Plan.plain(), cluster)).ok
    assert bool((x == 0).all()) and y.grad is None
    wrong = Wrong(work.model, cluster, lambda z: z)
    wrong.model = lambda x, y: work.model(x, y.detach())
    assert "gradient of 'input 1' is missing" in check_plan(work, wrong).reason


def test_nan_in_plain_gradients_is_said(cluster):
    work = workload(nn.Linear(4, 3), loss=lambda y: (y - y).sum().sqrt())
    assert "own gradient of 'weight' holds NaN" in check_plan(work, Identity(work.model, Plan.plain(), cluster)).reason


class Kinked(nn.Module):
    """ReLU after batch normalisation, many times: rounding moves entries over zero, and with them the gradients."""

    def __init__(self, depth=10, width=24):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else width, width, 3, padding=1) for i in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))
        self.last = nn.Linear(width, width, bias=False)

    def forward(self, x, tie=True):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.relu(norm(layer(x)))
        x = self.last(x.mean((2, 3)))
        return nn.functional.linear(torch.relu(x), self.last.weight if tie else self.last.weight.detach())


def kinked_workload():
    torch.manual_seed(0)
    return Workload(model=Kinked(), args=(torch.randn(8, 3, 16, 16),), training=True)


class OtherRounding(Identity):
    """Computes the same thing with other kernels, as far as rounding goes."""

    def __call__(self, *args, **kwargs):
        random = torch.Generator().manual_seed(99)
        moved = {
            name: p * (1 + 4 * torch.finfo(p.dtype).eps * torch.randn(p.shape, generator=random))
            for name, p in self.model.named_parameters()
        }
        return torch.func.functional_call(self.model, moved, args, kwargs)


def test_gradients_may_differ_as_far_as_rounding_moves_plain_pytorchs_own(cluster):
    work = kinked_workload()
    values = [p.detach().clone() for p in work.model.parameters()]
    versions = [p._version for p in work.model.parameters()]
    executor = OtherRounding(work.model, Plan.plain(), cluster)
    strict = check_plan(work, executor, config=CheckConfig(rounding_factor=0.0))
    assert not strict.ok and "the gradient of" in strict.reason
    reference = Reference(work)
    report = check_plan(work, executor, reference=reference)
    assert report.ok, report.reason
    assert report.max_gradient_error > CheckConfig().rtol_float32
    assert reference.rounding()[0].output_error == 0.0 < reference.rounding()[0].gradient_error
    assert all(torch.equal(p, v) for p, v in zip(work.model.parameters(), values, strict=True))
    assert [p._version for p in work.model.parameters()] == versions


class WithoutATie(Identity):
    def __call__(self, *args, **kwargs):
        return self.model(*args, tie=False, **kwargs)


class HalfTheBatch(Identity):
    """Loses the gradients of the batch's second half."""

    def __call__(self, x):
        output = self.model(x)
        return torch.cat([output[: len(x) // 2], output[len(x) // 2 :].detach()])


@pytest.mark.parametrize("wrong", [WithoutATie, HalfTheBatch])
def test_wrong_gradients_are_caught_however_much_rounding_moves_them(cluster, wrong):
    work = kinked_workload()
    report = check_plan(work, wrong(work.model, Plan.plain(), cluster))
    assert not report.ok and "the gradient of" in report.reason


@pytest.mark.parametrize("share", [1.2, 0.8])
def test_wrong_factors_are_caught_however_much_rounding_moves_gradients(cluster, share):
    work = kinked_workload()
    spoiled = Wrong(work.model, cluster, lambda y: share * y + (1 - share) * y.detach())
    report = check_plan(work, spoiled)
    assert not report.ok and "the gradient of" in report.reason


def test_outputs_have_no_leave_for_rounding(cluster):
    work = kinked_workload()
    report = check_plan(work, Wrong(work.model, cluster, lambda y: 1.0005 * y))
    assert not report.ok and report.reason.startswith("output 0 differs")


def test_the_leave_for_rounding_has_a_limit():
    config = CheckConfig()
    assert config.allowed(1e-4, 0.0) == 1e-4 == config.allowed(1e-4, 2e-5)
    assert config.allowed(1e-4, 1e-3) == pytest.approx(2e-3)
    assert config.allowed(1e-4, 10.0) == config.rtol_bfloat16
    assert config.allowed(1e-9, 10.0) == pytest.approx(5e-7), "float64 has a tighter one"
    assert config.allowed(1e-4, float("nan")) == 1e-4
