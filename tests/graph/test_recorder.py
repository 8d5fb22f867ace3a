import pytest
import torch
from torch import nn

from autoplace.errors import CaptureError
from autoplace.graph.recorder import Recorder


@pytest.fixture
def recorder():
    return Recorder(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))), frees=True)


def edges(graph):
    return [
        (int(p), graph.consumers[graph.consumer_offsets[t] : graph.consumer_offsets[t + 1]].tolist(), float(b))
        for t, (p, b) in enumerate(zip(graph.tensor_producer, graph.tensor_bytes, strict=True))
    ]


def test_nothing_recorded_is_an_error(recorder):
    with pytest.raises(CaptureError, match="runs no operation"):
        recorder.build()


def test_inputs_make_no_tensor(recorder):
    (out,) = recorder.op("relu", "0", reads=[recorder.source(64)], outputs=[64])
    recorder.op("relu", "1.0", reads=[out])
    assert edges(recorder.build()) == [(0, [1], 64.0)]


def test_write_in_place_becomes_the_producer(recorder):
    (out,) = recorder.op("linear", "0", reads=[], outputs=[64])
    view = recorder.view(out, 16, "")
    recorder.op("fill", "", reads=[], writes=[view])
    recorder.op("relu", "1.0", reads=[out])
    graph = recorder.build()
    assert [(p, c) for p, c, _ in edges(graph)] == [(0, [1]), (1, [2])]
    assert graph.activation_bytes.tolist() == [64, 0, 0]


def test_views_shrink_what_travels_only_on_the_producers_side(recorder):
    (out,) = recorder.op("linear", "0", reads=[], outputs=[64])
    recorder.op("relu", "1.0", reads=[recorder.view(out, 16, "")])  # taken in the root: sliced, then sent
    recorder.op("relu", "1.0", reads=[recorder.view(out, 8, "1.0")])  # taken by the reader: sent, then sliced
    assert edges(recorder.build()) == [(0, [1], 16.0), (0, [2], 64.0)]


def test_an_expanded_view_sends_no_more_than_its_base(recorder):
    (out,) = recorder.op("linear", "0", reads=[], outputs=[64])
    recorder.op("relu", "1.0", reads=[recorder.view(out, 6400, "")])
    assert edges(recorder.build()) == [(0, [1], 64.0)]


def test_unused_weights_live_with_their_module(recorder):
    recorder.op("relu", "", reads=[])
    recorder.op("linear", "1.0", reads=[])
    assert recorder.build().weight_bytes.tolist() == [24, 24]


def test_readers_of_one_parameter_are_co_located(recorder):
    weight = recorder.weight([recorder.model[0].weight])
    for module in ("0", "", "1.0"):
        recorder.op("linear", module, reads=[weight] if module else [])
    graph = recorder.build()
    assert graph.colocate.tolist() == [0, -1, 0]


def test_names_are_unique(recorder):
    for _ in range(3):
        recorder.op("relu", "", reads=[])
    assert recorder.build().names == ("relu", "relu_1", "relu_2")


def test_buffers_may_be_read_anywhere():
    model = nn.Module()
    model.register_buffer("table", torch.zeros(4))
    recorder = Recorder(model, frees=False)
    value = recorder.weight([model.table])
    recorder.op("add", "", reads=[value])
    recorder.op("add", "", reads=[value])
    graph = recorder.build()
    assert graph.colocate.tolist() == [-1, -1] and graph.weight_bytes.tolist() == [16, 0]
