"""What the tests run on the ranks of a group: models, plans, and comparisons with plain PyTorch."""

from __future__ import annotations

import copy

import torch
from torch import nn

from autoplace.errors import AutoplaceError
from autoplace.plan import Plan, Replica
from autoplace.runtime.distributed.runner import DistributedModel
from autoplace.runtime.distributed.state import load_checkpoint, save_checkpoint

DistributedModel._bucket_bytes = lambda *_, **__: 700.0  # these small models fill several buckets then


# -- models ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Embedding tied to the head, a skip connection over all blocks, a keyword mask, an unused layer, a buffer."""

    def __init__(self, width=16, words=23, blocks=4):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)
        self.register_buffer("scale", torch.full((width,), 0.5))

    def forward(self, ids, mask=None):
        first = x = self.embed(ids) * self.scale
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        for block in self.blocks:
            x = torch.where(keep[..., None], torch.tanh(block(x)), x)
        return {"scores": self.head(self.norm(x + first).transpose(0, 1)).transpose(0, 1), "hidden": x}


class Counting(nn.Module):
    """Batch norm: statistics and a counter as buffers."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x))))


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(50, 4, sparse=True), nn.Linear(4, 2)

    def forward(self, ids):
        return self.out(self.embed(ids).mean(1))


class Sneaky(nn.Module):
    """Uses parameters without calling the modules that have them, by views, in lists, and in loops of its own."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Linear(6, 8)
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.free = nn.Parameter(torch.ones(8))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        width = self.out.weight.shape[1]
        x = (x @ self.rows.weight.T + self.rows.bias).view(len(x), 2, width // 2).repeat(1, 1, 2)
        x = self.attention(*[self.memory(x)[0] * self.free] * 3)[0]
        total = sum(p.square().sum() for p in self.out.parameters()) * 1e-3
        return nn.functional.linear(x.sum(1), self.out.weight, self.out.bias) + total


class Fussy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 0 and x.shape[0] == 3:
            raise LookupError("three is a crowd")
        return self.b(self.a(x))


MODELS = {"tied": Tied, "counting": Counting, "sparse": Sparse, "fussy": Fussy, "sneaky": Sneaky}


def batch_of(kind, size, seed=0):
    random = torch.Generator().manual_seed(seed)
    if kind == "tied":
        ids = torch.randint(0, 23, (size, 5), generator=random)
        return {"ids": ids, "mask": torch.rand(size, 5, generator=random) > 0.2}, torch.roll(ids, 1, 1)
    if kind == "sparse":
        return torch.randint(0, 50, (size, 3), generator=random), torch.randint(0, 2, (size,), generator=random)
    width = 6 if kind in ("counting", "sneaky") else 4
    x = torch.randn(size, width, generator=random)
    return x, torch.randint(0, 3, (size,), generator=random)


def loss_of(output, targets):
    scores = output["scores"] if isinstance(output, dict) else output
    return nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1))


def model_of(kind, seed=0):
    torch.manual_seed(seed)
    return MODELS[kind]()


# -- plans -------------------------------------------------------------------------------------------------------------


def plan_of(session, shape, kind="tied", microbatches=1):
    names = session.members
    if shape == "single":
        return Plan(replicas=(Replica(assignment={".": names[-1]}),), strategy="test")
    if shape in ("replicas", "sharded", "half sharded"):
        shares = {2: (0.7, 0.3), 3: (0.5, 0.3, 0.2)}[len(names)]
        replicas = tuple(Replica(assignment={".": n}, share=s) for n, s in zip(names, shares, strict=True))
        return Plan(replicas=replicas, strategy="test", sharded={"sharded": 1.0, "half sharded": 0.5}.get(shape, 0.0))
    order = {"stages": (0, 1), "alternating": (0, 1, 0, 1), "backwards": (1, 0), "hybrid": (0, 1)}[shape]
    staged = Replica(assignment=_assignment(kind, [names[i] for i in order]))
    if shape != "hybrid":
        return Plan(replicas=(staged,), strategy="test", microbatches=microbatches)
    whole = Replica(assignment={".": names[2]}, share=0.25)
    staged = Replica(assignment=staged.assignment, share=0.75)
    return Plan(replicas=(staged, whole), strategy="test", microbatches=microbatches)


