"""What a training loop does with an optimizer, done with SlowMo: the same bits as torch alone where there is one process."""

import contextlib
import copy
import itertools
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import schedulefree
import torch
import torch.distributed as dist
from loops import IDLE, TORCH, batch, ddp, decay_groups, everywhere, loss_of, net, plain, same, train, weights, wrapped
from processes import spawn
from torch import nn
from torch.utils.checkpoint import checkpoint

import slowmo

BASES = ["local_sgd", "sgp", "osgp", "dpsgd", "allreduce"]
BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["late", "overlap"])


# --- one process: torch's own bits ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("optimizer", TORCH)
def test_one_process_is_torch(optimizer, base, dtype):
    mine, reference = wrapped(optimizer, dtype=dtype, base=base, tau=10**6), plain(optimizer, dtype=dtype)
    assert torch.equal(train(*mine, 7, dtype=dtype), train(*reference, 7, dtype=dtype))
    assert mine[1].steps == 7


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_foreach_and_fused_are_torchs_too(kind, options):
    def make(groups):
        return kind(groups, lr=0.01, weight_decay=0.1, **options)

    mine, expected = train(*wrapped(make, **IDLE), 5), train(*plain(make), 5)
    # a fused kernel steps the last elements of a tensor without vector registers, and rows have other last elements; Adam amplifies
    assert torch.equal(mine, expected) or options.get("fused") and torch.allclose(mine, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_groups_clipping_and_one_cycle_are_torchs(optimizer):
    out = []
    for model, made in (wrapped(optimizer, groups=decay_groups, **IDLE), plain(optimizer, groups=decay_groups)):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(made, max_lr=[0.1, 0.1, 0.2], total_steps=20)
        out.append(train(model, made, 18, clip=0.5, scheduler=scheduler))
        out.append([{k: v for k, v in group.items() if k != "params" and "slowmo" not in k} for group in made.param_groups])
    assert torch.equal(out[0], out[2]) and out[1] == out[3]


def test_alpha_one_beta_zero_alone_is_torch_to_rounding():
    mine = train(*wrapped(groups=decay_groups, base="local_sgd", tau=3, alpha=1.0, beta=0.0, buffers="maintain"), 10, clip=0.5)
    assert same(mine, train(*plain(groups=decay_groups), 10, clip=0.5))


def test_it_is_an_optimizer_with_the_users_own_groups():
    model = net()
    inner = TORCH["adamw"](decay_groups(model))
    made = slowmo.SlowMo(model, inner)
    assert isinstance(made, torch.optim.Optimizer)
    assert made.param_groups is inner.param_groups and all(a is b for a, b in zip(made.param_groups, inner.param_groups))
    assert {p for group in made.param_groups for p in group["params"]} == set(model.parameters())
    assert made.defaults["amsgrad"] is True and "lr" in repr(made)


SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "warm-up": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
}


