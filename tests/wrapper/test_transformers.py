"""`transformers` models: generation with a cache, model outputs, gradient checkpointing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 7, 9, 11], [3, 4, 8, 2]])


def _gpt2(**options):
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=49, **options
    )
    return transformers.GPT2LMHeadModel(config)


def _t5(**options):
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, **options
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.fixture(params=[_gpt2, _t5], ids=["gpt2", "t5"])
def build(request):
    return request.param


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("shape", ["single", "replicas", "stages"])
def test_generate_gives_the_models_tokens(wrap, build, shape, settings):
    model = build().eval()
    wrapper = wrap(model, shape)
    settings = {"max_new_tokens": 6, "pad_token_id": 0, **settings}
    torch.manual_seed(1)
    expected = model.generate(IDS, **settings)
    torch.manual_seed(1)
    assert torch.equal(wrapper.generate(IDS, **settings), expected)
    inputs = {"input_ids": IDS, **({"labels": IDS} if build is _t5 else {})}
    with torch.no_grad():
        wrapper(**inputs, use_cache=False)
    torch.manual_seed(1)
    assert torch.equal(wrapper.generate(IDS, **settings), expected), "after the plan was installed, too"


def test_a_loop_of_calls_with_a_cache_gives_the_models_tokens(wrap, shape):
    model = _gpt2().eval()
    wrapper = wrap(model, shape)

    def tokens(call):
        ids, cache, found = IDS, None, []
        with torch.no_grad():
            for _ in range(4):
                output = call(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
                found.append(ids)
        return torch.cat(found, 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a plan may refuse a cache, and says so
        assert torch.equal(tokens(wrapper), tokens(model))


def test_training_steps_are_the_models(wrap, build, same_step, strict, shape):
    model = build().eval()  # no dropout; gradients are on
    wrapper = wrap(model, shape)
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    output = wrapper(**inputs)
    assert type(output) is type(model(**inputs)) and output["loss"] is output.loss
    same_step(wrapper, **inputs, pick=lambda out: out.logits, rtol=1e-4, atol=1e-5)
    same_step(wrapper, **inputs, pick=lambda out: out.loss, rtol=1e-4, atol=1e-5)
    assert model.get_input_embeddings() is wrapper.get_input_embeddings()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_is_kept(wrap, shape, when, reentrant):
    model = _gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    wrapper = wrap(model, shape)
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    if when == "after":
        wrapper(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapper.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        twin, runs = copy.deepcopy(model), []
        wrapper(**inputs).loss.backward()
        model.zero_grad()
        for mlp in (m for m in model.modules() if type(m).__name__ == "GPT2MLP"):
            original = mlp.act.forward
            mlp.act.forward = lambda x, call=original: runs.append(len(x)) or call(x)
        wrapper(**inputs).loss.backward()
        twin(**inputs).loss.backward()
    assert sum(runs) == 2 * 2 * len(IDS), "two layers, forward and recomputation"
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_save_pretrained_and_resizing_reach_the_model(wrap, tmp_path):
    model = _gpt2().eval()
    wrapper = wrap(model)
    wrapper.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(wrapper.state_dict())
    wrapper.resize_token_embeddings(60)
    assert wrapper.lm_head.weight is model.transformer.wte.weight and model.lm_head.out_features == 60
    inputs = {"input_ids": IDS, "use_cache": False}
    with torch.no_grad():
        torch.testing.assert_close(wrapper(**inputs).logits, model(**inputs).logits)
