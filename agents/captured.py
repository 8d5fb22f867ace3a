"""Graphs captured from `transformers` models with random weights: what real models look like to a planner.

Models are built on the meta device from configurations of real width, so that nothing is downloaded and no memory is
used; capture is that of `graph.capture`'s first rung. A graph is kept in the cache directory under everything that
changes it. Without the extra `transformers` there are none of them, → `available`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

import torch

from autoplace.costs import cache
from autoplace.errors import InputError
from autoplace.graph.caches import caches_off, capture_kwargs
from autoplace.graph.coarsen import coarsen
from autoplace.graph.export_capture import capture_by_export
from autoplace.graph.opgraph import OpGraph
from autoplace.workload import Workload

__all__ = ["MODELS", "CapturedGraph", "ModelSpec", "available", "captured_graph", "grouped"]

Inputs = Mapping[str, tuple[int, ...]]
_VERSION = 1
"""Goes up when a graph of the same facts changes."""
_FLOATS = ("pixel_values", "input_features")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """How to build a model."""

    model: str
    """Class in `transformers`."""
    config: str
    """Class of its configuration."""
    settings: Mapping[str, Any]
    """What differs from the configuration's defaults."""
    inputs: Inputs
    """Keyword input to shape; the first dimension is the batch."""


def _spec(model: str, config: str, inputs: Inputs, **settings: Any) -> ModelSpec:
    return ModelSpec(model=model, config=config, settings=settings, inputs=inputs)


def _text(batch: int, length: int, *more: str) -> Inputs:
    return {"input_ids": (batch, length)} | dict.fromkeys(more, (batch, length))


def _seq2seq(batch: int, source: int, target: int) -> Inputs:
    return {"input_ids": (batch, source), "decoder_input_ids": (batch, target)}


def _image(batch: int, side: int) -> Inputs:
    return {"pixel_values": (batch, 3, side, side)}


_WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}

