"""The architectures of the acceptance benchmark: small `transformers` models with random weights, and their inputs.

Every entry is a class of `transformers`, the configuration that makes it small (two layers, 16 to 64 wide), what it
takes, and the labels that make it return a loss. Nothing is downloaded. Sources of randomness other than dropout (time
masking, router jitter, layers dropped at random) are switched off in the configuration, so that two runs are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["ARCHITECTURES", "Architecture", "names"]

Maker = Callable[[torch.Generator, int], torch.Tensor]
"""(generator, batch) to one input."""
Makers = Mapping[str, Maker]

VOCABULARY = 96
_FIRST_ID = 6
"""Ids below are special (padding, start, end) in some of the configurations."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model to build, and what to feed it."""

    name: str
    family: str
    """text, causal, moe, encoder-decoder, vision, audio, multimodal, time series, state space or other."""
    model: str
    """Class in `transformers`."""
    config: str
    """Class of its configuration."""
    settings: Mapping[str, Any]
    """What makes the configuration small."""
    makers: Makers
    """Keyword input to how it is made."""
    labels: Makers = field(default_factory=dict)
    """Inputs of training alone; without them the loss is the mean square of the outputs."""

    def build(self, seed: int = 0) -> torch.nn.Module:
        """Return the model with random weights, the same ones for the same seed."""
        import transformers

        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**self.settings)
        model: torch.nn.Module = getattr(transformers, self.model)(config)
        return model

    def inputs(self, batch: int, *, training: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return keyword inputs of a batch; in training with labels."""
        generator = torch.Generator().manual_seed(seed)
        makers = {**self.makers, **(self.labels if training else {})}
        return {name: make(generator, batch) for name, make in makers.items()}


def _ids(length: int, low: int = _FIRST_ID, high: int = VOCABULARY) -> Maker:
    return lambda generator, batch: torch.randint(low, high, (batch, length), generator=generator)


def _classes(count: int) -> Maker:
    return lambda generator, batch: torch.randint(0, count, (batch,), generator=generator)


def _floats(*shape: int) -> Maker:
    return lambda generator, batch: torch.randn(batch, *shape, generator=generator)


def _ones(*shape: int, dtype: torch.dtype = torch.long) -> Maker:
    return lambda _generator, batch: torch.ones(batch, *shape, dtype=dtype)


def _padding_mask(length: int) -> Maker:
    """A mask of ones, with the last two places of every second sample padded."""

    def make(_generator: torch.Generator, batch: int) -> torch.Tensor:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[1::2, -2:] = 0
        return mask

    return make


def _ids_with(prefix: list[int], length: int) -> Maker:
    """Ids that start with the given ones, such as the places that an image's features take."""

    def make(generator: torch.Generator, batch: int) -> torch.Tensor:
        rest = torch.randint(_FIRST_ID, VOCABULARY - 1, (batch, length - len(prefix)), generator=generator)
        return torch.cat([torch.tensor(prefix).expand(batch, -1), rest], dim=1)

    return make


_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TEXT = {**_SMALL, "vocab_size": VOCABULARY}
_DECODER = {**_TEXT, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_SPEECH = {
    **_SMALL,
    "vocab_size": 32,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
_SERIES = {
    "prediction_length": 6,
    "context_length": 12,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 2,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
_IMAGE = {**_SMALL, "image_size": 32, "patch_size": 8}
_CLIP = {
    "text_config": {**_TEXT, "max_position_embeddings": 32, "eos_token_id": 95, "pad_token_id": 1, "bos_token_id": 0},
    "vision_config": _IMAGE,
    "projection_dim": 16,
}

_LENGTH = 16
_MASKED: Makers = {"input_ids": _ids(_LENGTH), "attention_mask": _padding_mask(_LENGTH)}
_PLAIN: Makers = {"input_ids": _ids(_LENGTH)}
_NEXT: Makers = {"labels": _ids(_LENGTH)}
_PIXELS: Makers = {"pixel_values": _floats(3, 32, 32)}
_TWO: Makers = {"labels": _classes(2)}
_SPOKEN: Makers = {"input_values": _floats(800)}
_TRANSLATED: Makers = {**_MASKED, "decoder_input_ids": _ids(10)}
_TARGET: Makers = {"labels": _ids(10)}
_PAST = 12 + 3
_FORECAST: Makers = {
    "past_values": _floats(_PAST),
    "past_time_features": _floats(_PAST, 2),
    "past_observed_mask": _ones(_PAST, dtype=torch.float32),
    "future_values": _floats(6),
    "future_time_features": _floats(6, 2),
}


def _entry(
    name: str, family: str, model: str, config: str, makers: Makers, labels: Makers | None = None, **settings: Any
) -> Architecture:
    return Architecture(
        name=name, family=family, model=model, config=config, settings=settings, makers=makers, labels=labels or {}
    )


_TEXT_MODELS = (
    _entry("bert", "text", "BertForSequenceClassification", "BertConfig", _MASKED, _TWO, **_TEXT),
    _entry("roberta", "text", "RobertaForMaskedLM", "RobertaConfig", _MASKED, _NEXT, **_TEXT),
    _entry("xlm_roberta", "text", "XLMRobertaForTokenClassification", "XLMRobertaConfig", _MASKED,
           {"labels": _ids(_LENGTH, 0, 2)}, **_TEXT),
    _entry("distilbert", "text", "DistilBertForSequenceClassification", "DistilBertConfig", _MASKED, _TWO,
           vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    _entry("albert", "text", "AlbertForSequenceClassification", "AlbertConfig", _MASKED, _TWO, embedding_size=16,
           **_TEXT),
    _entry("electra", "text", "ElectraForPreTraining", "ElectraConfig", _MASKED, {"labels": _ids(_LENGTH, 0, 2)},
           embedding_size=16, **_TEXT),
    _entry("deberta_v2", "text", "DebertaV2ForSequenceClassification", "DebertaV2Config", _MASKED, _TWO,
           relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, **_TEXT),
    _entry("mpnet", "text", "MPNetForSequenceClassification", "MPNetConfig", _MASKED, _TWO, **_TEXT),
    _entry("modernbert", "text", "ModernBertForMaskedLM", "ModernBertConfig", _MASKED, _NEXT, pad_token_id=0,
           bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=8, **_TEXT),
    _entry("longformer", "text", "LongformerForMaskedLM", "LongformerConfig", _MASKED, _NEXT, attention_window=[4, 4],
           **_TEXT),
    _entry("fnet", "text", "FNetForSequenceClassification", "FNetConfig", _PLAIN, _TWO, hidden_size=32,
           num_hidden_layers=2, intermediate_size=64, vocab_size=VOCABULARY),
    _entry("squeezebert", "text", "SqueezeBertForSequenceClassification", "SqueezeBertConfig", _MASKED, _TWO,
           embedding_size=32, **_TEXT),
)  # fmt: skip

_CAUSAL_MODELS = (
    _entry("gpt2", "causal", "GPT2LMHeadModel", "GPT2Config", _MASKED, _NEXT, vocab_size=VOCABULARY, n_embd=32,
           n_layer=2, n_head=4, n_positions=32),
    _entry("gpt_neo", "causal", "GPTNeoForCausalLM", "GPTNeoConfig", _MASKED, _NEXT, vocab_size=VOCABULARY,
           hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4,
           max_position_embeddings=32),
    _entry("gpt_neox", "causal", "GPTNeoXForCausalLM", "GPTNeoXConfig", _MASKED, _NEXT, **_DECODER),
    _entry("gptj", "causal", "GPTJForCausalLM", "GPTJConfig", _MASKED, _NEXT, vocab_size=VOCABULARY, n_embd=32,
           n_layer=2, n_head=4, n_positions=32, rotary_dim=4),
    _entry("opt", "causal", "OPTForCausalLM", "OPTConfig", _MASKED, _NEXT, vocab_size=VOCABULARY, hidden_size=32,
           num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=32,
           layerdrop=0.0),
    _entry("bloom", "causal", "BloomForCausalLM", "BloomConfig", _MASKED, _NEXT, vocab_size=VOCABULARY, hidden_size=32,
           n_layer=2, n_head=4),
    _entry("llama", "causal", "LlamaForCausalLM", "LlamaConfig", _MASKED, _NEXT, num_key_value_heads=2, **_DECODER),
    _entry("mistral", "causal", "MistralForCausalLM", "MistralConfig", _MASKED, _NEXT, num_key_value_heads=2,
           sliding_window=8, **_DECODER),
    _entry("qwen2", "causal", "Qwen2ForCausalLM", "Qwen2Config", _MASKED, _NEXT, num_key_value_heads=2, **_DECODER),
    _entry("qwen3", "causal", "Qwen3ForCausalLM", "Qwen3Config", _MASKED, _NEXT, num_key_value_heads=2, head_dim=8,
           **_DECODER),
    _entry("gemma", "causal", "GemmaForCausalLM", "GemmaConfig", _MASKED, _NEXT, num_key_value_heads=1, head_dim=8,
           **_DECODER),
    _entry("phi", "causal", "PhiForCausalLM", "PhiConfig", _MASKED, _NEXT, **_DECODER),
    _entry("falcon", "causal", "FalconForCausalLM", "FalconConfig", _MASKED, _NEXT, vocab_size=VOCABULARY,
           hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2),
    _entry("stablelm", "causal", "StableLmForCausalLM", "StableLmConfig", _MASKED, _NEXT, num_key_value_heads=2,
           **_DECODER),
    _entry("olmo2", "causal", "Olmo2ForCausalLM", "Olmo2Config", _MASKED, _NEXT, num_key_value_heads=2, **_DECODER),
    _entry("mpt", "causal", "MptForCausalLM", "MptConfig", _MASKED, _NEXT, vocab_size=VOCABULARY, d_model=32,
           n_layers=2, n_heads=4, max_seq_len=32),
)  # fmt: skip

_MOE_MODELS = (
    _entry("mixtral", "moe", "MixtralForCausalLM", "MixtralConfig", _MASKED, _NEXT, num_key_value_heads=2,
           num_local_experts=4, sliding_window=8, **_DECODER),
    _entry("qwen2_moe", "moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", _MASKED, _NEXT, num_key_value_heads=2,
           num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
           **_DECODER),
    _entry("olmoe", "moe", "OlmoeForCausalLM", "OlmoeConfig", _MASKED, _NEXT, num_experts=4, num_experts_per_tok=2,
           **_DECODER),
    _entry("granitemoe", "moe", "GraniteMoeForCausalLM", "GraniteMoeConfig", _MASKED, _NEXT, num_key_value_heads=2,
           num_local_experts=4, **_DECODER),
    _entry("switch_transformers", "moe", "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
           _TRANSLATED, _TARGET, num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
           num_experts=4, expert_capacity=64, router_jitter_noise=0.0, decoder_start_token_id=0, **_T5),
)  # fmt: skip

_SEQ2SEQ_MODELS = (
    _entry("t5", "encoder-decoder", "T5ForConditionalGeneration", "T5Config", _TRANSLATED, _TARGET, **_T5),
    _entry("bart", "encoder-decoder", "BartForConditionalGeneration", "BartConfig", _TRANSLATED, _TARGET, **_BART),
    _entry("mbart", "encoder-decoder", "MBartForConditionalGeneration", "MBartConfig", _TRANSLATED, _TARGET, **_BART),
    _entry("marian", "encoder-decoder", "MarianMTModel", "MarianConfig", _TRANSLATED, _TARGET,
           decoder_vocab_size=VOCABULARY, **_BART),
    _entry("pegasus", "encoder-decoder", "PegasusForConditionalGeneration", "PegasusConfig", _TRANSLATED, _TARGET,
           **_BART),
    _entry("led", "encoder-decoder", "LEDForConditionalGeneration", "LEDConfig", _TRANSLATED, _TARGET,
           attention_window=[4, 4], max_encoder_position_embeddings=64, max_decoder_position_embeddings=64,
           **{k: v for k, v in _BART.items() if k != "max_position_embeddings"}),
    _entry("m2m_100", "encoder-decoder", "M2M100ForConditionalGeneration", "M2M100Config", _TRANSLATED, _TARGET,
           **_BART),
)  # fmt: skip

_VISION_MODELS = (
    _entry("vit", "vision", "ViTForImageClassification", "ViTConfig", _PIXELS, _TWO, **_IMAGE),
    _entry("deit", "vision", "DeiTForImageClassification", "DeiTConfig", _PIXELS, _TWO, **_IMAGE),
    _entry("beit", "vision", "BeitForImageClassification", "BeitConfig", _PIXELS, _TWO, drop_path_rate=0.0, **_IMAGE),
    _entry("dinov2", "vision", "Dinov2ForImageClassification", "Dinov2Config", _PIXELS, _TWO, mlp_ratio=2, **_IMAGE),
    _entry("swin", "vision", "SwinForImageClassification", "SwinConfig", _PIXELS, _TWO, image_size=32, patch_size=4,
           embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4),
    _entry("convnext", "vision", "ConvNextForImageClassification", "ConvNextConfig", _PIXELS, _TWO,
           hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    _entry("resnet", "vision", "ResNetForImageClassification", "ResNetConfig", _PIXELS, _TWO, embedding_size=16,
           hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"),
    _entry("segformer", "vision", "SegformerForImageClassification", "SegformerConfig", _PIXELS, _TWO,
           num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[16, 32], num_attention_heads=[1, 2], sr_ratios=[4, 2],
           patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=32),
    _entry("mobilenet_v2", "vision", "MobileNetV2ForImageClassification", "MobileNetV2Config", _PIXELS, _TWO,
           image_size=32, depth_multiplier=0.25, min_depth=8),
    _entry("mobilevit", "vision", "MobileViTForImageClassification", "MobileViTConfig", _PIXELS, _TWO, image_size=32,
           hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], num_attention_heads=4,
           mlp_ratio=2.0),
    _entry("pvt", "vision", "PvtForImageClassification", "PvtConfig", _PIXELS, _TWO, image_size=32,
           depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 32, 32], num_attention_heads=[1, 2, 2, 2],
           mlp_ratios=[2, 2, 2, 2]),
    _entry("poolformer", "vision", "PoolFormerForImageClassification", "PoolFormerConfig", _PIXELS, _TWO,
           num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2],
           padding=[2, 1]),
)  # fmt: skip

_AUDIO_MODELS = (
    _entry("wav2vec2", "audio", "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _SPOKEN, _TWO, **_SPEECH),
    _entry("hubert", "audio", "HubertForSequenceClassification", "HubertConfig", _SPOKEN, _TWO, **_SPEECH),
    _entry("wavlm", "audio", "WavLMForSequenceClassification", "WavLMConfig", _SPOKEN, _TWO, **_SPEECH),
    _entry("whisper", "audio", "WhisperForConditionalGeneration", "WhisperConfig",
           {"input_features": _floats(8, 40), "decoder_input_ids": _ids(10)}, _TARGET, num_mel_bins=8,
           max_source_positions=20, max_target_positions=32, bos_token_id=1, eos_token_id=2,
           **{k: v for k, v in _BART.items() if k != "max_position_embeddings"}),
    _entry("audio_spectrogram", "audio", "ASTForAudioClassification", "ASTConfig", {"input_values": _floats(24, 16)},
           _TWO, patch_size=8, frequency_stride=8, time_stride=8, max_length=24, num_mel_bins=16, **_SMALL),
)  # fmt: skip

_LLAVA_IMAGE = VOCABULARY - 1
_MULTIMODAL_MODELS = (
    _entry("clip", "multimodal", "CLIPModel", "CLIPConfig", {**_MASKED, **_PIXELS}, {}, **_CLIP),
    _entry("siglip", "multimodal", "SiglipModel", "SiglipConfig", {"input_ids": _ids(_LENGTH), **_PIXELS}, {},
           text_config={**_TEXT, "max_position_embeddings": 32, "projection_size": 32, "bos_token_id": 1,
                        "eos_token_id": 2, "pad_token_id": 0}, vision_config=_IMAGE),
    _entry("blip", "multimodal", "BlipForConditionalGeneration", "BlipConfig", {**_MASKED, **_PIXELS}, _NEXT,
           text_config={**_TEXT, "encoder_hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2,
                        "max_position_embeddings": 32, "projection_dim": 16},
           vision_config={**_IMAGE, "initializer_range": 0.02}, projection_dim=16, image_text_hidden_size=16),
    _entry("vilt", "multimodal", "ViltForQuestionAnswering", "ViltConfig",
           {**_MASKED, **_PIXELS, "pixel_mask": _ones(32, 32)}, {"labels": _floats(2)}, **{**_IMAGE, **_TEXT}),
    _entry("git", "multimodal", "GitForCausalLM", "GitConfig", {**_MASKED, **_PIXELS}, _NEXT, vision_config=_IMAGE,
           bos_token_id=1, eos_token_id=2, max_position_embeddings=32, **_TEXT),
    _entry("llava", "multimodal", "LlavaForConditionalGeneration", "LlavaConfig",
           {"input_ids": _ids_with([_LLAVA_IMAGE] * 16, 24), "attention_mask": _ones(24), **_PIXELS},
           {"labels": _ids(24)}, text_config={**_DECODER, "model_type": "llama"},
           vision_config={**_IMAGE, "model_type": "clip_vision_model"}, image_token_index=_LLAVA_IMAGE,
           image_seq_length=16, vision_feature_layer=-1),
)  # fmt: skip

_SERIES_MODELS = (
    _entry("patchtst", "time series", "PatchTSTForPrediction", "PatchTSTConfig", {"past_values": _floats(32, 2)},
           {"future_values": _floats(8, 2)}, num_input_channels=2, context_length=32, patch_length=8, patch_stride=8,
           num_hidden_layers=2, d_model=16, num_attention_heads=2, ffn_dim=32, prediction_length=8,
           do_mask_input=False),
    _entry("patchtsmixer", "time series", "PatchTSMixerForPrediction", "PatchTSMixerConfig",
           {"past_values": _floats(32, 2)}, {"future_values": _floats(8, 2)}, num_input_channels=2, d_model=16,
           num_layers=2, prediction_length=8),
    _entry("time_series_transformer", "time series", "TimeSeriesTransformerForPrediction",
           "TimeSeriesTransformerConfig", _FORECAST, {}, **_SERIES),
    _entry("informer", "time series", "InformerForPrediction", "InformerConfig", _FORECAST, {}, sampling_factor=12,
           distil=False, **_SERIES),
    _entry("autoformer", "time series", "AutoformerForPrediction", "AutoformerConfig", _FORECAST, {}, label_length=4,
           moving_average=5, **_SERIES),
)  # fmt: skip

_STATE_SPACE_MODELS = (
    _entry("mamba", "state space", "MambaForCausalLM", "MambaConfig", _PLAIN, _NEXT, vocab_size=VOCABULARY,
           hidden_size=32, num_hidden_layers=2, state_size=8),
    _entry("mamba2", "state space", "Mamba2ForCausalLM", "Mamba2Config", _PLAIN, _NEXT, vocab_size=VOCABULARY,
           hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    _entry("falcon_mamba", "state space", "FalconMambaForCausalLM", "FalconMambaConfig", _PLAIN, _NEXT,
           vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8),
    _entry("rwkv", "state space", "RwkvForCausalLM", "RwkvConfig", _PLAIN, _NEXT, vocab_size=VOCABULARY,
           hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=64, context_length=32),
)  # fmt: skip

_OTHER_MODELS = (
    _entry("perceiver", "other", "PerceiverForSequenceClassification", "PerceiverConfig",
           {"inputs": _ids(_LENGTH), "attention_mask": _padding_mask(_LENGTH)}, _TWO, vocab_size=VOCABULARY,
           num_latents=8, d_latents=32, d_model=16, num_self_attends_per_block=2, num_self_attention_heads=4,
           num_cross_attention_heads=4, max_position_embeddings=32),
    _entry("decision_transformer", "other", "DecisionTransformerModel", "DecisionTransformerConfig",
           {"states": _floats(6, 5), "actions": _floats(6, 3), "rewards": _floats(6, 1),
            "returns_to_go": _floats(6, 1), "timesteps": _ids(6, 0, 32), "attention_mask": _ones(6)}, {},
           state_dim=5, act_dim=3, hidden_size=32, max_ep_len=64, n_layer=2, n_head=4, n_positions=32),
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for group in (
        _TEXT_MODELS,
        _CAUSAL_MODELS,
        _MOE_MODELS,
        _SEQ2SEQ_MODELS,
        _VISION_MODELS,
        _AUDIO_MODELS,
        _MULTIMODAL_MODELS,
        _SERIES_MODELS,
        _STATE_SPACE_MODELS,
        _OTHER_MODELS,
    )
    for architecture in group
}
"""Name to architecture, in the order of the table."""


def names(only: list[str] | None = None) -> list[str]:
    """Return the architectures asked for, all of them without a choice.

    Raises:
        SystemExit: If one is unknown.
    """
    unknown = [name for name in only or [] if name not in ARCHITECTURES]
    if unknown:
        raise SystemExit(f"unknown architecture {unknown[0]!r}; use one of {', '.join(ARCHITECTURES)}")
    return list(only or ARCHITECTURES)
