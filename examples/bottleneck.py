"""Two wide blocks and chains of narrow layers, to train on by real runs.

On two groups of cores the wide blocks gain from sharing the work, and the narrow layers lose by every change of device:
`autoplace train --stage measure --model examples/bottleneck.py:build --output bottleneck-policy`
"""

from __future__ import annotations

import torch
from torch import nn

WIDE, NARROW = 768, 64


def wide() -> nn.Module:
    """Return two matrices with a GELU between them."""
    return nn.Sequential(nn.Linear(WIDE, 2 * WIDE), nn.GELU(), nn.Linear(2 * WIDE, WIDE))


def narrow() -> nn.Module:
    """Return a small matrix and a GELU."""
    return nn.Sequential(nn.Linear(NARROW, NARROW), nn.GELU())


def build() -> tuple[nn.Module, torch.Tensor]:
    """Return twelve modules in a row and a batch of 256 vectors."""
    torch.manual_seed(0)
    first = [wide(), nn.Linear(WIDE, NARROW), *(narrow() for _ in range(4)), nn.Linear(NARROW, WIDE)]
    second = [wide(), nn.Linear(WIDE, NARROW), *(narrow() for _ in range(3))]
    return nn.Sequential(*first, *second).eval(), torch.randn(256, WIDE)
