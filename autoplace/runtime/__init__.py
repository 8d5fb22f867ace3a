"""Executors: run a model under a Plan."""

from .worker import DeviceWorker, Ledger, TaskThread

__all__ = ["DeviceWorker", "Ledger", "TaskThread"]