@pytest.mark.parametrize("over", ["SlowMo", "inner"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_over_slowmo_or_over_the_optimizer_before_it(kind, over, recwarn):
    model = net()
    inner = TORCH["nesterov"](model.parameters())
    if over == "inner":
        scheduler = SCHEDULERS[kind](inner)
    made = slowmo.SlowMo(model, inner, **IDLE)
    if over == "SlowMo":
        scheduler = SCHEDULERS[kind](made)
    mine = train(model, made, 9, scheduler=scheduler)
    reference, other = plain("nesterov")
    assert torch.equal(mine, train(reference, other, 9, scheduler=SCHEDULERS[kind](other)))
    if over == "SlowMo":  # over the inner optimizer torch cannot see that steps are taken
        assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_a_plateau_scheduler_reaches_the_step():
    model, made = wrapped("sgd", **IDLE)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(made, factor=0.0, patience=0, min_lr=0.0, eps=0.0)
    train(model, made, 2)
    for loss in (1.0, 2.0):
        scheduler.step(loss)
    before = weights(model)
    assert made.param_groups[0]["lr"] == 0 and torch.equal(before, train(model, made, range(2, 4)))


def test_closures():
    out = []
    for model, made in (wrapped("adam", **IDLE), plain("adam")):
        losses = []
        for step in range(5):

            def closure():
                made.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            losses.append(made.step(closure).item())
        out += [weights(model), losses]
    assert torch.equal(out[0], out[2]) and out[1] == out[3]


def test_step_hooks_see_whole_steps():
    def run():
        model, made = wrapped("sgd", tau=3, bucket_cap_mb=1e-4)
        seen = []
        made.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append("before"))
        made.register_step_post_hook(lambda optimizer, args, kwargs: seen.append("after"))
        train(model, made, 4)
        return seen

    assert spawn(run, 2) == [["before", "after"] * 4] * 2


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("who", ["optimizer", "model", "nobody"])
def test_whoever_zeroes_gradients(who, set_to_none):
    model, made = wrapped("nesterov", **IDLE)
    for step in range(4):
        if who == "optimizer":
            made.zero_grad(set_to_none=set_to_none)
        if who == "model":
            model.zero_grad(set_to_none=set_to_none)
        loss_of(model, step).backward()
        made.step()
    assert torch.equal(weights(model), train(*plain("nesterov"), 4))


def test_a_step_without_gradients_moves_nothing():
    for model, made in (wrapped("adamw", **IDLE), plain("adamw")):
        train(model, made, 2)
        before = weights(model)
        made.zero_grad()
        made.step()
        assert torch.equal(weights(model), before)
        loss_of(model, 2).backward()
        model.zero_grad()  # a batch that the loop thinks better of
        made.step()
        assert torch.equal(weights(model), before)


def test_an_exception_in_backward_then_going_on():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise KeyError("a bad batch")

    def run(make):
        model, made = make()
        for step in range(5):
            made.zero_grad()
            x, y = batch(step)
            h = model[0](x)
            try:
                h = model[1:](Fails.apply(h) if step == 2 else h)
                model(x)  # the model's own forward, too
                (h - y).square().mean().backward()
            except KeyError:
                continue
            made.step()
        return weights(model)

    def both():
        return run(lambda: wrapped("nesterov", norm=False, base="allreduce", tau=10**6)), everywhere(
            run(lambda: wrapped("nesterov", norm=False, base="local_sgd", tau=10**6))
        )

    assert torch.equal(run(lambda: wrapped("nesterov", norm=False, **IDLE)), run(lambda: plain("nesterov", norm=False)))
    (first, local), (second, _) = spawn(both, 2)
    assert torch.equal(first, second) and not torch.equal(local[0], local[1])


def test_parameters_without_a_gradient_stand_still_as_in_torch():
    def make(kind, base=None):
        model = net()
        model.unused = nn.Linear(4, 4).double()
        model.forward = lambda x: nn.Sequential.forward(nn.Sequential(*[m for name, m in model.named_children() if name != "unused"]), x)
        unused = set(model.unused.parameters())
        groups = [{"params": [p for p in model.parameters() if p not in unused]}, {"params": list(unused), "weight_decay": 0.5}]
        made = TORCH[kind](groups)
        return model, slowmo.SlowMo(model, made, **base) if base else made

    for kind, clip in itertools.product(("nesterov", "adamw"), (None, 1.0)):  # a clip writes to gradients that are not there
        mine = make(kind, IDLE)
        before = mine[0].unused.weight.detach().clone()
        found, expected = train(*mine, 4, clip), train(*make(kind), 4, clip)
        assert torch.equal(found, expected) if clip is None else same(found, expected)  # a norm over more zeros is summed otherwise
        assert torch.equal(mine[0].unused.weight, before)


def test_a_gradient_that_came_and_is_zero_is_a_gradient():
    """Weights decay by it, as in torch: the other factor of a product that begins at zero."""

    def run(make):
        model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).double()
        nn.init.zeros_(model[1].weight)
        made = make(model, torch.optim.AdamW([{"params": list(part.parameters())} for part in model], lr=0.1, weight_decay=0.5))
        before = model[0].weight.detach().clone()
        model(torch.ones(2, 7).double()).sum().backward()
        made.step()
        return model[0].weight / before

    torch.manual_seed(0)
    for options in (IDLE, {**IDLE, "overlap": True}):
        found = run(lambda model, optimizer, options=options: slowmo.SlowMo(model, optimizer, **options))
        torch.testing.assert_close(found, torch.full_like(found, 0.95))
    assert torch.allclose(run(lambda model, optimizer: optimizer), found)


@pytest.mark.parametrize("how", ["new", "data"])
def test_zeros_given_by_hand_are_a_gradient(how):
    def run(make):
        model = net()
        made = make(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5))
        for p in model.parameters():  # there was no backward pass
            if how == "new" or p.grad is None:
                p.grad = torch.zeros_like(p)
            else:
                p.grad.data = torch.zeros_like(p)
        made.step()
        return weights(model)

    assert torch.equal(run(lambda model, optimizer: slowmo.SlowMo(model, optimizer, **IDLE)), run(lambda model, optimizer: optimizer))


def _body_and_head():
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(7, 5), nn.Linear(5, 3)]).double()


