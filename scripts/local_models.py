"""The ten models of `bench_local.py`: architectures that people train and serve on small machines, with random weights.

Sizes are those of small published variants (BERT-mini, ViT-tiny and their like), so that a pass takes milliseconds to
tenths of a second on a laptop's cores. Every model comes with inputs for a batch and, in training, a loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autoplace.workload import Workload

__all__ = ["CASES", "Case", "workload"]

_WORDS, _LENGTH = 2000, 64
"""Size of the vocabulary, and tokens of a text."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a skip connection (He et al. 2016, figure 2 left)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        same = stride == 1 and width_in == width
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float32[B, width_in, H, W] to float32[B, width, H / stride, W / stride]."""
        return self.act(self.body(x) + self.skip(x))


class ResNet(nn.Module):
    """A residual network of four stages for images of 64 x 64 pixels."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 256), classes: int = 100) -> None:
        super().__init__()
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        stages = [
            nn.Sequential(ResidualBlock(a, b, 1 if i == 0 else 2), ResidualBlock(b, b, 1))
            for i, (a, b) in enumerate(pairs)
        ]
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float32[B, 3, H, W] to logits float32[B, classes]."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class LanguageLSTM(nn.Module):
    """Embedding, two LSTM layers and a projection to the vocabulary."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(_WORDS, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, _WORDS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map int64[B, T] to logits float32[B, T, vocabulary]."""
        return self.head(self.lstm(self.embed(ids))[0])


class Towers(nn.Module):
    """A recommender: one embedding bag and small network per feature, joined by a network on top (DLRM's shape)."""

    def __init__(self, features: int = 24, width: int = 64) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(5000, width) for _ in range(features))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, width))
            for _ in range(features)
        )
        self.top = nn.Sequential(nn.Linear(features * width, 512), nn.ReLU(), nn.Linear(512, 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map int64[B, features, ids] to a score float32[B, 1]."""
        parts = [t(bag(ids[:, i])) for i, (bag, t) in enumerate(zip(self.bags, self.towers, strict=True))]
        return self.top(torch.cat(parts, 1))


def _mlp() -> nn.Module:
    sizes = (512, 2048, 2048, 2048, 512)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 10))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=_WORDS, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
        )
    )


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=64,
            patch_size=8,
        )
    )


def _gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=_WORDS, n_positions=128, n_embd=256, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    )


def _clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": _WORDS,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "max_position_embeddings": _LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": 64,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=_WORDS, d_model=256, d_kv=64, d_ff=1024, num_layers=3, num_heads=4, decoder_start_token_id=0
        )
    )


def _moe() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=_WORDS,
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            max_position_embeddings=128,
        )
    )


def _ids(batch: int, *shape: int, high: int = _WORDS) -> torch.Tensor:
    return torch.randint(3, high, (batch, *(shape or (_LENGTH,))))


def _images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how to make inputs for it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    """Batch size to keyword inputs, or, under the key "", the one positional input."""
    labels: bool = False
    """Whether the model computes its own loss when it is given `labels` equal to `input_ids`."""


CASES: dict[str, Case] = {
    "cnn": Case(build=ResNet, inputs=lambda b: {"": _images(b)}),
    "bert": Case(build=_bert, inputs=lambda b: {"input_ids": _ids(b)}),
    "vit": Case(build=_vit, inputs=lambda b: {"pixel_values": _images(b)}),
    "gpt": Case(build=_gpt, inputs=lambda b: {"input_ids": _ids(b)}, labels=True),
    "clip": Case(build=_clip, inputs=lambda b: {"input_ids": _ids(b), "pixel_values": _images(b)}),
    "t5": Case(build=_t5, inputs=lambda b: {"input_ids": _ids(b), "decoder_input_ids": _ids(b, _LENGTH // 2)}),
    "moe": Case(build=_moe, inputs=lambda b: {"input_ids": _ids(b)}, labels=True),
    "lstm": Case(build=LanguageLSTM, inputs=lambda b: {"": _ids(b)}),
    "towers": Case(build=Towers, inputs=lambda b: {"": _ids(b, 24, 8, high=5000)}),
    "mlp": Case(build=_mlp, inputs=lambda b: {"": torch.randn(b, 512)}),
}
"""Name to model."""


def workload(name: str, *, batch: int, training: bool, seed: int = 0) -> Workload:
    """Build a case's model and inputs.

    Args:
        name: A key of → `CASES`.
        batch: Samples.
        training: Whether a pass is forward and backward.
        seed: Seed of weights and inputs.
    """
    torch.manual_seed(seed)
    case = CASES[name]
    model = case.build().train(training)
    kwargs = case.inputs(batch)
    args = (kwargs.pop(""),) if "" in kwargs else ()
    if training and case.labels:
        kwargs["labels"] = kwargs["input_ids"]
    if hasattr(model, "config") and getattr(model.config, "use_cache", False):
        kwargs["use_cache"] = False
    return Workload(model=model, args=args, kwargs=kwargs, training=training, name=name)
