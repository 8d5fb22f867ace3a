"""The six models of `bench_cluster.py`, small enough that a training step takes tenths of a second on one core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["MODELS", "Model", "build"]

_WORDS, _LENGTH = 500, 64


@dataclass(frozen=True, kw_only=True)
class Model:
    """How to build a model and a batch, and where torch's own pipeline may cut it into equal stages."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], dict[str, Any]]
    layers: str
    """Path of the list of layers."""
    batch: int


class _Images(nn.Module):
    """A residual network with a loss of its own; batch statistics as `norm` has it."""

    def __init__(self, width: int = 24, blocks: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, classes)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.stem(pixel_values)
        for layer in self.layers:
            x = layer(x)
        scores = self.head(x.mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(4, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


def _words(batch: int, random: torch.Generator) -> dict[str, Any]:
    ids = torch.randint(1, _WORDS, (batch, _LENGTH), generator=random)
    return {"input_ids": ids, "labels": ids.clone()}


def _pixels(batch: int, random: torch.Generator) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(batch, 3, 32, 32, generator=random),
        "labels": torch.randint(0, 10, (batch,), generator=random),
    }


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(hidden_size=128, num_hidden_layers=8, num_attention_heads=4, intermediate_size=512, image_size=32,
                  patch_size=4, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )  # fmt: skip


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(vocab_size=_WORDS, hidden_size=128, num_hidden_layers=8, num_attention_heads=4,
                   intermediate_size=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )  # fmt: skip


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=_WORDS, n_positions=_LENGTH, n_embd=128, n_layer=8, n_head=4, resid_pdrop=0.0,
                   embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    )  # fmt: skip


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=_WORDS, hidden_size=128, intermediate_size=384, num_hidden_layers=8,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=_LENGTH, use_cache=False)
    )  # fmt: skip


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=_WORDS, d_model=128, d_kv=32, d_ff=384, num_layers=4, num_heads=4, dropout_rate=0.0,
                 use_cache=False, decoder_start_token_id=0, pad_token_id=0)
    )  # fmt: skip


MODELS = {
    "vit": Model(make=_vit, inputs=_pixels, layers="vit.layers", batch=32),
    "bert": Model(make=_bert, inputs=_words, layers="bert.encoder.layer", batch=32),
    "gpt2": Model(make=_gpt2, inputs=_words, layers="transformer.h", batch=32),
    "resnet": Model(make=_Images, inputs=_pixels, layers="layers", batch=32),
    "llama": Model(make=_llama, inputs=_words, layers="model.layers", batch=32),
    "t5": Model(make=_t5, inputs=_words, layers="decoder.block", batch=32),
}


def build(name: str, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model in training mode and one batch, the same for the same seed in every process."""
    torch.manual_seed(seed)
    model = MODELS[name].make().train()
    return model, MODELS[name].inputs(MODELS[name].batch, torch.Generator().manual_seed(seed))
