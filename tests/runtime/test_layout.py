import pytest
import torch
from torch import nn

from autoplace.plan import Plan
from autoplace.runtime import build_executor
from autoplace.runtime.layout import call_channels_last, lay_out, take_back

A, B = "host0/cpu:0", "host0/cpu:1"
LAST = torch.channels_last


class Net(nn.Module):
    """Keeps whether its convolutions see channels-last tensors; gives an image and a vector."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.body = nn.Conv2d(4, 6, 3, stride=2)
        self.head = nn.Linear(6, 5)
        self.seen = []

    def forward(self, x, *, scale=None):
        self.seen.append(x.is_contiguous(memory_format=LAST))
        y = self.body(torch.relu(self.norm(self.stem(x))))
        return {"image": y if scale is None else y * scale, "vector": self.head(y.mean((2, 3)))}


def test_only_contiguous_images_are_laid_out():
    image, last = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=LAST)
    others = [
        last,
        torch.randn(2, 1, 4, 5),
        torch.randn(2, 3),
        torch.ones(2, 3, 4, 5).long(),
        image[:, :, ::2],
        3,
        None,
    ]
    values = [image, *others]
    laid = lay_out(values)
    assert len(laid) == 1 and laid[0][0] is image
    assert values[0].is_contiguous(memory_format=LAST) and torch.equal(values[0], image)
    assert all(a is b for a, b in zip(values[1:], others, strict=True))


def test_outputs_come_back_in_the_usual_order_and_inputs_as_themselves():
    x = torch.randn(2, 3, 4, 5)
    same, image, moved = call_channels_last(lambda x: (x, x * 2, x.permute(0, 2, 3, 1)), (x,), {})
    assert same is x
    assert image.is_contiguous() and torch.equal(image, x * 2)
    assert moved.is_contiguous()
    plain = object()
    assert call_channels_last(lambda _x: plain, (x,), {}) is plain


@pytest.mark.parametrize("grad", [False, True])
def test_a_change_in_place_is_the_callers(grad):
    def double(y):
        return y.mul_(2).sum()

    source = torch.randn(2, 3, 4, 5, requires_grad=grad)
    x, expected = source * 1, source * 1
    call_channels_last(double, (x,), {}).backward(retain_graph=True) if grad else call_channels_last(double, (x,), {})
    double(expected)
    assert torch.equal(x, expected)
    if grad:
        source.grad = None
        x.sum().backward()
        assert torch.equal(source.grad, torch.full_like(source, 2.0))


def test_nothing_laid_out_takes_nothing_back():
    leaf = torch.randn(2, 3, 4, 5).to(memory_format=LAST)
    leaves = [leaf]
    assert not take_back([], leaves) and leaves[0] is leaf


@pytest.mark.parametrize(
    ("replicas", "knobs"),
    [
        (None, {}),
        ([A], {}),
        ([A], {"microbatches": 2}),
        ([A, B], {}),
        ([{"stem": A, "norm": A, "body": B, "head": B}], {}),
        ([{"stem": A, "norm": A, "body": B, "head": B}], {"microbatches": 2}),
    ],
)
def test_executors_lay_images_out_and_give_plain_results(cluster, make_plan, compare, replicas, knobs):
    net = Net()
    plan = Plan.plain() if replicas is None else make_plan(*replicas, **knobs)
    strides = {name: p.stride() for name, p in net.named_parameters()}
    output = compare(
        net,
        plan.with_(channels_last=True),
        [torch.randn(4, 3, 9, 9)],
        {"scale": torch.tensor(2.0)},
        pick=lambda y: y["image"].square().mean() + y["vector"].mean(),
    )
    assert output["image"].is_contiguous()
    assert strides == {name: p.stride() for name, p in net.named_parameters()}
    net.seen.clear()
    with build_executor(net, plan.with_(channels_last=True), cluster) as executor, torch.no_grad():
        executor(torch.randn(4, 3, 9, 9))
    assert net.seen and all(net.seen)
