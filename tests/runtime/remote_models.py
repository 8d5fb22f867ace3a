"""Models that other processes can import, for the tests of replicas in processes."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Result:
    hidden: torch.Tensor
    scores: torch.Tensor
    loss: torch.Tensor | None
    note: str


class Unkind(Exception):
    """Cannot be made again from its pickle."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class Many(nn.Module):
    """Tied weights, an unused layer, dropout, a buffer, keyword inputs, an output of its own type."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.mid = nn.Linear(8, 8)
        self.unused = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(8))

    def forward(self, ids, x=None, *, labels=None, note="none"):
        if (ids == 12).any():
            raise LookupError("from the model")
        if (ids == 11).any():
            raise Unkind("one", "two")
        hidden = torch.tanh(self.mid(self.embed(ids))) * self.scale
        if x is not None:
            hidden = hidden + x
        hidden = self.dropout(hidden)
        scores = self.head(hidden)
        loss = None if labels is None else nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
        return Result(hidden, scores, loss, note)


class Picture(nn.Module):
    """A small network on images."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.relu(self.conv(x)).mean((2, 3)))


class InPlace(nn.Module):
    """Modifies its input."""

    def forward(self, x):
        return x.add_(1)
