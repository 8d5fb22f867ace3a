"""Executors: run a model under a Plan."""

from ._base import Executor
from .build import build_executor
from .identity import Identity
from .inline import InlineDevice
from .replicas import Replicas
from .single import SingleDevice
from .stages import Stages
from .worker import DeviceWorker, Ledger, TaskThread

__all__ = [
    "DeviceWorker",
    "Executor",
    "Identity",
    "InlineDevice",
    "Ledger",
    "Replicas",
    "SingleDevice",
    "Stages",
    "TaskThread",
    "build_executor",
]
