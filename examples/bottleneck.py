"""Two wide blocks with a chain of narrow layers between them, to train on by real runs.

On two groups of cores one block each is faster, but only where the narrow layers do not go back and forth:
`autoplace train --stage measure --model examples/bottleneck.py:build --output bottleneck-policy`
"""

from __future__ import annotations

import torch
from torch import nn

WIDE, NARROW = 768, 64
"""Widths; in the blocks the wide one is doubled."""


def wide() -> nn.Module:
    """Return two matrices with a GELU between them."""
    return nn.Sequential(nn.Linear(WIDE, 2 * WIDE), nn.GELU(), nn.Linear(2 * WIDE, WIDE))


def narrow() -> nn.Module:
    """Return a small matrix and a GELU."""
    return nn.Sequential(nn.Linear(NARROW, NARROW), nn.GELU())


def build() -> tuple[nn.Module, torch.Tensor]:
    """Return six modules in a row and a batch of 512 vectors."""
    torch.manual_seed(0)
    between = [nn.Linear(WIDE, NARROW), narrow(), narrow(), nn.Linear(NARROW, WIDE)]
    return nn.Sequential(wide(), *between, wide()).eval(), torch.randn(512, WIDE)