def test_a_head_that_is_used_once_stands_still_after_it():
    """Although its momentum would move it, and a clip writes to its gradients in every step."""

    def run(make):
        model = body, head = _body_and_head()
        made = make(model, torch.optim.SGD([{"params": list(part.parameters())} for part in model], lr=0.1, momentum=0.9))
        for step in range(4):
            made.zero_grad()
            h = body(batch(step)[0])
            (head(h) if step == 0 else h).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            made.step()
        return weights(model)

    assert same(run(lambda model, optimizer: slowmo.SlowMo(model, optimizer, **IDLE)), run(lambda model, optimizer: optimizer))


def test_where_gradients_are_averaged_all_ranks_step_or_none():
    """Rank 0's gradient of the head is exactly zero, rank 1 has none."""

    def run():
        model = body, head = _body_and_head()
        groups = [{"params": list(part.parameters())} for part in model]
        made = slowmo.SlowMo(model, torch.optim.SGD(groups, lr=0.1, weight_decay=0.5), "allreduce", tau=10**6)
        for step in range(2):
            h = body(batch(step)[0])
            (h.square().mean() + (0 * head(h).sum() if dist.get_rank() == 0 else 0)).backward()
            made.step()
        return weights(model)

    assert torch.equal(*spawn(run, 2))


# --- accumulation ---


@BOTH
@pytest.mark.parametrize("how", ["accumulate", "no_sync"])
@pytest.mark.parametrize("base", ["allreduce", "local_sgd", "sgp"])
def test_accumulation(base, how, overlap):
    def run():
        model, made = wrapped(
            "nesterov", base=base, tau=10**6, bucket_cap_mb=1e-4, overlap=overlap, **({"accumulate": 3} if how == "accumulate" else {})
        )
        inside, outside, reference = ddp("nesterov")
        alone, local = plain("nesterov")
        for step in range(4):
            made.zero_grad()
            reference.zero_grad()
            local.zero_grad()
            for part in range(3):
                last = part == 2
                with made.no_sync() if how == "no_sync" and not last else contextlib.nullcontext():
                    (loss_of(model, 3 * step + part) / 3).backward()
                with outside.no_sync() if not last else contextlib.nullcontext():
                    (loss_of(outside, 3 * step + part) / 3).backward()
                (loss_of(alone, 3 * step + part) / 3).backward()
            made.step()
            reference.step()
            local.step()
        return weights(model), weights(inside), weights(alone)

    out = spawn(run, 2)
    for mine, averaged, alone in out:
        if base != "sgp":
            assert same(mine, averaged if base == "allreduce" else alone)
    assert base == "sgp" or torch.equal(out[0][0], out[1][0]) == (base == "allreduce")


def test_accumulation_alone_is_torch():
    def go(model, made, context):
        for step in range(4):
            made.zero_grad()
            for part in range(3):
                with context() if part < 2 else contextlib.nullcontext():
                    loss_of(model, 3 * step + part).backward()
            made.step()
        return weights(model)

    expected = go(*plain("adamw"), contextlib.nullcontext)
    model, made = wrapped("adamw", **IDLE)
    assert torch.equal(go(model, made, made.no_sync), expected)
    assert torch.equal(go(*wrapped("adamw", accumulate=3, overlap=True, **IDLE), contextlib.nullcontext), expected)


# --- mixed precision ---


