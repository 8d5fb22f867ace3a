import os

import pytest
import torch

from autoplace.errors import ExecutionError
from autoplace.runtime.slab import Slab

TYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


@pytest.fixture
def ends():
    """Two sides of one memory."""
    first = Slab()
    return first, Slab(os.dup(first.fd))


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_arrives(ends, dtype):
    here, there = ends
    tensors = [torch.randint(0, 2, shape).to(dtype) for shape in ((3, 5), (), (0, 4), (1,))]
    for tensor, place in zip(tensors, here.pack(tensors), strict=True):
        got = there.look(place)
        assert got.dtype == dtype and torch.equal(got, tensor)


def test_the_looking_side_follows_growth_and_new_contents(ends):
    here, there = ends
    for size in (10, 10, 100_000, 7, 300_000):
        tensors = [torch.randn(size), None, torch.randn(2, size)]
        places = here.pack(tensors)
        assert places[1] is None
        assert torch.equal(there.look(places[0]), tensors[0]) and torch.equal(there.look(places[2]), tensors[2])


def test_layouts_that_matter_are_kept_and_others_become_dense(ends):
    here, there = ends
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    volume = torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d)
    tensors = [image, volume, image[1:], torch.randn(6, 4).t(), torch.ones(1).expand(3, 4), torch.randn(8)[::2]]
    got = [there.look(place) for place in here.pack(tensors)]
    for a, b in zip(got, tensors, strict=True):
        assert torch.equal(a, b)
    assert got[0].stride() == image.stride() and got[1].stride() == volume.stride()
    assert got[2].is_contiguous(memory_format=torch.channels_last)
    assert all(t.is_contiguous() for t in got[3:])


def test_sparse_gradients_travel(ends):
    here, there = ends
    for tensor in (
        torch.eye(4).to_sparse(),
        torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.ones(2, 3), (4, 3)),
    ):
        (place,) = here.pack([tensor])
        got = there.look(place)
        assert got.is_sparse and got.is_coalesced() == tensor.is_coalesced()
        assert torch.equal(got.to_dense(), tensor.to_dense())


def test_conjugates_and_negatives_arrive_as_values(ends):
    here, there = ends
    values = torch.randn(3, dtype=torch.complex64)
    places = here.pack([values.conj(), values.conj().imag])
    assert torch.equal(there.look(places[0]), values.conj()) and torch.equal(there.look(places[1]), -values.imag)


def test_views_made_in_inference_mode_serve_outside(ends):
    here, there = ends
    with torch.inference_mode():
        here.pack([torch.ones(3)])
    (place,) = here.pack([torch.full((3,), 2.0)])
    with torch.inference_mode():
        there.look(place)
    assert not there.look(place).is_inference() and there.look(place).tolist() == [2.0] * 3


@pytest.mark.parametrize("tensor", [torch.ones(2, device="meta"), torch.eye(2).to_sparse_csr()])
def test_what_does_not_travel_is_refused(ends, tensor):
    with pytest.raises(ExecutionError, match="processes"):
        ends[0].pack([tensor])


def test_descriptors_are_closed():
    slab = Slab()
    slab.pack([torch.ones(3)])
    fd = slab.fd
    del slab
    with pytest.raises(OSError):
        os.fstat(fd)
