"""Odd models and inputs have a defined answer: plain PyTorch with a reason, or the plain model's own error."""

from __future__ import annotations

import warnings

import pytest
import torch

from autoplace import OptimizedParallel, Plan
from autoplace.errors import InputError, PolicyError


@pytest.mark.parametrize("shape", ["single", "replicas", "stages"])
def test_a_model_on_the_meta_device_runs_plain_until_it_is_real(wrap, net, shape):
    wrapper = wrap(net.to("meta"), shape)
    with pytest.warns(UserWarning, match="the model is on the meta device"):
        assert wrapper(torch.randn(8, 8, device="meta")).device.type == "meta"
    assert wrapper.plan is None
    wrapper.to_empty(device="cpu")
    wrapper.load_state_dict({k: torch.randn_like(v) for k, v in net.state_dict().items()})
    x = torch.randn(8, 8)
    torch.testing.assert_close(wrapper(x), net(x))
    assert wrapper.plan.shape == shape


def test_real_inputs_to_a_meta_model_raise_the_models_own_error(tunes, net):
    wrapper = tunes(net.to("meta"))
    with pytest.warns(UserWarning, match="meta device"), pytest.raises(Exception, match=r"(?i)meta|device"):
        wrapper(torch.randn(8, 8))


class Bare(torch.nn.Module):
    def forward(self, x):
        return x.cumsum(-1) * 2


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shape", ["single", "replicas"])
def test_a_model_without_parameters_runs(wrap, shape, train):
    model = Bare().train(train)
    wrapper, x = wrap(model, shape), torch.randn(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.testing.assert_close(wrapper(x), model(x))
    y = torch.randn(8, 8, requires_grad=True)
    wrapper(y).sum().backward()
    torch.testing.assert_close(y.grad, torch.autograd.grad(model(y).sum(), y)[0])


def test_a_model_without_gradients_in_training_says_why_it_stays_plain(tunes):
    wrapper = tunes(Bare().train())
    with pytest.warns(UserWarning, match="planning failed"):
        wrapper(torch.randn(8, 8))
    assert wrapper.plan.is_plain


class Nan(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x)) / 0.0 * 0.0


@pytest.mark.parametrize("shape", ["single", "replicas", "stages"])
def test_nan_outputs_of_plain_pytorch_leave_nothing_to_compare_with(wrap, shape):
    model = Nan().eval()
    wrapper, x = wrap(model, shape), torch.randn(8, 8)
    with pytest.warns(UserWarning, match="plain PyTorch's own output holds NaN"):
        assert torch.isnan(wrapper(x)).all()
    assert wrapper.plan.is_plain


def test_nan_outputs_while_tuning_keep_plain_pytorch(tunes):
    wrapper = tunes(Nan().eval())
    with torch.no_grad():
        assert torch.isnan(wrapper(torch.randn(8, 8))).all()
    assert wrapper.plan.is_plain
    reasons = {c.verdict for c in wrapper._state.results[-1].candidates if c.measured is not None and not c.kept}
    assert any("NaN" in reason for reason in reasons)


@pytest.mark.parametrize("shape", ["single", "replicas", "stages", "pipeline"])
def test_an_empty_batch_runs_and_is_nothing_to_plan_for(wrap, net, shape):
    wrapper = wrap(net, shape)
    with pytest.warns(UserWarning, match="an empty batch is nothing to plan for"):
        assert wrapper(torch.randn(0, 8)).shape == (0, 4)
    assert wrapper.plan is None
    wrapper(torch.randn(8, 8))
    assert not wrapper.plan.is_plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wrapper(torch.randn(0, 8)).shape == (0, 4)


def test_a_batch_of_one_with_two_replicas_runs_on_one_of_them(wrap, net, same_step, strict):
    wrapper = wrap(net, "replicas")
    same_step(wrapper, torch.randn(1, 8))
    same_step(wrapper, torch.randn(8, 8))
    assert wrapper.plan.shape == "replicas"


def test_a_lazy_model_is_made_by_its_first_call_and_planned_by_its_second(tunes):
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.ReLU()).eval()
    wrapper, x = tunes(model), torch.randn(8, 8)
    with torch.no_grad():
        assert wrapper(x).shape == (8, 4) and wrapper.plan is None
        wrapper(x)
    assert wrapper.plan is not None


def test_wrong_options_are_one_sentence(net, tmp_path):
    for options, words in (
        ({"precision": "int4"}, "precision is 'int4'; use 'float32' or 'auto'"),
        ({"compile": "maybe"}, "compile is 'maybe'"),
        ({"replan": "always"}, "replan is 'always'"),
        ({"budget_s": 0.0}, "use more than 0"),
    ):
        with pytest.raises(InputError, match=words):
            OptimizedParallel(net, **options)
    with pytest.raises(PolicyError):
        OptimizedParallel(net, policy="nowhere", track=False, cache=False, budget_s=1.0)(torch.randn(2, 8))
    with pytest.raises(InputError, match="objective 'speed' is unknown"):
        OptimizedParallel(net, plan=Plan.plain()).tune(torch.randn(2, 8), objective="speed")