@pytest.mark.parametrize("scaled", [False, True])
def test_a_segment_of_narrow_parameters_alone_is_stepped(scaled):
    """Their gradients are gathered twice, by a scaler's step and by the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5).bfloat16(), nn.Linear(5, 3).bfloat16(), nn.Linear(3, 1)).requires_grad_()
    model.forward = lambda x: model[2](model[1](model[0](x.bfloat16())).float())
    made = torch.optim.SGD([{"params": list(part.parameters())} for part in model], lr=1.0)
    made = slowmo.SlowMo(model, made, **IDLE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=scaled)
    before = [part.weight.detach().clone() for part in model]
    scaler.scale(model(torch.ones(2, 7)).sum()).backward()
    scaler.step(made)
    assert not any(torch.equal(part.weight, weight) for part, weight in zip(model, before))


def test_a_grad_scaler_alone_is_torch():
    out = []
    for model, made in (wrapped("adamw", dtype=torch.float32, **IDLE), plain("adamw", dtype=torch.float32)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(made, 0.9)
        for step in range(8):
            made.zero_grad()
            loss = loss_of(model, step, dtype=torch.float32)
            scaler.scale(loss * (float("inf") if step == 3 else 1)).backward()
            if step % 2:
                scaler.unscale_(made)
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            scaler.step(made)
            scaler.update()
            scheduler.step()
        out += [weights(model), scaler.get_scale()]
    assert torch.equal(out[0], out[2]) and out[1] == out[3]


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("base", ["allreduce", "local_sgd", "sgp", "osgp"])
def test_ranks_agree_on_skipping_a_step(base, unscale):
    """Only rank 1 overflows, at step 2: nobody takes that step, and everybody's counter stays."""

    def run():
        model, made = wrapped("nesterov", base=base, tau=3, beta=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        counts = []
        for step in range(7):
            made.zero_grad()
            bad = step == 2 and dist.get_rank() == 1
            scaler.scale(loss_of(model, step) * (float("inf") if bad else 1)).backward()
            if unscale:
                scaler.unscale_(made)
            scaler.step(made)
            scaler.update()
            counts.append(made.steps)
        mine = weights(model)
        model, made = wrapped("nesterov", base=base, tau=3, beta=0.5)
        return mine, counts, train(model, made, [0, 1, 3, 4, 5, 6])

    for mine, counts, expected in spawn(run, 2):
        assert counts == [1, 2, 2, 3, 4, 5, 6]
        assert same(mine, expected)


def test_a_grad_scaler_with_overlap_raises():
    model, made = wrapped("sgd", overlap=True, **IDLE)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises((RuntimeError, AssertionError), match="overlap|No inf checks"):
        scaler.step(made)


def test_autocast_is_torchs():
    out = []
    for model, made in (wrapped("nesterov", dtype=torch.float32, **IDLE), plain("nesterov", dtype=torch.float32)):
        for step in range(4):
            made.zero_grad()
            x, y = batch(step, dtype=torch.float32)
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(x) - y).square().mean()
            loss.backward()
            made.step()
        out.append(weights(model))
    assert torch.equal(*out)


# --- what else loops do ---


def test_sharpness_aware_double_passes_are_torchs():
    def go(model, made):
        for step in range(4):
            made.zero_grad()
            loss_of(model, step).backward()
            with torch.no_grad():
                moves = [0.05 * p.grad for p in model.parameters()]
                for p, move in zip(model.parameters(), moves):
                    p.add_(move)
            made.zero_grad()
            loss_of(model, step).backward()
            with torch.no_grad():
                for p, move in zip(model.parameters(), moves):
                    p.sub_(move)
            made.step()
        return weights(model)

    assert torch.equal(go(*wrapped("nesterov", **IDLE)), go(*plain("nesterov")))


def test_a_moving_average_of_the_model():
    out = []
    for model, made in (wrapped("nesterov", **IDLE), plain("nesterov")):
        ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        for step in range(5):
            train(model, made, [step])
            ema.update_parameters(model)
        out.append(weights(ema))
        ema.train()
        ema(batch(0)[0]).sum().backward()  # a copy is a model like any other
    assert torch.equal(*out)


def test_a_copy_of_the_model_is_free_of_the_optimizer():
    model, made = wrapped("adamw", tau=2)
    train(model, made, 3)
    size = len(_pickled(net()))
    for copied in (copy.deepcopy(model), made.averaged_model()):
        before = weights(model)
        copied.train()
        other = TORCH["sgd"](copied.parameters())
        train(copied, other, 2)
        assert torch.equal(weights(model), before) and not torch.equal(weights(copied), before)
        assert len(_pickled(copied)) < 1.2 * size  # no momentum, x0 or u came along
        train(copied, slowmo.SlowMo(copied, TORCH["sgd"](copied.parameters())), 2)
    assert made.steps == 3


def _pickled(model) -> bytes:
    import io

    stream = io.BytesIO()
    torch.save(model, stream)
    return stream.getvalue()


def test_the_model_saves_as_a_whole():
    import io

    model, made = wrapped("adamw", tau=2)
    train(model, made, 3)
    loaded = torch.load(io.BytesIO(_pickled(model)), weights_only=False)  # written a line above
    assert torch.equal(weights(loaded), weights(model))
    train(loaded, TORCH["sgd"](loaded.parameters()), 1)


def test_functional_call_and_gradients_of_a_function():
    out = []
    for model, made in (wrapped("sgd", norm=False, **IDLE), plain("sgd", norm=False)):
        for step in range(3):
            x, y = batch(step)
            parameters = dict(model.named_parameters())
            loss = (torch.func.functional_call(model, parameters, (x,)) - y).square().mean()
            made.zero_grad()
            for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(parameters.values()))):
                p.grad = g
            made.step()
        out.append(weights(model))
    assert torch.equal(*out)


