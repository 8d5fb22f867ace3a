"""The six models of `bench_cluster.py`, small enough that a training step takes about a second on one core.

Batches are such that arithmetic and bytes of gradients stand to each other as they do for models that people train:
the transformers here do about 6,000 operations for each byte of gradient in a step, as BERT-base does with 32
sequences of 128 tokens (85 million parameters of layers · 6 · 4,096 tokens / 340 MB).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["MODELS", "Model", "Scores", "build"]

_WORDS, _LENGTH = 500, 64


@dataclass(frozen=True, kw_only=True)
class Model:
    """How to build a model and a batch, and what torch's own pipeline needs: where to cut, and a loss outside."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], dict[str, Any]]
    layers: str
    """Path of the list of layers."""
    batch: int = 64
    shifted: bool = False
    """Whether the loss compares each position's scores with the word after it."""


class _Images(nn.Module):
    """A residual network with a loss of its own; batch statistics as `norm` has it."""

    def __init__(self, width: int = 24, blocks: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, classes)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = self.stem(pixel_values)
        for layer in self.layers:
            x = layer(x)
        scores = self.head(x.mean((2, 3)))
        if labels is None:
            return {"logits": scores}
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
    "vit": Model(make=_vit, inputs=_pixels, layers="vit.layers"),
    "bert": Model(make=_bert, inputs=_words, layers="bert.encoder.layer"),
    "gpt2": Model(make=_gpt2, inputs=_words, layers="transformer.h", shifted=True),
    "resnet": Model(make=_Images, inputs=_pixels, layers="layers"),
    "llama": Model(make=_llama, inputs=_words, layers="model.layers", shifted=True),
    "t5": Model(make=_t5, inputs=_words, layers="decoder.block"),
}


class Scores(nn.Module):
    """A model that gives its scores alone, from tensors by position: what `torch.distributed.pipelining` takes well."""

    def __init__(self, name: str, model: nn.Module, batch: dict[str, Any]) -> None:
        super().__init__()
        self.model, self._shifted = model, MODELS[name].shifted
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if name == "t5":  # which makes these of the labels otherwise
            inputs["decoder_input_ids"] = model._shift_right(batch["labels"])
        self.names, self.inputs, self.targets = tuple(inputs), tuple(inputs.values()), batch["labels"]

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the scores."""
        scores: torch.Tensor = self.model(**dict(zip(self.names, inputs, strict=True)))["logits"]
        return scores

    def loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss as the model computes it."""
        if self._shifted:
            scores, targets = scores[:, :-1], targets[:, 1:]
        return nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1))


def build(name: str, seed: int, batch: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model in training mode and one batch, the same for the same seed in every process.

    Args:
        name: Of the model.
        seed: Of parameters and inputs.
        batch: Samples; None = the model's own.
    """
    torch.manual_seed(seed)
    model = MODELS[name].make().train()
    return model, MODELS[name].inputs(batch or MODELS[name].batch, torch.Generator().manual_seed(seed))
