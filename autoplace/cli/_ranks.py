"""What the programs of `tune` and `train` do alike on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from autoplace.cli.factory import load_workload

if TYPE_CHECKING:
    from autoplace.runtime.distributed import Session
    from autoplace.workload import Workload

__all__ = ["shared_workload"]


def shared_workload(spec: str, session: Session) -> Workload:
    """Build a model in training mode by its factory on every rank, and start all from rank 0's parameters.

    Args:
        spec: `file.py:function`.
        session: The ranks; all have to call it.

    Raises:
        AutoplaceError: What one rank finds wrong, on all of them.
    """
    from autoplace.distribution import give_out

    torch.manual_seed(0)
    workload = session.together(lambda: load_workload(spec, training=True))
    workload.model.train()
    give_out(workload.model, session)
    return workload
