"""Agents that are asked for another attempt."""

from types import SimpleNamespace

import pytest
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousParameters,
    rendezvous_handler_registry,
)

from autoplace.runtime.distributed.rendezvous import BACKEND, PatientRendezvous, register


def test_ranks_get_some_seconds_before_others_are_heard():
    inner = SimpleNamespace(num_nodes_waiting=lambda: 1)
    assert PatientRendezvous(inner, grace_s=60).num_nodes_waiting() == 0
    handler = PatientRendezvous(inner, grace_s=0)
    assert handler.num_nodes_waiting() == 1
    inner.num_nodes_waiting = lambda: 0
    assert handler.num_nodes_waiting() == 0 and handler._asked_s is None


def test_who_lost_the_others_does_not_end_it_for_them():
    closed = []

    def lose():
        raise RendezvousConnectionError("gone")

    inner = SimpleNamespace(num_nodes_waiting=lose, shutdown=lambda: bool(closed.append(1)) or True)
    handler = PatientRendezvous(inner)
    assert handler.shutdown() and closed == [1]
    with pytest.raises(RendezvousConnectionError):
        handler.num_nodes_waiting()
    assert not handler.shutdown() and closed == [1]


def test_torchrun_knows_it():
    register()
    parameters = RendezvousParameters(BACKEND, "127.0.0.1:0", "job", 1, 2, is_host=True)
    handler = rendezvous_handler_registry.create_handler(parameters)
    assert isinstance(handler, PatientRendezvous) and handler.get_run_id() == "job" and handler.use_agent_store
    assert not handler.is_closed()
    assert handler.shutdown() and handler.is_closed()
