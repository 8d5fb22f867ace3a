"""Training over ranks against plain PyTorch on the whole batch, for every shape of plan."""

from __future__ import annotations

import pytest
import torch

SHAPES = ("single", "replicas", "sharded", "half sharded", "stages", "alternating", "backwards")


def _same(found, wanted, keys=None):
    for name in wanted if keys is None else keys:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_gradients_and_states_are_plain_pytorchs(two_ranks, jobs, shape, microbatches):
    losses, grads, state = jobs.plain_step("tied", 6, steps=3)
    results = two_ranks.run(jobs.train, shape, "tied", 6, 3, microbatches)
    for found, _, after in results:
        assert found == pytest.approx(losses, rel=1e-5), "the same loss on every rank"
        assert list(after) == list(state)
        _same(after, state)
    together = {}
    for _, own, _ in results:
        _same(own, grads, own)
        together |= own
    assert together.keys() == grads.keys(), "a parameter that takes no part keeps None"


def test_a_hybrid_sums_over_its_copies(three_ranks, jobs):
    losses, _, state = jobs.plain_step("tied", 8, steps=3)
    for found, _, after in three_ranks.run(jobs.train, "hybrid", "tied", 8, 3, 2):
        assert found == pytest.approx(losses, rel=1e-5)
        _same(after, state)


def test_an_idle_rank_has_the_parameters_too(three_ranks, jobs):
    losses, _, state = jobs.plain_step("tied", 5, steps=2)
    for shape in ("single", "stages", "sharded"):
        for found, _, after in three_ranks.run(jobs.train, shape, "tied", 5, 2, 1):
            assert found == pytest.approx(losses, rel=1e-5)
            _same(after, state)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_batches_that_do_not_divide(two_ranks, jobs, size):
    losses, _, state = jobs.plain_step("tied", size, steps=2)
    for shape in ("replicas", "sharded", "stages"):
        for found, _, after in two_ranks.run(jobs.train, shape, "tied", size, 2, 4):
            assert found == pytest.approx(losses, rel=1e-5)
            _same(after, state)


def test_batch_norm_counts_once_in_a_pipeline_and_is_refused_in_parts(two_ranks, jobs):
    losses, _, state = jobs.plain_step("counting", 8, steps=3)
    for found, _, after in two_ranks.run(jobs.train, "stages", "counting", 8, 3, 1):
        assert found == pytest.approx(losses, rel=1e-5)
        _same(after, state)
        assert after["norm.num_batches_tracked"] == 3
    for shape, parts in (("replicas", 1), ("stages", 2)):
        told = two_ranks.run(jobs.refused, shape, "counting", 8, parts)
        assert "BatchNorm1d computes statistics over the whole batch" in told[0] and told[0] == told[1]
    assert "do not give batch statistics to all" in two_ranks.run(jobs.refused, "sharded", "counting", 8, 1)[0]
    assert two_ranks.run(jobs.train, "replicas", "counting", 8, 2, 1)[0][0], "local statistics, where allowed"


def test_sparse_gradients(two_ranks, jobs):
    losses, _, state = jobs.plain_step("sparse", 6, steps=2)
    for shape in ("replicas", "sharded", "stages"):
        for found, _, after in two_ranks.run(jobs.train, shape, "sparse", 6, 2, 1):
            assert found == pytest.approx(losses, rel=1e-5)
            _same(after, state)


@pytest.mark.parametrize("kind", ["sneaky", "tied"])
def test_sharded_parameters_are_waited_for_wherever_they_are_used(three_ranks, jobs, kind):
    losses, _, state = jobs.plain_step(kind, 7, steps=4)
    for found, _, after in three_ranks.run(jobs.train, "sharded", kind, 7, 4, 1):
        assert found == pytest.approx(losses, rel=1e-5)
        _same(after, state)


def test_sharded_steps_go_on_after_one_that_raised(two_ranks, jobs):
    _, _, state = jobs.plain_step("tied", 6, steps=3)
    for found in two_ranks.run(jobs.raises_once):
        _same(found, state)


def test_sharded_optimizers_divide_their_state(three_ranks, jobs):
    model = jobs.model_of("tied")
    sizes = three_ranks.run(jobs.owned)
    assert sum(sizes) == sum(p.numel() for p in model.parameters()) - 6, "all but the unused layer, once"
    assert max(sizes) < 0.6 * sum(sizes)


def test_a_layer_that_thaws_is_sharded_too(two_ranks, jobs):
    model = jobs.model_of("tied").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        model.blocks[1].requires_grad_(step > 1)
        optimizer.zero_grad()
        inputs, targets = jobs.batch_of("tied", 6, step)
        jobs.loss_of(model(**inputs), targets).backward()
        optimizer.step()
    for found in two_ranks.run(jobs.thawed):
        _same(found, model.state_dict())


