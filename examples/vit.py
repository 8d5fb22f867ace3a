"""A ViT classifier with random weights and random images: `autoplace tune examples/vit.py:build --training`."""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTForImageClassification


def build() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Return a classifier of 6 layers (hidden 192), 8 images of 112 x 112 pixels and their labels."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=112,
        patch_size=16,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        num_labels=10,
    )
    model = ViTForImageClassification(config).train()
    return model, {"pixel_values": torch.randn(8, 3, 112, 112), "labels": torch.randint(0, 10, (8,))}