def _assignment(kind, devices):
    parts = {
        "tied": ["embed", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm", "head"],
        "counting": ["a", "norm", "b"],
        "sparse": ["embed", "out"],
        "fussy": ["a", "b"],
    }[kind]
    return {name: devices[min(i * len(devices) // len(parts), len(devices) - 1)] for i, name in enumerate(parts)}


# -- jobs --------------------------------------------------------------------------------------------------------------


def plain_step(kind, size, steps=1):
    """Return losses, gradients of the last step and the state after SGD with momentum."""
    model = model_of(kind).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0 if kind == "sparse" else 0.9)
    losses = []
    for step in range(steps):
        inputs, targets = batch_of(kind, size, step)
        optimizer.zero_grad()
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        loss = loss_of(output, targets)
        loss.backward()
        losses.append(float(loss.detach()))
        grads = {n: p.grad.to_dense().clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    return losses, grads, {k: v.clone() for k, v in model.state_dict().items()}


def train(session, shape, kind, size, steps, microbatches):
    """Train by `train_step`; return losses, this rank's gradients, the state and its keys."""
    model = model_of(kind, seed=0).train()
    runner = DistributedModel(
        model, plan_of(session, shape, kind, microbatches), session, loss=loss_of,
        batch_norm="local" if kind == "counting" and shape == "replicas" else "whole",
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0 if kind == "sparse" else 0.9)
    losses = []
    try:
        for step in range(steps):
            inputs, targets = batch_of(kind, size, step)
            optimizer.zero_grad()
            losses.append(float(runner.train_step(inputs, targets)))
            held = [n for n, _ in model.named_parameters() if session.rank in runner.holders(n)]
            grads = {
                n: p.grad.to_dense().clone() for n, p in model.named_parameters() if p.grad is not None and n in held
            }
            optimizer.step()
        state = {k: v.clone() for k, v in model.state_dict().items()}
    finally:
        runner.close()
    return losses, grads, state


def call_shards(session, size, accumulate):
    """Run plain calls on shards, as DistributedDataParallel's users do; return gradients."""
    model = model_of("tied").train()
    runner = DistributedModel(model, plan_of(session, "replicas"), session, loss=loss_of)
    try:
        for part, rows in enumerate(accumulate):
            inputs, targets = batch_of("tied", rows, part)
            inputs, targets = runner.shard((inputs, targets))
            with runner.no_sync() if part < len(accumulate) - 1 else torch.enable_grad():
                (loss_of(runner(**inputs), targets) * rows / sum(accumulate)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    finally:
        runner.close()


def counted_calls(session, sizes):
    """Run calls whose sizes nobody told; return gradients."""
    model = model_of("tied").train()
    runner = DistributedModel(model, plan_of(session, "replicas"), session, loss=loss_of)
    try:
        inputs, targets = batch_of("tied", sum(sizes))
        start = sum(sizes[: session.rank])
        rows = slice(start, start + sizes[session.rank])
        loss_of(runner(**{k: v[rows] for k, v in inputs.items()}), targets[rows]).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    finally:
        runner.close()


def infer(session, shape, size, microbatches):
    """Return what a pipeline's call gives on every rank, and plain PyTorch's."""
    model = model_of("tied").eval()
    runner = DistributedModel(model, plan_of(session, shape, "tied", microbatches), session)
    try:
        inputs, _ = batch_of("tied", size)
        with torch.no_grad():
            return runner(**inputs), model(**inputs)
    finally:
        runner.close()


def accumulate_in_stages(session, shape, sizes):
    """Accumulate over `train_step`s, some without synchronising; return this rank's gradients."""
    model = model_of("tied").train()
    runner = DistributedModel(model, plan_of(session, shape, microbatches=1), session, loss=loss_of)
    try:
        for i, size in enumerate(sizes):
            inputs, targets = batch_of("tied", size, i)
            if i in (0, 1):
                with runner.no_sync():
                    runner.train_step(inputs, targets)
            else:
                runner.train_step(inputs, targets)
        return {
            n: p.grad.clone()
            for n, p in model.named_parameters()
            if p.grad is not None and session.rank in runner.holders(n)
        }
    finally:
        runner.close()


def clip(session, shape):
    model = model_of("tied").train()
    runner = DistributedModel(model, plan_of(session, shape), session, loss=loss_of)
    try:
        runner.train_step(*batch_of("tied", 6))
        return float(runner.clip_grad_norm_(0.01))
    finally:
        runner.close()


def refused(session, shape, kind, size, microbatches=1):
    """Return the error that a step raises, on this rank."""
    model = model_of(kind).train()
    runner = None
    try:
        runner = DistributedModel(model, plan_of(session, shape, kind, microbatches), session, loss=loss_of)
        runner.train_step(*batch_of(kind, size))
    except AutoplaceError as error:
        return str(error)
    finally:
        if runner is not None:
            runner.close()
    return ""


def other_plan(session):
    """Give every rank a plan of its own."""
    plan = plan_of(session, "replicas").with_(microbatches=session.rank + 1)
    try:
        DistributedModel(model_of("tied"), plan, session)
    except AutoplaceError as error:
        return str(error)
    return ""


def called_after(session, steps):
    """Call a sharded model after some steps, without and with gradients; return scores, and gradients or an error."""
    model = model_of("tied").train()
    runner = DistributedModel(model, plan_of(session, "sharded"), session, loss=loss_of)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        for step in range(steps):
            optimizer.zero_grad()
            runner.train_step(*batch_of("tied", 6, step))
            optimizer.step()
        inputs, targets = batch_of("tied", 6, steps)
        with torch.no_grad():
            scores = runner(**inputs)["scores"].clone()
        optimizer.zero_grad()
        inputs, targets = runner.shard((inputs, targets))
        loss_of(runner(**inputs), targets).backward()
        return scores, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    except AutoplaceError as error:
        return scores, str(error)
    finally:
        runner.close()


def thawed(session):
    """Train with a frozen layer, which then takes part; return the state."""
    model = model_of("tied").train()
    model.blocks[1].requires_grad_(False)
    runner = DistributedModel(model, plan_of(session, "sharded"), session, loss=loss_of)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    try:
        for step in range(4):
            model.blocks[1].requires_grad_(step > 1)
            optimizer.zero_grad()
            runner.train_step(*batch_of("tied", 6, step))
            optimizer.step()
        return {k: v.clone() for k, v in model.state_dict().items()}
    finally:
        runner.close()


def raises_once(session):
    """Train sharded steps, the loss of one of which raises on all ranks; return the state."""
    calls = []

    def loss(output, targets):
        calls.append(1)
        if len(calls) == 2:
            raise LookupError("once is enough")
        return loss_of(output, targets)

    model = model_of("tied").train()
    runner = DistributedModel(model, plan_of(session, "sharded"), session, loss=loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    try:
        for step in (0, 7, 1, 2):
            optimizer.zero_grad()
            try:
                runner.train_step(*batch_of("tied", 6, step))
            except LookupError:
                continue
            optimizer.step()
        return {k: v.clone() for k, v in model.state_dict().items()}
    finally:
        runner.close()


def owned(session):
    """Return the state's size, in elements, of this rank's optimizer after a sharded step."""
    model = model_of("tied").train()
    runner = DistributedModel(model, plan_of(session, "sharded"), session, loss=loss_of)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    try:
        runner.train_step(*batch_of("tied", 6))
        optimizer.step()
        return sum(s["exp_avg"].numel() for s in optimizer.state.values())
    finally:
        runner.close()


def save_and_load(session, shape, other, folder):
    """Train two steps, save, load under another plan, train a third; return its loss, and the state after."""
    model = model_of("tied").train()
    runner = DistributedModel(model, plan_of(session, shape), session, loss=loss_of)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        runner.train_step(*batch_of("tied", 6, step))
        optimizer.step()
    save_checkpoint(model, folder, optimizer, runner=runner, step=2)
    runner.close()
    fresh = model_of("tied", seed=5).train()
    optimizer = torch.optim.Adam(fresh.parameters(), lr=0.01)
    extra = load_checkpoint(fresh, folder, optimizer)
    runner = DistributedModel(fresh, plan_of(session, other), session, loss=loss_of)
    optimizer.zero_grad()
    loss = float(runner.train_step(*batch_of("tied", 6, extra["step"])))
    optimizer.step()
    state = {k: v.clone() for k, v in fresh.state_dict().items()}
    runner.close()
    return loss, state


def plain_adam(steps):
    model = model_of("tied").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        inputs, targets = batch_of("tied", 6, step)
        optimizer.zero_grad()
        loss = loss_of(model(**inputs), targets)
        loss.backward()
        optimizer.step()
    return float(loss.detach()), copy.deepcopy(model.state_dict())


def agree(session, value):
    try:
        session.agree({"thing": value.format(rank=session.rank)}, what="the ranks disagree")
    except AutoplaceError as error:
        return str(error)
    return ""


def fail_on(session, rank):
    def work():
        if session.rank == rank:
            raise ValueError("only here")
        return session.rank

    try:
        return session.together(work)
    except AutoplaceError as error:
        return str(error)


def measured(session, shapes):
    """Return the Outcomes of plans, and those of a plan that computes something else."""
    from autoplace.runtime.distributed.pool import GroupEvaluator

    inputs, targets = batch_of("tied", 8)
    evaluator = GroupEvaluator(model_of("tied").train(), inputs, session, targets=targets, loss=loss_of)
    plans = [plan_of(session, shape, microbatches=2) for shape in shapes]
    return [(o.feasible, o.reason, o.latency_ms, len(o.samples_ms)) for o in evaluator.evaluate(plans)]


def led(session, shapes):
    """The same, with rank 0 leading."""
    from autoplace.runtime.distributed.pool import GroupEvaluator

    inputs, targets = batch_of("tied", 8)
    evaluator = GroupEvaluator(model_of("tied").train(), inputs, session, targets=targets, loss=loss_of)
    if session.rank:
        evaluator.serve()
        return evaluator.evaluations
    evaluator.lead()
    try:
        evaluator.evaluate([plan_of(session, shape) for shape in shapes])
        evaluator.evaluate([plan_of(session, shapes[0])])
    finally:
        evaluator.dismiss()
    return evaluator.evaluations


def in_lots(session, shapes):
    """Return which shapes were measured beside each other, and the rounds of each."""
    from autoplace.runtime.distributed.pool import GroupEvaluator

    inputs, targets = batch_of("tied", 8)
    asked = []

    def lots(plans):
        asked.append([plan.shape for plan in plans])
        return [[0, 2], [1]]

    evaluator = GroupEvaluator(
        model_of("tied").train(), inputs, session, targets=targets, loss=loss_of, check_samples=2, lots=lots
    )
    outcomes = evaluator.evaluate_interleaved([plan_of(session, shape) for shape in shapes], 3)
    return asked, [(o.feasible, o.reason, len(o.samples_ms)) for o in outcomes]


def dropping(session, shapes, rank_0_alone):
    """Return the counted steps of every shape where the second is dropped after two rounds, all after four."""
    from autoplace.runtime.distributed.pool import GroupEvaluator

    inputs, targets = batch_of("tied", 8)
    evaluator = GroupEvaluator(model_of("tied").train(), inputs, session, targets=targets, loss=loss_of)

    def drop(outcomes):
        rounds = len(outcomes[0].samples_ms)
        return range(len(shapes)) if rounds == 4 else [1] if rounds == 2 else []

    plans = [plan_of(session, shape) for shape in shapes]
    if not rank_0_alone:
        outcomes = evaluator.evaluate_interleaved(plans, 9, drop=drop)
    elif session.rank:
        evaluator.serve()
        return None
    else:
        outcomes = evaluator.lead().evaluate_interleaved(plans, 9, drop=drop)
        evaluator.dismiss()
    return [len(o.samples_ms) for o in outcomes]


def checks(session):
    """Return the shapes that were compared with plain PyTorch, where one of them is measured twice."""
    from autoplace.runtime.distributed.pool import GroupEvaluator

    inputs, targets = batch_of("tied", 8)
    evaluator = GroupEvaluator(model_of("tied").train(), inputs, session, targets=targets, loss=loss_of)
    compare, seen = evaluator._differs, []

    def counted(runner):
        seen.append(runner.plan.shape)
        return compare(runner)

    evaluator._differs = counted
    evaluator.evaluate([plan_of(session, "replicas")])
    outcomes = evaluator.evaluate_interleaved([plan_of(session, s) for s in ("replicas", "single")], 2, settle=1)
    return seen, [(o.feasible, len(o.samples_ms)) for o in outcomes]


def wrong_loss(session):
    """A loss that is a sum, which shares do not weigh."""
    from autoplace.runtime.distributed.pool import GroupEvaluator

    inputs, targets = batch_of("tied", 8)
    evaluator = GroupEvaluator(
        model_of("tied").train(), inputs, session, targets=targets, loss=lambda o, t: loss_of(o, t) * len(t)
    )
    return [o.reason for o in evaluator.evaluate([plan_of(session, "replicas"), plan_of(session, "single")])]


# -- faults ------------------------------------------------------------------------------------------------------------


def _watched(session, shape):
    from autoplace.runtime.distributed.lookout import Lookout

    model = model_of("tied").train()
    lookout = Lookout(session, "a replica", patience_s=2.0)
    return lookout, DistributedModel(model, plan_of(session, shape), session, loss=loss_of, lookout=lookout)


def warm_up(session, shape):
    lookout, runner = _watched(session, shape)
    runner.train_step(*batch_of("tied", 6))
    runner.close()
    lookout.close()


def train_until_told(session, shape, seconds, under_way=None):
    """Train; rank 0 makes a file once all are under way."""
    import time

    lookout, runner = _watched(session, shape)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            runner.train_step(*batch_of("tied", 6))
            runner.model.zero_grad()
            if under_way is not None and session.rank == 0 and lookout.step == 3:
                under_way.touch()
    finally:
        lookout.close()


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x))


def raise_in_a_stage(session):
    """The loss, which the last stage computes, raises in the second step."""
    from autoplace.runtime.distributed.lookout import Lookout

    names = session.members
    plan = Plan(replicas=(Replica(assignment={"a": names[0], "b": names[1]}),), strategy="test")
    calls = []

    def loss(output, targets):
        calls.append(1)
        if len(calls) == 2:
            raise LookupError("three is a crowd")
        return loss_of(output, targets)

    lookout = Lookout(session, patience_s=2.0)
    runner = DistributedModel(Pair().train(), plan, session, loss=loss, lookout=lookout)
    told = ""
    try:
        for _ in range(3):
            runner.train_step(*batch_of("fussy", 4))
    except Exception as error:
        told = str(error)
    finally:
        runner.close()
        lookout.close()
    return told
