"""Holders of copies give way to one another on a GPU that has no room for all."""

import gc
import weakref

import pytest
import torch

from autoplace.runtime import room
from autoplace.runtime.copies import Copies
from autoplace.runtime.routing import install, remove

CARD = torch.device("cuda", 0)


class Holder:
    def __init__(self, device):
        self.released = 0
        room.hold(self, device)

    def release(self):
        self.released += 1
        return self.released == 1


@pytest.fixture
def full(monkeypatch):
    emptied = []
    monkeypatch.setattr(room, "_has_room", lambda _device, needed_bytes: needed_bytes < 100)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    return emptied


def test_others_on_the_device_give_way_when_there_is_no_room(full):
    mine, other, elsewhere = Holder(CARD), Holder(CARD), Holder(torch.device("cuda", 1))
    room.make_room(mine, CARD, 99, first=True)
    assert not other.released and not full
    room.make_room(mine, CARD, 100, first=True)
    assert (mine.released, other.released, elsewhere.released) == (0, 1, 0) and full


def test_garbage_is_collected_once_a_holder_and_after_every_release(full):
    mine, other = Holder(CARD), Holder(CARD)
    room.make_room(mine, CARD, 100, first=False)
    assert other.released == 1 and len(full) == 1, "it had copies"
    room.make_room(mine, CARD, 100, first=False)
    assert len(full) == 1, "there was nothing to gain"
    room.make_room(mine, CARD, 100, first=True)
    assert len(full) == 2, "closed executors may have left something"


def test_nothing_is_released_for_copies_on_a_cpu(full):
    other = Holder(torch.device("cpu"))
    room.make_room(Holder(torch.device("cpu")), torch.device("cpu"), 1000, first=True)
    assert not other.released and not full


def test_a_holder_that_is_gone_is_forgotten(full):
    Holder(CARD)
    gc.collect()
    mine = Holder(CARD)
    room.make_room(mine, CARD, 100, first=True)
    assert [h for h in room._holders if isinstance(h, Holder)] == [mine]


def test_copies_that_were_released_are_made_again():
    # parameters on "meta" stand for another device than the copies'
    net = torch.nn.Linear(4, 4)
    copies = Copies(torch.device("meta"))
    first = copies.of(net)
    assert copies.of(net) is first
    copies.release()
    again = copies.of(net)
    assert again is not first and next(again.module.parameters()).device.type == "meta"


def test_released_copies_of_gated_modules_are_gone_at_once():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    install(net)
    install(net[0])
    copies = Copies(torch.device("meta"))
    gc.disable()
    try:
        standin = copies.of(net)
        gone = weakref.ref(standin.module[0].weight)
        assert standin.module(torch.ones(2, 4, device="meta")).device.type == "meta"
        del standin
        copies.release()
        assert gone() is None, "or the GPU's memory waits for the garbage collector"
    finally:
        gc.enable()
        remove(net)
        remove(net[0])