def test_calls_of_a_sharded_model_see_the_newest_values(two_ranks, jobs):
    _, _, state = jobs.plain_step("tied", 6)
    plain = jobs.model_of("tied").train()
    _, grads, _ = jobs.plain_step("tied", 6)
    for scores, found in two_ranks.run(jobs.called_after, 0):
        torch.testing.assert_close(scores, plain(**jobs.batch_of("tied", 6)[0])["scores"])
        _same(found, grads)  # whoever trains by calls alone gets all gradients everywhere
    # One step of SGD without momentum.
    plain.load_state_dict(state)
    wanted = plain(**jobs.batch_of("tied", 6, 1)[0])["scores"]
    for scores, sentence in two_ranks.run(jobs.called_after, 1):
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-5)
        assert "train with model.train_step(inputs, targets) all along" in sentence


@pytest.mark.parametrize("sizes", [(6,), (6, 6), (6, 3, 5), (4, 1)])
def test_calls_on_shards_give_the_whole_batchs_gradient(two_ranks, jobs, sizes):
    model = jobs.model_of("tied").train()
    for part, size in enumerate(sizes):
        inputs, targets = jobs.batch_of("tied", size, part)
        (jobs.loss_of(model(**inputs), targets) * size / sum(sizes)).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for found in two_ranks.run(jobs.call_shards, sum(sizes), sizes):
        _same(found, wanted)


def test_ranks_count_samples_where_nobody_told(two_ranks, jobs):
    _, grads, _ = jobs.plain_step("tied", 7)
    for found in two_ranks.run(jobs.counted_calls, (5, 2)):
        _same(found, grads)


@pytest.mark.parametrize("shape", ["stages", "replicas", "sharded", "half sharded"])
def test_gradients_add_up_over_steps(two_ranks, jobs, shape):
    model = jobs.model_of("tied").train()
    for part, size in enumerate((4, 2, 6, 4)):
        inputs, targets = jobs.batch_of("tied", size, part)
        jobs.loss_of(model(**inputs), targets).backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for found in two_ranks.run(jobs.accumulate_in_stages, shape, (4, 2, 6, 4)):
        _same(found, wanted, found)


@pytest.mark.parametrize("shape", ["stages", "replicas", "sharded", "half sharded", "single"])
def test_the_norm_is_taken_over_all_ranks(two_ranks, jobs, shape):
    _, grads, _ = jobs.plain_step("tied", 6)
    norm = float(torch.stack([g.norm() for g in grads.values()]).norm())
    assert two_ranks.run(jobs.clip, shape) == pytest.approx([norm, norm], rel=1e-4)


@pytest.mark.parametrize("shape", ["stages", "alternating"])
def test_outputs_come_back_to_every_caller(two_ranks, jobs, shape):
    for found, wanted in two_ranks.run(jobs.infer, shape, 6, 2):
        assert list(found) == list(wanted)
        _same(found, wanted)


def test_what_a_model_refuses_is_the_same_sentence_on_all_ranks(two_ranks, jobs):
    first, second = two_ranks.run(jobs.refused, "stages", "fussy", 4)
    assert "does not split into stages" in first and first == second


def test_ranks_with_other_plans_say_so(two_ranks, jobs):
    first, second = two_ranks.run(jobs.other_plan)
    assert "do not run the same plan and model: plan is" in first and first == second


@pytest.mark.parametrize(
    ("shape", "other"),
    [("stages", "replicas"), ("replicas", "backwards"), ("stages", "single"), ("half sharded", "stages"),
     ("replicas", "sharded")],
)  # fmt: skip
def test_a_checkpoint_goes_on_under_another_plan(two_ranks, jobs, tmp_path, shape, other):
    loss, state = jobs.plain_adam(3)
    for found, after in two_ranks.run(jobs.save_and_load, shape, other, str(tmp_path / "checkpoint")):
        assert found == pytest.approx(loss, rel=1e-4)
        _same(after, state)


def test_a_checkpoint_of_two_ranks_loads_on_three_and_on_one(two_ranks, three_ranks, jobs, tmp_path):
    two_ranks.run(jobs.save_and_load, "stages", "stages", str(tmp_path / "c"))
    from autoplace.errors import InputError
    from autoplace.runtime.distributed.state import load_checkpoint

    model = jobs.model_of("tied", seed=9)
    optimizer = torch.optim.Adam(model.parameters())
    assert load_checkpoint(model, tmp_path / "c", optimizer) == {"step": 2}
    _same(model.state_dict(), jobs.plain_adam(2)[1])
    assert optimizer.state[model.embed.weight]["step"] == 2
    with pytest.raises(InputError, match="no complete checkpoint"):
        load_checkpoint(model, tmp_path / "nothing")
    with pytest.raises(InputError, match="of another model"):
        load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "c")