def test_tied_weights_stay_tied_and_train_as_in_torch():
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7), nn.Linear(7, 3)).double()
        model[2].weight = model[0].weight
        return model

    model, reference = make(), make()
    made = slowmo.SlowMo(model, TORCH["nesterov"](model.parameters()), **IDLE)
    assert torch.equal(train(model, made, 4), train(reference, TORCH["nesterov"](reference.parameters()), 4))
    assert model[2].weight is model[0].weight


def test_channels_last_survives():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 3)).to(memory_format=torch.channels_last)

    out = []
    for idle in (True, False):
        model = make()
        made = TORCH["nesterov"](model.parameters())
        made = slowmo.SlowMo(model, made, **IDLE) if idle else made
        for step in range(3):
            made.zero_grad()
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(memory_format=torch.channels_last)
            model(x).square().mean().backward()
            made.step()
        assert model[1].weight.is_contiguous(memory_format=torch.channels_last)
        out.append(weights(model))
    assert torch.equal(*out)


@BOTH
@pytest.mark.parametrize("base", ["allreduce", "sgp"])
def test_checkpointing_that_is_not_reentrant(base, overlap):
    def run(recompute):
        model, made = wrapped("nesterov", base=base, tau=4, overlap=overlap, bucket_cap_mb=1e-4)
        first, rest = model[:3], model[3:]
        model.forward = lambda x: rest(checkpoint(first, x, use_reentrant=False) if recompute else first(x))
        return train(model, made, 5)

    assert all(map(torch.equal, spawn(run, 2, True), spawn(run, 2, False)))


@BOTH
@pytest.mark.slow
def test_compiled(overlap):
    model, made = wrapped("nesterov", dtype=torch.float32, norm=False, tau=2, beta=0.5, overlap=overlap)
    reference, other = wrapped("nesterov", dtype=torch.float32, norm=False, tau=2, beta=0.5)
    compiled = torch.compile(model)
    try:
        compiled(batch(0, dtype=torch.float32)[0])
    except Exception as error:
        if "compiler" in str(error).lower() or "Python.h" in str(error):
            pytest.skip(f"torch.compile does not work on this machine: {str(error)[:80]}")
        raise
    made.zero_grad()
    assert torch.allclose(train(compiled, made, 5, dtype=torch.float32), train(reference, other, 5, dtype=torch.float32), atol=1e-5)
    assert made.steps == 5


def test_data_parallel():
    model, made = wrapped("sgd", **IDLE)
    outside = nn.DataParallel(model)
    assert torch.equal(train(outside, made, 3), train(*plain("sgd"), 3))


# --- optimizers that are not torch's elementwise ones ---


class Trust(torch.optim.Optimizer):
    """LARS without momentum, and an argument that must be given."""

    def __init__(self, params, lr, *, coefficient):
        super().__init__(params, {"lr": lr, "coefficient": coefficient})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * (group["lr"] * group["coefficient"] * p.norm() / p.grad.norm().clamp_min(1e-12)))


