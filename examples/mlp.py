"""A small multi-layer perceptron without any other library: `autoplace tune examples/mlp.py:build`."""

from __future__ import annotations

import torch


def build() -> tuple[torch.nn.Module, torch.Tensor]:
    """Return eight linear layers of width 512 and a batch of 64 vectors."""
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (torch.nn.Linear(512, 512), torch.nn.GELU())]
    return torch.nn.Sequential(*layers).eval(), torch.randn(64, 512)
