"""Tiny models for capture and coarsening."""

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


class Branching(nn.Module):
    """Data-dependent control flow: export cannot follow it."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.left(x) if x.sum() > 0 else self.right(x)


class Shared(nn.Module):
    """One module called twice, under two names, and an output that is no tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.alias = self.first
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.alias(x))
        x = self.first(x)
        return {"logits": self.last(x), "size": x.shape[0], "name": "shared", "none": None}


class ConvNet(nn.Module):
    """Convolutions with BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.drop(torch.relu(self.norm(self.conv(x))))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture
def models():
    """Model classes by name."""
    return {"branching": Branching, "shared": Shared, "conv": ConvNet}


@pytest.fixture(scope="session")
def transformers_models():
    """Builders of tiny transformers models with their keyword inputs."""
    t = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ids = torch.arange(4 * 8).reshape(4, 8)

    def bert():
        return t.BertModel(t.BertConfig(vocab_size=64, **sizes)), {"input_ids": ids}

    def vit():
        config = t.ViTConfig(image_size=16, patch_size=8, **sizes)
        return t.ViTModel(config), {"pixel_values": torch.ones(4, 3, 16, 16)}

    def gpt2():
        config = t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16)
        return t.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}

    return {"bert": bert, "vit": vit, "gpt2": gpt2}