MODELS: dict[str, ModelSpec] = {
    # Real widths, fewer layers: training looks at many small problems.
    "bert": _spec("BertModel", "BertConfig", _text(8, 128, "attention_mask"), num_hidden_layers=6),
    "gpt2": _spec("GPT2LMHeadModel", "GPT2Config", _text(4, 512), n_layer=6),
    "llama": _spec("LlamaForCausalLM", "LlamaConfig", _text(2, 512), hidden_size=2048, intermediate_size=5632,
                   num_hidden_layers=4, num_key_value_heads=4),
    "t5": _spec("T5ForConditionalGeneration", "T5Config", _seq2seq(8, 128, 64), num_layers=3),
    "vit": _spec("ViTModel", "ViTConfig", _image(8, 224), num_hidden_layers=6),
    "mixtral": _spec("MixtralForCausalLM", "MixtralConfig", _text(2, 256), hidden_size=1024, intermediate_size=3584,
                     num_hidden_layers=3, num_local_experts=8, num_attention_heads=16, num_key_value_heads=4),
    "gpt_neox": _spec("GPTNeoXForCausalLM", "GPTNeoXConfig", _text(2, 256), num_hidden_layers=5, **_WIDE),
    "bart": _spec("BartForConditionalGeneration", "BartConfig", _seq2seq(4, 256, 64), d_model=768, encoder_layers=3,
                  decoder_layers=3, encoder_attention_heads=12, decoder_attention_heads=12, encoder_ffn_dim=3072,
                  decoder_ffn_dim=3072),
    "resnet": _spec("ResNetModel", "ResNetConfig", _image(16, 224)),
    "distilbert": _spec("DistilBertModel", "DistilBertConfig", _text(8, 128)),
    "opt": _spec("OPTForCausalLM", "OPTConfig", _text(2, 256, "attention_mask"), num_hidden_layers=6),
    "phi": _spec("PhiForCausalLM", "PhiConfig", _text(2, 256), num_hidden_layers=4, **_WIDE),
    # As published, or nearly: what a policy is judged by.
    "mistral": _spec("MistralForCausalLM", "MistralConfig", _text(1, 512), num_hidden_layers=16),
    "qwen2": _spec("Qwen2ForCausalLM", "Qwen2Config", _text(2, 512), hidden_size=896, intermediate_size=4864,
                   num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2),
    "whisper": _spec("WhisperForConditionalGeneration", "WhisperConfig",
                     {"input_features": (2, 80, 3000), "decoder_input_ids": (2, 128)}, d_model=768,
                     encoder_layers=12, decoder_layers=12, encoder_attention_heads=12, decoder_attention_heads=12,
                     encoder_ffn_dim=3072, decoder_ffn_dim=3072),
    "clip": _spec("CLIPModel", "CLIPConfig", {**_text(8, 77, "attention_mask"), **_image(8, 224)}),
    "deberta": _spec("DebertaV2Model", "DebertaV2Config", _text(4, 128, "attention_mask"), hidden_size=768,
                     num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "swin": _spec("SwinModel", "SwinConfig", _image(8, 224)),
    "convnext": _spec("ConvNextModel", "ConvNextConfig", _image(8, 224)),
}  # fmt: skip
"""Name to how the model is built. Which of them training sees is decided in `distribution`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CapturedGraph:
    """The forward pass of a model, op by op."""

    graph: OpGraph
    """Float32, in execution order."""
    called: tuple[str, ...]
    """Paths of the modules that were called, for → `coarsen`."""


def available() -> bool:
    """Whether `transformers` is installed."""
    return importlib.util.find_spec("transformers") is not None


@lru_cache(maxsize=64)
def captured_graph(name: str, *, training: bool) -> CapturedGraph:
    """Return the forward graph of a model, from the cache or captured now (one to four seconds).

    Args:
        name: One of `MODELS`.
        training: Whether the model is in training mode: dropout is there, and outputs are kept for the backward pass.

    Raises:
        InputError: If the model is unknown or `transformers` is not installed.
    """
    if name not in MODELS:
        raise InputError(f"model {name!r} is unknown; use one of {', '.join(MODELS)}")
    if not available():
        raise InputError("graphs of models need transformers; install autoplace[transformers]")
    key = cache.cache_key(_facts(name, training))
    found = _from_json(cache.load(key))
    if found is None:
        found = _capture(MODELS[name], name, training)
        cache.store(key, _to_json(found))
    return found


def grouped(captured: CapturedGraph, max_groups: int) -> OpGraph:
    """Return the graph of at most `max_groups` groups along module boundaries, as finely cut as that allows."""
    return coarsen(captured.graph, max_groups=max_groups, min_cost_fraction=1e-4, called=captured.called).graph


def _facts(name: str, training: bool) -> dict[str, Any]:
    spec = MODELS[name]
    versions = {package: version(package) for package in ("torch", "transformers")}
    return {
        "captured": _VERSION,
        "model": spec.model,
        "settings": dict(spec.settings),
        "inputs": dict(spec.inputs),
        "training": training,
        **versions,
    }


def _capture(spec: ModelSpec, name: str, training: bool) -> CapturedGraph:
    import transformers

    build: Callable[..., torch.nn.Module] = getattr(transformers, spec.model)
    config = getattr(transformers, spec.config)(**spec.settings)
    with torch.device("meta"):
        model = build(config)
    inputs = {
        key: torch.zeros(shape, dtype=torch.float32 if key in _FLOATS else torch.long, device="meta")
        for key, shape in spec.inputs.items()
    }
    workload = Workload(model=model, kwargs=inputs, training=training, name=name)
    kwargs = capture_kwargs(workload)
    with workload.mode(), caches_off(model, kwargs):
        graph, called, _ = capture_by_export(workload, kwargs)
    return CapturedGraph(graph=graph, called=tuple(sorted(called)))


_ARRAYS = ("flops", "bytes_moved", "weight_bytes", "activation_bytes", "frees", "colocate")
_TEXTS = ("names", "kinds", "modules")


def _to_json(captured: CapturedGraph) -> dict[str, Any]:
    graph = captured.graph
    data: dict[str, Any] = {key: getattr(graph, key).tolist() for key in _ARRAYS}
    data |= {key: list(getattr(graph, key)) for key in _TEXTS}
    return data | {"edges": graph.tensors(), "called": list(captured.called)}


def _from_json(data: dict[str, Any] | None) -> CapturedGraph | None:
    """Read an entry back; anything unexpected is a miss."""
    if data is None:
        return None
    try:
        called = tuple(str(path) for path in data["called"])
        parts = {key: data[key] for key in (*_ARRAYS, *_TEXTS, "edges")}
        return CapturedGraph(graph=OpGraph.build(**parts), called=called)
    except (KeyError, TypeError, ValueError, IndexError):
        return None
