import pytest
import torch
from torch import nn

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
