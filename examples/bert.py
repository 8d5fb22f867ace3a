"""A BERT encoder with random weights and a batch of random tokens: `autoplace tune examples/bert.py:build`."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel


def build() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return an encoder of 6 layers (hidden 384) and 8 sequences of 128 tokens."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8000,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1536,
        max_position_embeddings=128,
    )
    model = BertModel(config).eval()
    tokens = torch.randint(0, config.vocab_size, (8, 128))
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