class Signed(torch.optim.Optimizer):
    """Elementwise, with a state of its own."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p, requires_grad=False))
                    p.sub_(mean.lerp_(p.grad, 0.1).sign(), alpha=group["lr"])


STRANGERS = {
    **({"muon": lambda params: torch.optim.Muon(params, lr=0.02)} if hasattr(torch.optim, "Muon") else {}),  # torch 2.9
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.02),
    "lars": lambda params: Trust(params, lr=0.1, coefficient=0.1),
    "sign": lambda params: Signed(params, lr=0.01),
}


class Twice(torch.optim.Optimizer):
    """Sharpness-aware minimisation, say."""

    def step(self, closure):
        raise AssertionError("never called")


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, lambda params: Twice(params, {"lr": 0.1})])
def test_an_optimizer_that_evaluates_several_times_is_refused_before_the_model_is_touched(kind):
    model = _matrices()
    optimizer, memory = kind(model.parameters()), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ValueError, match="evaluates the loss several times in a step, .* choose SGD, Adam"):
        slowmo.SlowMo(model, optimizer)
    assert [p.data_ptr() for p in model.parameters()] == memory
    replicas = slowmo.Replicas(model, slowmo.Cluster(2))
    with pytest.raises(ValueError, match="evaluates the loss several times"):
        slowmo.LocalSGD(replicas, optimizer, elementwise=True)


def test_schedule_free_steps_as_it_is_and_its_swaps_are_seen():
    """schedulefree by Defazio et al.: eval() and train() of the optimizer itself write the weights."""
    rows = []
    for ours in (True, False):
        model = _matrices()
        inner = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01, foreach=False)
        optimizer = slowmo.SlowMo(model, inner, tau=10**6, buffers="maintain") if ours else inner
        inner.train()
        for step in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
        rows.append(weights(model))
        inner.eval()
        rows.append(weights(model))
        inner.train()
        if ours:
            with pytest.raises(RuntimeError, match=r"rebase\(\)"):
                model(torch.ones(1, 7, dtype=torch.float64))
            optimizer.rebase()
            model(torch.ones(1, 7, dtype=torch.float64))
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[3]) and not torch.equal(rows[0], rows[1])
    with pytest.raises(ValueError, match="leave elementwise out"):
        slowmo.SlowMo(model := _matrices(), schedulefree.SGDScheduleFree(model.parameters()), elementwise=True)


def _matrices():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()


@pytest.mark.parametrize("kind", STRANGERS)
def test_an_optimizer_that_is_not_elementwise_alone_is_itself(kind):
    model, reference = _matrices(), _matrices()
    made = slowmo.SlowMo(model, STRANGERS[kind](model.parameters()), **IDLE)
    assert torch.equal(train(model, made, 5), train(reference, STRANGERS[kind](reference.parameters()), 5))


@pytest.mark.parametrize("kind", STRANGERS)
def test_an_optimizer_that_is_not_elementwise_on_two_ranks_is_local_sgd_of_it(kind):
    def run():
        model, reference = _matrices(), _matrices()
        made = slowmo.SlowMo(model, STRANGERS[kind](model.parameters()), "local_sgd", 3, 1.0, 0.0, "maintain")
        mine = train(model, made, 6)
        other = STRANGERS[kind](reference.parameters())
        for start in (0, 3):
            train(reference, other, range(start, start + 3))
            for p in reference.parameters():
                dist.all_reduce(p.data)
                p.data /= 2
        return mine, weights(reference)

    for mine, expected in spawn(run, 2):
        assert same(mine, expected)


@pytest.mark.parametrize("kind", STRANGERS)
def test_an_optimizer_that_is_not_elementwise_waits_for_the_mean_of_gradients_set_by_hand(kind):
    def run():
        model, reference = _matrices(), _matrices()
        made = slowmo.SlowMo(model, STRANGERS[kind](model.parameters()), **IDLE | {"base": "allreduce"})
        for p, other in zip(model.parameters(), reference.parameters()):
            both = [torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
            p.grad, other.grad = both[dist.get_rank()], sum(both) / 2
        time.sleep(0.3 * dist.get_rank())  # the mean comes late
        made.step()
        STRANGERS[kind](reference.parameters()).step()
        return weights(model), weights(reference)

    for mine, expected in spawn(run, 2):
        assert same(mine, expected)


@pytest.mark.parametrize("base", BASES)
def test_after_an_optimizer_that_is_stepped_whole_has_raised_training_goes_on(base):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["lr"] > 1:
                raise FloatingPointError("the rate is too large")
            return super().step(closure)

    def run():
        model = net()
        made = slowmo.SlowMo(model, Odd(model.parameters(), lr=0.1), base, tau=4)
        for step in range(6):
            made.param_groups[0]["lr"] = 2.0 if step == 2 else 0.1
            made.zero_grad()
            loss_of(model, step, dist.get_rank()).backward()
            with pytest.raises(FloatingPointError) if step == 2 else contextlib.nullcontext():
                made.step()
        return made.steps

    assert spawn(run, 2) == [5, 5]


@pytest.mark.parametrize("kind", STRANGERS)
def test_overlap_of_an_optimizer_that_is_not_known_raises_unless_promised(kind):
    model = _matrices()
    with pytest.raises(ValueError, match="elementwise"):
        slowmo.SlowMo(model, STRANGERS[kind](model.parameters()), overlap=True)
    if kind == "sign":
        model, reference = _matrices(), _matrices()
        made = slowmo.SlowMo(model, Signed(model.parameters(), lr=0.01), overlap=True, elementwise=True, **IDLE)
        assert torch.equal(train(model, made, 5), train(reference, Signed(reference.parameters(), lr=0.01), 5))


def test_a_subclass_is_not_taken_for_its_parent():
    class Clipped(torch.optim.SGD):
        def step(self, closure=None):
            nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], 0.1)
            super().step()

    def make(groups):
        return Clipped(groups, lr=0.1)

    assert torch.equal(train(*wrapped(make, **IDLE), 4), train(*plain(make), 4))
    with pytest.raises(ValueError, match="elementwise"):
        wrapped(make, overlap=True)


# --- the average of the workers ---


def test_the_averaged_model():
    def run():
        model, made = wrapped("nesterov", base="local_sgd", tau=10**6)
        mine = train(model, made, 5)
        before = copy.deepcopy((model.state_dict(), made.state_dict()))
        average = made.averaged_model()
        with made.averaged():
            inside, mode = weights(model), model.training
            statistics = model[1].running_mean.clone()
        untouched = torch.equal(weights(model), mine) and torch.equal(model[1].running_mean, before[0]["1.running_mean"])
        after = train(model, made, range(5, 8))  # evaluation changes nothing
        model, made = wrapped("nesterov", base="local_sgd", tau=10**6)
        expected = train(model, made, 8)
        rows = everywhere(mine)
        means = everywhere(before[0]["1.running_mean"]).mean(0)
        return rows.mean(0), weights(average), inside, untouched, mode, torch.equal(after, expected), statistics, means, rows

    for mean, copied, inside, untouched, mode, same_after, statistics, means, rows in spawn(run, 2):
        assert not torch.equal(rows[0], rows[1])
        assert same(mean, copied) and torch.equal(copied, inside) and same(statistics, means)
        assert untouched and mode and same_after


def test_the_average_is_taken_back_after_an_exception():
    model, made = wrapped(tau=2)
    mine = train(model, made, 3)
    with pytest.raises(ZeroDivisionError), made.averaged():
        raise ZeroDivisionError
    assert torch.equal(weights(model), mine)
    train(model, made, range(3, 6))


def test_every_rank_starts_from_rank_zero():
    def run():
        model, _ = wrapped(seed=dist.get_rank())
        return weights(model)

    first, second = spawn(run, 2)
    assert torch.equal(first, second) and torch.equal(first, weights(net(seed=0)))


# --- refusals ---


def _sparse():
    torch.manual_seed(0)
    return nn.Sequential(nn.EmbeddingBag(9, 4, sparse=True), nn.Linear(4, 3))


def test_sparse_gradients_become_dense_or_raise():
    x = [torch.randint(0, 9, (5, 3), generator=torch.Generator().manual_seed(step)) for step in range(3)]

    def go(model, made, zero):
        for step in range(3):
            zero()
            model(x[step]).square().mean().backward()
            made.step()
        return weights(model)

    model, reference, other = _sparse(), _sparse(), _sparse()
    made = slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), **IDLE)
    plain_made = torch.optim.SGD(reference.parameters(), lr=0.1)
    assert torch.allclose(go(model, made, made.zero_grad), go(reference, plain_made, plain_made.zero_grad))
    made = slowmo.SlowMo(other, torch.optim.SGD(other.parameters(), lr=0.1), **IDLE)
    with pytest.raises((RuntimeError, ValueError), match="sparse"):
        go(other, made, other.zero_grad)  # the gradient is then backward's own tensor


def test_the_meta_device_raises():
    model = nn.Linear(4, 3, device="meta")
    with pytest.raises(ValueError, match="to_empty"):
        slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_complex_parameters_raise():
    model = nn.Linear(4, 3, dtype=torch.complex64)
    with pytest.raises(ValueError, match="real|complex"):
        slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_second_wrapper_over_a_model_raises():
    model, made = wrapped()
    with pytest.raises(ValueError, match="already"):
        slowmo.SlowMo(model, TORCH["sgd"](model.parameters()))
    with pytest.raises(ValueError):
        slowmo.SlowMo(model, made)


def test_a_model_in_ddp_raises():
    def run():
        model = nn.parallel.DistributedDataParallel(net())
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            slowmo.SlowMo(model, TORCH["sgd"](model.parameters()))
        return True

    assert spawn(run, 2) == [True, True]


@pytest.mark.parametrize("base", ["local_sgd", "sgp"])
def test_a_model_that_is_put_into_ddp_afterwards_raises(base):
    """As Accelerate and Lightning do: every gradient would be averaged, and Local SGD were AllReduce without a word."""

    def run():
        model, made = wrapped("sgd", base=base)
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            train(nn.parallel.DistributedDataParallel(model), made, 1)
        return True

    assert spawn(run, 2) == [True, True]


def test_sharded_parameters_raise():
    def run():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = net(torch.float32, norm=False)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(ValueError, match="DTensor|shard"):
            slowmo.SlowMo(model, TORCH["sgd"](model.parameters()))
        return True

    assert spawn(run, 2) == [True, True]


@pytest.mark.parametrize("wrong", [{"base": "adpsgd"}, {"tau": 0}, {"tau": 1.5}, {"alpha": 0}, {"beta": 1.0}, {"beta": -0.1},
                                   {"buffers": "clear"}, {"accumulate": 0}, {"bucket_cap_mb": 0}, {"num_workers": 3},
                                   {"base": "local_sgd", "graph": slowmo.Ring(1)}, {"graph": slowmo.Ring(4)},
                                   {"base": "dpsgd", "graph": slowmo.Exponential(5)}])  # fmt: skip
def test_wrong_options_raise(wrong):
    with pytest.raises(ValueError):
        wrapped(**wrong)


@pytest.mark.parametrize("which", ["some missing", "foreign"])
def test_an_optimizer_over_other_parameters_raises(which):
    model = net()
    parameters = list(model.parameters())[1:] if which == "some missing" else [*model.parameters(), nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="parameters"):
        slowmo.SlowMo(model, TORCH["sgd"](parameters))


def test_groups_cannot_be_added_afterwards():
    _, made = wrapped()
    with pytest.raises((ValueError, RuntimeError), match="wrap"):
        made.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


@pytest.mark.parametrize("base", ["sgp", *(pytest.param(base, marks=pytest.mark.slow) for base in ("local_sgd", "allreduce"))])
def test_a_rank_that_runs_out_of_batches_is_an_error_within_the_timeout(base):
    def run():
        model, made = wrapped("sgd", base=base, tau=3, timeout=2.0)
        if dist.get_rank() == 1:
            train(model, made, 2)
            time.sleep(5)
            return 0.0
        begin = time.monotonic()
        with pytest.raises((RuntimeError, ConnectionError, TimeoutError)) as caught:
            train(model, made, 7)
        assert "batches" in str(caught.value) or "rank" in str(caught.value)
        return time.monotonic() - begin

    def survive():
        try:
            return run()
        finally:
            dist.barrier = lambda *a: None  # the group is broken: nobody can wait for anybody any more

    assert spawn(survive, 2)[0] < 5


# --- files ---


def test_a_saved_model_is_its_own_bytes(tmp_path):
    from safetensors.torch import load_model, save_model

    model, made = wrapped(tau=2)
    train(model, made, 3)
    reference = net()
    torch.save(model.state_dict(), tmp_path / "ours.pt")
    torch.save(reference.state_dict(), tmp_path / "plain.pt")
    assert abs((tmp_path / "ours.pt").stat().st_size - (tmp_path / "plain.pt").stat().st_size) < 100
    save_model(model, str(tmp_path / "ours.safetensors"))
    load_model(reference, str(tmp_path / "ours.safetensors"))
    assert torch.equal(weights(reference), weights(model))
    assert Path(tmp_path / "ours.safetensors").stat().st_size < 10_000


# --- frameworks that put a class of their own around an optimizer ---


def test_a_wrapper_that_borrows_the_class_sees_the_same_optimizer():
    """As LightningOptimizer and _FabricOptimizer do: our class, not our attributes; those come by __getattr__."""

    class Borrows:
        def __init__(self, optimizer):
            self._optimizer = optimizer
            self.__class__ = type("Borrowed", (type(self), type(optimizer)), {})

        def __getattr__(self, name):
            return getattr(self._optimizer, name)

    model, made = wrapped("adamw", tau=2)
    train(model, made, 3)
    borrowed = Borrows(made)
    assert len(borrowed.state) == len(made.state) > 0
    assert len(borrowed.state_dict()["state"]) == len(made.state_dict()["state"])
    with pytest.raises((ValueError, RuntimeError)):
        borrowed.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    saved = copy.deepcopy(made.state_dict())
    borrowed.load_state_dict(saved)
    assert made.steps == 3 and made.param_groups is borrowed.param_groups
    with borrowed.no_sync():
        pass
    borrowed.zero_grad()


@pytest.mark.slow
def test_the_wheel_is_the_library_alone(tmp_path):
    """Built without a network, imported from where nothing else is."""
    root = Path(__file__).parent.parent.parent
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / part, tmp_path)
    for part in ("slowmo", "experiments", "results", "benchmarks", "tests", "scripts"):
        shutil.copytree(root / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q", "-w", tmp_path / "wheels", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options], check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    target = tmp_path / "alone"
    zipfile.ZipFile(wheel).extractall(target)
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} == {"slowmo"}
    assert (target / "slowmo/py.typed").exists()
    # -I: neither the checkout nor the folder we are in
    code = f"import sys; sys.path.insert(0, {str(target)!r}); import slowmo, slowmo.train; print(slowmo.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == str(target / "slowmo/__init__.py")
