import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoplace.graph.op_costs import bytes_moved, is_copy, op_flops, op_kind

aten = torch.ops.aten


def meta(*shape, **options):
    return torch.empty(*shape, device="meta", **options)


CASES = [
    (aten.linear.default, (meta(3, 5, 8), meta(16, 8), meta(16)), {}),
    (aten.matmul.default, (meta(2, 3, 4, 8), meta(8, 5)), {}),
    (aten.bmm.default, (meta(2, 4, 8), meta(2, 8, 5)), {}),
    (aten.addmm.default, (meta(5), meta(4, 8), meta(8, 5)), {}),
    (aten.conv2d.default, (meta(2, 4, 8, 8), meta(6, 2, 3, 3), None, [2, 2], [1, 1], [1, 1], 2), {}),
    (aten.conv1d.default, (meta(2, 4, 8), meta(6, 4, 3)), {}),
    (aten.convolution.default, (meta(2, 4, 8), meta(4, 6, 3), None, [2], [0], [1], True, [0], 1), {}),
    (aten.scaled_dot_product_attention.default, (meta(2, 4, 6, 8), meta(2, 4, 7, 8), meta(2, 4, 7, 8)), {}),
    (aten.einsum.default, ("bik,bkj->bij", [meta(2, 3, 4), meta(2, 4, 5)]), {}),
]


@pytest.mark.parametrize(("op", "args", "kwargs"), CASES, ids=[str(c[0]) for c in CASES])
def test_flops_equal_the_flop_counters(op, args, kwargs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = op(*args, **kwargs)
    assert op_flops(op, args, kwargs, out, {}) == counter.get_total_flops() > 0


def test_recurrent_layers_use_every_weight_once_a_step():
    lstm = torch.nn.LSTM(3, 5, batch_first=True)
    steps, weights = 2 * 7, sum(p.numel() for p in lstm.parameters() if p.dim() == 2)
    args = (meta(2, 7, 3), [meta(1, 2, 5)] * 2, [p.to("meta") for p in lstm.parameters()], True, 1, 0.0, False, False)
    assert op_flops(aten.lstm.input, args, {}, (meta(2, 7, 5),), {}) == 2 * steps * weights


def test_elementwise_ops_count_outputs_reductions_inputs_and_moves_nothing():
    x = meta(4, 8)
    assert op_flops(aten.gelu.default, (x,), {}, x, {}) == 32
    assert op_flops(aten.sum.dim_IntList, (x, [1]), {}, meta(4), {}) == 32
    assert op_flops(aten.cat.default, ([x, x],), {}, meta(8, 8), {}) == 0


def test_composite_results_are_kept():
    cache = {}
    args = ("ij,jk->ik", [meta(2, 3), meta(3, 4)])
    first = op_flops(aten.einsum.default, args, {}, meta(2, 4), cache)
    assert len(cache) == 1 and op_flops(aten.einsum.default, args, {}, meta(2, 4), cache) == first == 48


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        (aten._scaled_dot_product_flash_attention_for_cpu.default, "scaled_dot_product_attention"),
        (aten.native_layer_norm.default, "layer_norm"),
        (aten.add_.Tensor, "add"),
        (aten.conv2d.default, "conv"),
    ],
)
def test_kinds_are_simplified(op, kind):
    assert op_kind(op) == kind


def test_a_gather_moves_only_the_rows_it_takes():
    assert bytes_moved("embedding", [meta(1000, 8), meta(2, dtype=torch.int64)], [meta(2, 8)]) == 64 + 64 + 16
    assert bytes_moved("empty_like", [meta(8)], [meta(8)]) == 0


def test_reshape_copies_only_what_cannot_be_viewed():
    x = meta(4, 8)
    assert not is_copy(aten.reshape.default, (x, [32]), meta(32))
    assert is_copy(aten.reshape.default, (x.t(), [32]), meta(32))
    assert is_copy(aten.to.dtype, (x, torch.float64), meta(4, 8, dtype=torch.float64))
    assert not is_copy(aten.view.default, (x, [32]), meta(32))
