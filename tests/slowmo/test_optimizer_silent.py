"""What once trained wrongly without a word. Each test is right with torch alone or DistributedDataParallel, or says what to do."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from loops import IDLE, TORCH, batch, ddp, everywhere, gradients, loss_of, net, plain, same, train, weights, wrapped
from processes import spawn
from torch import nn
from torch.utils.checkpoint import checkpoint

import slowmo

# --- 1: gradients are final when backward returns ---


@pytest.mark.parametrize(
    "options", [{"base": "allreduce"}, {"base": "local_sgd", "num_workers": 1}], ids=["allreduce", "worker of two ranks"]
)
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_clipping_after_averaged_gradients_is_that_of_ddp(options, optimizer):
    def run():
        model, made = wrapped(optimizer, tau=10**6, bucket_cap_mb=1e-4, **options)
        mine = train(model, made, 6, clip=0.3)
        inside, outside, made = ddp(optimizer)
        for step in range(6):
            made.zero_grad()
            loss_of(outside, step).backward()
            nn.utils.clip_grad_norm_(inside.parameters(), 0.3)
            made.step()
        return everywhere(mine), weights(inside)

    for rows, expected in spawn(run, 2):
        assert torch.equal(rows[0], rows[1])
        assert same(rows[0], expected)


def test_gradients_are_those_of_ddp_as_soon_as_backward_returns():
    def run():
        model, _ = wrapped(base="allreduce", bucket_cap_mb=1e-4)
        loss_of(model, 0).backward()
        inside, outside, _ = ddp()
        loss_of(outside, 0).backward()
        return gradients(model), gradients(inside)

    for mine, expected in spawn(run, 2):
        assert mine.norm() > 0 and same(mine, expected)


def test_gradients_are_averaged_where_only_parts_of_the_model_are_called():
    """model.encoder(x), model.head(h): the model's own forward hooks never run, and Lightning's training_step is such a caller."""

    def run():
        model, made = wrapped("sgd", base="allreduce", norm=False, bucket_cap_mb=1e-4)
        reference, plain_made = plain("sgd", norm=False)
        for step in range(3):
            made.zero_grad()
            x, y = batch(step)
            for layer in model:
                x = layer(x)
            (x - y).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            made.step()
            plain_made.zero_grad()
            (sum(loss_of(reference, step, rank) for rank in (0, 1)) / 2).backward()
            nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
            plain_made.step()
        return everywhere(weights(model)), weights(reference)

    for rows, expected in spawn(run, 2):
        assert torch.equal(rows[0], rows[1]) and same(rows[0], expected)


# --- 2: two backward passes in a step ---


@pytest.mark.parametrize("options", [{"base": "allreduce"}, {"base": "local_sgd", "num_workers": 1}], ids=str)
def test_a_second_backward_that_was_not_declared_raises(options):
    def run():
        model, made = wrapped("sgd", tau=5, bucket_cap_mb=1e-4, **options)
        losses = [loss_of(model, half) for half in range(2)]
        losses[0].backward()
        with pytest.raises(RuntimeError, match="accumulate|no_sync"):
            losses[1].backward()
        return True

    assert spawn(run, 2) == [True, True]


@pytest.mark.parametrize("base", ["allreduce", "local_sgd", "sgp"])
def test_a_second_backward_of_a_step_that_backward_takes_raises(base):
    def run():
        model, made = wrapped("sgd", base=base, overlap=True, tau=5, bucket_cap_mb=1e-4)
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="accumulate|no_sync|overlap=False"):
            loss_of(model, 1).backward()
        return True

    assert spawn(run, 2) == [True, True]


@pytest.mark.parametrize("base", ["allreduce", "local_sgd"])
def test_two_rounds_of_forward_and_backward_in_a_step_are_those_of_ddp_or_raise(base):
    def run():
        options = {"base": base} if base == "allreduce" else {"base": base, "num_workers": 1}
        model, made = wrapped("sgd", tau=10**6, bucket_cap_mb=1e-4, **options)
        inside, outside, reference = ddp("sgd")
        for step in range(3):
            made.zero_grad()
            reference.zero_grad()
            for half in range(2):
                loss_of(outside, 2 * step + half).backward()
            try:
                for half in range(2):
                    loss_of(model, 2 * step + half).backward()
            except RuntimeError as error:
                assert "accumulate" in str(error) or "no_sync" in str(error)
                return "refused", None
            made.step()
            reference.step()
        return everywhere(weights(model)), weights(inside)

    for rows, expected in spawn(run, 2):
        assert isinstance(rows, str) or torch.equal(rows[0], rows[1]) and same(rows[0], expected)


def test_late_and_alone_two_backward_passes_add_up_as_in_torch():
    out = []
    for model, made in (wrapped("adamw", **IDLE), plain("adamw")):
        for step in range(4):
            made.zero_grad()
            for half in range(2):
                loss_of(model, 2 * step + half).backward()
            made.step()
        out.append(weights(model))
    assert torch.equal(*out)


# --- 3: parameters that are no longer the ones that were wrapped ---


def _conv():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))


MOVED = {
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "assign": lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
    "data": lambda m: setattr(m[2].weight, "data", m[2].weight.data.clone()),
    "replaced": lambda m: setattr(m[2], "weight", nn.Parameter(m[2].weight.detach().clone())),
    "unfrozen": lambda m: m[0].bias.requires_grad_(True),
    "head": lambda m: m.add_module("3", nn.Linear(2, 2)),
    "new head": lambda m: m.__setitem__(2, nn.Linear(4 * 36, 5)),
    "lora": lambda m: m[2].register_parameter("lora", nn.Parameter(torch.zeros(2, 1))),
}


@pytest.mark.parametrize("when", ["before the first step", "later"])
@pytest.mark.parametrize("change", MOVED)
def test_parameters_changed_after_wrapping_raise(change, when):
    model = _conv()
    model[0].bias.requires_grad_(False)
    made = slowmo.SlowMo(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), tau=2)

    def step():
        made.zero_grad()
        model(torch.randn(2, 3, 8, 8, dtype=next(model.parameters()).dtype)).square().mean().backward()
        made.step()

    if when == "later":
        step()
    MOVED[change](model)
    with pytest.raises(RuntimeError, match="wrap"):
        step()


def test_moving_that_moves_nothing_is_welcome():
    model, made = wrapped(**IDLE)
    reference, other = plain()
    train(model, made, 2)
    model.to(torch.float64).to("cpu").requires_grad_(True)
    train(model, made, range(2, 4))
    assert torch.equal(weights(model), train(reference, other, 4))


def test_a_layer_frozen_later_does_not_move_by_momentum_or_decay():
    model, made = wrapped("nesterov", **IDLE)
    train(model, made, 3)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    try:
        train(model, made, range(3, 6))
    except RuntimeError as error:
        assert "frozen" in str(error)
    assert torch.equal(model[0].weight, before)


# --- 4: the whole of the groups is saved (the rest of checkpoints: test_library_state.py) ---


def test_momentum_that_a_schedule_moves_survives_a_resume():
    def build():
        model, made = wrapped("nesterov", base="sgp", tau=6)
        return model, made, torch.optim.lr_scheduler.OneCycleLR(made, max_lr=0.1, total_steps=24)

    model, made, scheduler = build()
    train(model, made, 10, scheduler=scheduler)
    saved = copy.deepcopy((model.state_dict(), made.state_dict(), scheduler.state_dict()))
    whole = train(model, made, range(10, 20), scheduler=scheduler)
    model, made, scheduler = build()
    for part, state in zip((model, made, scheduler), saved):
        part.load_state_dict(state)
    assert torch.equal(train(model, made, range(10, 20), scheduler=scheduler), whole)


# --- 5: weights loaded after wrapping ---


def test_weights_loaded_after_wrapping_are_where_slow_momentum_starts():
    pretrained = net(seed=5).state_dict()
    after, made = wrapped(tau=2, beta=0.6)
    after.load_state_dict(pretrained)
    before = net()
    before.load_state_dict(pretrained)
    assert torch.equal(
        train(after, made, 7), train(before, slowmo.SlowMo(before, TORCH["nesterov"](before.parameters()), tau=2, beta=0.6), 7)
    )


def test_weights_loaded_into_narrow_layers_are_not_undone_by_a_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6).bfloat16(), nn.Linear(6, 2))  # the row is float32, the first layer a copy of its part
    made = slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=1e-12), tau=2, beta=0.6)
    loaded = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(loaded)
    for _ in range(5):
        made.zero_grad()
        model[1](model[0](torch.randn(4, 6).bfloat16()).float()).square().mean().backward()
        made.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, loaded[name], atol=1e-6), name


def test_weights_written_in_mid_training_raise_until_rebase():
    model, made = wrapped("sgd", tau=2, beta=0.6)
    train(model, made, 3)
    other = net(seed=5)
    model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="rebase"):
        train(model, made, range(3, 4))
    made.rebase()
    made.zero_grad()
    fresh = slowmo.SlowMo(other, TORCH["sgd"](other.parameters()), tau=2, beta=0.6)
    # a new x0 and u = 0; the step counter goes on, so slow steps come after 4, 6, ...: one step to 4, then whole rounds
    mine = train(model, made, range(3, 4))
    plain_model, plain_made = net(seed=5), None
    plain_made = TORCH["sgd"](plain_model.parameters())
    assert same(mine, train(plain_model, plain_made, range(3, 4)))
    assert torch.isfinite(train(other, fresh, range(3, 4))).all()


def test_weights_written_on_one_rank_only_raise_there():
    def run():
        model, made = wrapped("sgd", base="local_sgd", tau=2)
        train(model, made, 1)
        with torch.no_grad():
            model[0].weight.add_(1)
        with pytest.raises(RuntimeError, match="rebase"):
            model(batch(1)[0])
        return True

    assert spawn(run, 2) == [True, True]


# --- 6 ---


@pytest.mark.parametrize("options", [{"base": "allreduce"}, {"base": "local_sgd", "num_workers": 1}, {"base": "allreduce", "overlap": True},
                                     {"base": "sgp", "overlap": True}], ids=str)  # fmt: skip
def test_a_layer_in_two_reentrant_checkpoints_is_right_or_raises(options):
    def loss(layer, rank, reentrant):
        x = torch.randn(16, 10, generator=torch.Generator().manual_seed(rank), dtype=torch.float64, requires_grad=True)
        if reentrant:
            return checkpoint(layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True).square().mean()
        return layer(layer(x)).square().mean()

    def run():
        torch.manual_seed(0)
        layer = nn.Linear(10, 10).double()
        reference = copy.deepcopy(layer)
        made = slowmo.SlowMo(layer, torch.optim.SGD(layer.parameters(), lr=0.05), tau=10**6, **options)
        try:
            loss(layer, torch.distributed.get_rank(), True).backward()
            made.step()
        except RuntimeError as error:
            assert "checkpoint" in str(error) or "overlap=False" in str(error)
            return "refused", None
        plain_made = torch.optim.SGD(reference.parameters(), lr=0.05)
        (sum(loss(reference, rank, False) for rank in (0, 1)) / 2).backward()
        plain_made.step()
        return everywhere(weights(layer)), weights(reference)

    for rows, expected in spawn(run, 2):
        if options.get("overlap"):
            assert rows == "refused"
        else:
            assert isinstance(rows, str) or torch.equal(rows[0], rows[1]) and same(rows[0], expected)


# --- 7 ---


def test_buffers_keep_their_dtype_and_every_bit():
    def run():
        rank = torch.distributed.get_rank()
        model = net(norm=True)
        model.register_buffer("freqs", torch.tensor([1 + 2j], dtype=torch.complex64))
        model.register_buffer("seen", torch.tensor([2**53 + 1]))
        model.register_buffer("flag", torch.tensor([True]))
        made = slowmo.SlowMo(model, TORCH["sgd"](model.parameters()))
        start = model.freqs.clone(), model.seen.clone()
        model.freqs.mul_(1 + 2 * rank)  # 1+2j and 3+6j
        average = made.averaged_model()
        with made.averaged():
            inside = model.freqs.clone(), model.seen.clone(), model.flag.clone()
        return start, (average.freqs, average.seen, average.flag), inside, (model.freqs, model.seen)

    for rank, (start, copied, inside, after) in enumerate(spawn(run, 2)):
        assert start[0].item() == 1 + 2j and start[1].item() == 2**53 + 1
        for freqs, seen, flag in (copied, inside):
            assert freqs.item() == 2 + 4j and freqs.dtype == torch.complex64
            assert seen.item() == 2**53 + 1 and flag.item() is True
        assert after[0].item() == (1 + 2j) * (1 + 2 * rank) and after[1].item() == 2**53 + 1


# --- 8 ---


@pytest.mark.parametrize("overlap", [False, True])
def test_a_backward_through_a_graph_whose_weights_have_changed_raises_as_in_torch(overlap):
    for model, made in (plain("sgd", norm=False), wrapped("sgd", norm=False, overlap=overlap, **IDLE)):
        out = model(batch(0)[0])
        out.square().mean().backward(retain_graph=True)
        made.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), model[0].weight)


@pytest.mark.parametrize("base", ["local_sgd", "sgp", "osgp"])
def test_a_slow_step_bumps_versions_too(base):
    model, made = wrapped("sgd", base=base, tau=1, norm=False)
    before = [p._version for p in model.parameters()]
    train(model, made, 1)
    assert all(p._version > version for p, version in zip(model.parameters(), before))


# --- 9 ---


@pytest.mark.parametrize("what", ["shape", "one element", "count", "slow", "missing", "groups"])
def test_a_state_that_does_not_fit_is_refused_before_anything_is_written(what):
    model, made = wrapped("adamw", tau=3)
    train(model, made, 4)
    wrong = copy.deepcopy(made.state_dict())
    first = next(k for k, s in wrong["state"].items() if s["exp_avg"].ndim == 2)
    if what == "shape":
        wrong["state"][first]["exp_avg"] = wrong["state"][first]["exp_avg"][:1]
    elif what == "one element":
        wrong["state"][first]["exp_avg"] = torch.zeros(1, 1)
    elif what == "count":
        wrong["state"][first]["step"] = torch.zeros(2)
    elif what == "slow":
        wrong["state"][first]["slowmo_x0"] = wrong["state"][first]["slowmo_x0"][:1]
    elif what == "missing":
        del wrong["state"][first]["slowmo_u"]
    else:
        wrong["param_groups"][0]["params"] = wrong["param_groups"][0]["params"][:-1]
    before = copy.deepcopy(made.state_dict())
    with pytest.raises((ValueError, KeyError)):
        made.load_state_dict(wrong)
    assert _equal(before, made.state_dict())


def test_a_state_of_another_model_is_refused():
    model, made = wrapped("adamw", tau=3)
    train(model, made, 2)
    wide = nn.Sequential(nn.Linear(7, 100), nn.LayerNorm(100), nn.Linear(100, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    other = slowmo.SlowMo(wide, TORCH["adamw"](wide.parameters()), tau=3)
    with pytest.raises(ValueError, match="shape"):
        other.load_state_dict(made.state_dict())


# --- also ---


def test_the_inner_optimizer_cannot_be_stepped_by_habit():
    model = net()
    inner = TORCH["sgd"](model.parameters())
    made = slowmo.SlowMo(model, inner, base="sgp")
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="SlowMo"):
        inner.step()
    made.step()


def test_other_shapes_on_another_rank_raise_at_once():
    def run():
        model = nn.Linear(4, 3 + torch.distributed.get_rank())
        with pytest.raises(ValueError, match="rank"):
            slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1))
        return True

    assert spawn(run, 2) == [True, True]


@pytest.mark.parametrize("option", ["tau", "beta", "base", "overlap", "buffers", "lr group"])
def test_other_options_on_another_rank_raise_at_once(option):
    def run():
        rank = torch.distributed.get_rank()
        values = {"tau": (4, 8), "beta": (0.5, 0.6), "base": ("sgp", "osgp"), "overlap": (False, True), "buffers": ("reset", "average")}
        model = net()
        groups = [{"params": list(model.parameters())}]
        if option == "lr group" and rank:
            groups = [{"params": list(model[0].parameters())}, {"params": list(itertools.chain(*(m.parameters() for m in model[1:])))}]
        with pytest.raises(ValueError, match="rank"):
            slowmo.SlowMo(model, TORCH["sgd"](groups), **({option: values[option][rank]} if option in values else {}))
        return True

    assert spawn(run, 2) == [True, True]


def test_a_second_forward_without_a_step_keeps_gradients_as_torch_does():
    out = []
    for model, made in (wrapped("sgd", base="allreduce"), plain("sgd")):
        for step in range(3):
            made.zero_grad()
            loss_of(model, step).backward()
            model(batch(step + 50)[0])  # a look at other data, in training mode
            made.step()
        out.append(weights(model))
    assert torch.equal(*out)


def test_a_learning_rate_that_drops_before_a_slow_step_is_said_to_blow_up_the_slow_momentum():
    library = Path(__file__).parents[2] / "docs" / "library.md"
    text = slowmo.SlowMo.__doc__ + (library.read_text() if library.exists() else "")
    assert "drop" in text and "learning rate" in text


def test_a_slow_step_at_a_learning_rate_of_zero_changes_nothing_and_training_goes_on():
    def run():
        model, made = wrapped("sgd", base="local_sgd", tau=3, beta=0.5, norm=False)
        train(model, made, 5)
        before = weights(model)
        u = [s["slowmo_u"].clone() for s in made.state_dict()["state"].values()]
        made.param_groups[0]["lr"] = 0.0
        train(model, made, range(5, 6))  # a slow step
        kept = torch.equal(weights(model), before) and all(
            map(torch.equal, u, (s["slowmo_u"] for s in made.state_dict()["state"].values()))
        )
        made.param_groups[0]["lr"] = 0.05
        return kept, everywhere(train(model, made, range(6, 9)))

    for kept, rows in spawn(run, 2):
        assert kept
        assert torch.isfinite(rows).all() and torch.equal(rows[0], rows[1])


def _equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b
