"""What loops do between backward, step and evaluation, and how a wrapper comes and goes: found by reading, each with what went wrong."""

import copy
import gc
import pickle

import pytest
import torch
import torch.distributed as dist
from loops import IDLE, batch, gradients, loss_of, net, plain, same, train, weights, wrapped
from processes import spawn
from torch import nn
from torch.utils.checkpoint import checkpoint

import slowmo

AVERAGING = pytest.mark.parametrize("options", [{"base": "allreduce"}, {"base": "local_sgd", "num_workers": 1}], ids=["allreduce", "ranks"])


class Narrow(nn.Module):
    """A layer in bfloat16 before one in float32: the first has a master weight in its row."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.narrow, self.wide = nn.Linear(7, 5).bfloat16(), nn.Linear(5, 3)

    def forward(self, x):
        return self.wide(self.narrow(x.bfloat16()).float())


def narrow(seed=0, lr=0.05, **options):
    model = Narrow(seed)
    return model, slowmo.SlowMo(model, torch.optim.AdamW(model.parameters(), lr=lr), **({"base": "local_sgd", "tau": 4} | options))


# --- gradients between backward and step ---


def after_backward(options, change):
    """How far the weights move in a step, and the norm that clipping sees."""
    model = Narrow()
    made = slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=1.0), tau=1000, **options)
    before = weights(model).clone()
    made.zero_grad()
    loss_of(model, 0, rank=0, dtype=torch.float32).mul(100).backward()  # the same on all ranks: the mean is each one's
    norm = None
    if change == "clip":
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    for p in model.parameters():
        if change == "new":
            p.grad = p.grad.clamp(-1e-3, 1e-3)
        elif change == "data":
            p.grad.data = p.grad.data.clamp(-1e-3, 1e-3)
        elif change == "data in place":
            p.grad.data.clamp_(-1e-3, 1e-3)
        elif change in ("gone", "another"):
            p.grad = None
            p.grad = torch.full_like(p, 1e-3) if change == "another" else None  # perhaps in the same memory
    made.step()
    return float((weights(model) - before).abs().max()), norm


@pytest.mark.parametrize("change", ["clip", "new", "data", "data in place", "another", "gone"])
@AVERAGING
def test_what_is_done_to_averaged_gradients_counts(options, change):
    """In every dtype, however it is done."""
    moved, norm = spawn(after_backward, 2, options, change)[0]
    alone, expected = after_backward({"base": "local_sgd"}, change)
    assert moved == pytest.approx(alone, rel=1e-2) and moved < 0.02 and (norm is None or norm == pytest.approx(expected, rel=1e-2))
    assert change != "gone" or moved == 0


def test_a_gradient_that_was_dropped_by_the_model_is_not_added_again():
    def drops(options):
        model = Narrow()
        made = slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=1.0), tau=1000, **options)
        loss_of(model, 0, rank=0, dtype=torch.float32).mul(1000).backward()
        model.zero_grad()
        loss_of(model, 1, rank=0, dtype=torch.float32).backward()
        before = weights(model).clone()
        made.step()
        return float((weights(model) - before).abs().max())

    assert spawn(drops, 2, {"base": "allreduce"})[0] == pytest.approx(drops({"base": "local_sgd"}), rel=1e-2)


@pytest.mark.parametrize("overlap", [False, True], ids=["late", "overlap"])
def test_a_learning_rate_set_just_before_the_step_stays(overlap):
    model, made = wrapped("sgd", **IDLE, overlap=overlap)
    for step in range(4):
        made.zero_grad()
        loss_of(model, step).backward()
        made.param_groups[0]["lr"] *= 0.5
        made.step()
    assert made.param_groups[0]["lr"] == 0.05 / 16


def test_gradients_of_gradients():
    model, made = wrapped("sgd", **IDLE)
    for step in range(3):
        loss_of(model, step).backward(create_graph=True)
        made.step()
        made.zero_grad()
    reference, other = plain("sgd")
    assert made.steps == 3 and torch.equal(weights(model), train(reference, other, 3))


# --- buffers="average" where ranks train different parts ---


class Heads(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, size) for size in sizes)

    def forward(self, x, head):
        return self.heads[head](self.body(x))


def trains_a_head(sizes, kind):
    model, rank = Heads(sizes), dist.get_rank()
    groups = [{"params": part.parameters()} for part in (model.body, *model.heads)]
    made = slowmo.SlowMo(model, kind(groups), base="local_sgd", tau=2, beta=0.0, buffers="average", timeout=20)
    seen = []
    for _ in range(2):
        made.zero_grad()
        (model(torch.ones(8, 4), rank).sum() * (1 + 99 * rank)).backward()
        made.step()
        states = [made.state[head.weight] for head in model.heads]
        seen.append([{k: v.clone() for k, v in state.items() if k in ("momentum_buffer", "exp_avg")} for state in states])
    return seen


@pytest.mark.parametrize("kind", [lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9), torch.optim.Adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("sizes", [(4, 4), (4, 7)], ids=["alike", "of other shapes"])
def test_buffers_are_averaged_with_their_own(sizes, kind):
    """A rank that has no momentum of a head takes part with zeros, in the same order as the others."""
    results = spawn(trains_a_head, 2, sizes, kind)
    for head in range(2):
        first, second = (result[1][head] for result in results)
        assert first.keys() == second.keys() and len(first) == 1
        (a,), (b,) = first.values(), second.values()
        assert torch.equal(a, b) and a.shape == (sizes[head], 4) and a.abs().min() > 0
    sizes_of = [float(next(iter(results[0][1][head].values())).norm()) for head in range(2)]
    assert sizes_of[1] > 20 * sizes_of[0]  # the second one's loss is a hundred times as large


class Lion(torch.optim.Optimizer):
    """Not known to be elementwise."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p, dtype=torch.float32))
                    momentum.lerp_(p.grad.float(), 0.5)
                    p.sub_(momentum.sign(), alpha=group["lr"])


def whole_average(sizes, dtype):
    model, rank = Heads(sizes).to(dtype), dist.get_rank()
    groups = [{"params": part.parameters()} for part in (model.body, *model.heads)]
    made = slowmo.SlowMo(model, Lion(groups), base="local_sgd", tau=2, beta=0.0, buffers="average", timeout=20)
    for _ in range(2):
        made.zero_grad()
        model(torch.ones(8, 4, dtype=dtype), rank).sum().backward()
        made.step()
    return [made.state[part.bias].get("momentum") for part in model.heads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_buffers_of_an_optimizer_that_is_not_elementwise_too(dtype):
    """What a rank has is averaged with the zeros of the one that has none: its momentum of 8, over two steps, is 4 and 6."""
    for rank, found in enumerate(spawn(whole_average, 2, (4, 7), dtype)):
        assert torch.equal(found[rank], torch.full(((4, 7)[rank],), 3.0)) and found[1 - rank] is None


# --- evaluation ---


@pytest.mark.parametrize("order", ["model first", "optimizer first", "model alone"])
def test_loaded_weights_of_a_narrow_layer_are_what_is_evaluated(order):
    model, made = narrow()
    train(model, made, 6, dtype=torch.float32)
    saved, state = copy.deepcopy(model.state_dict()), made.state_dict()
    x = batch(9, dtype=torch.float32)[0]
    expected = model(x).detach()
    model, made = narrow(seed=1)
    parts = [lambda: model.load_state_dict(saved), lambda: made.load_state_dict(state)]
    for part in {"model first": parts, "optimizer first": parts[::-1], "model alone": parts[:1]}[order]:
        part()
    assert torch.equal(made.averaged_model()(x), expected)
    with made.averaged() as averaged:
        assert torch.equal(averaged.eval()(x), expected)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_an_evaluation_does_not_hide_that_weights_were_written():
    model, made = wrapped(**IDLE)
    train(model, made, 2)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="written from outside"), made.averaged():
        pass
    with pytest.raises(RuntimeError, match="written from outside"):
        made.averaged_model()
    made.accept()
    made.averaged_model()
    train(model, made, range(2, 4))


def test_a_clamp_of_the_loops_own_keeps_the_slow_momentum():
    model, made = wrapped("sgd", base="local_sgd", tau=2, beta=0.5)
    train(model, made, 2)
    for step in range(2, 6):
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.3, 0.3)
        made.accept()
        train(model, made, range(step, step + 1))
    assert made.steps == 6 and all(state["slowmo_u"].abs().max() > 0 for state in made.state.values())


def test_the_averaged_model_is_a_copy_of_the_model_as_it_is():
    """With what is not trained and not saved: frozen parameters, tables, plain attributes."""
    model = nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 3))
    model[1].requires_grad_(False)
    model.register_buffer("table", torch.zeros(1), persistent=False)
    made = slowmo.SlowMo(model, torch.optim.SGD(model[0].parameters(), lr=0.1), **IDLE)
    made.averaged_model()
    with torch.no_grad():
        model[1].weight.add_(1)
    model.table.add_(4)
    model.temperature = 0.5
    copied = made.averaged_model()
    assert torch.equal(copied[1].weight, model[1].weight) and copied.table == 4 and copied.temperature == 0.5 and not copied.training


def test_inference_mode_and_training_may_alternate():
    model, made = wrapped(base="local_sgd", tau=2)
    for step in range(3):
        with torch.inference_mode():
            made.averaged_model()(batch(step)[0])
            made.rebase()
            made.load_state_dict(made.state_dict())
        made.averaged_model()
        train(model, made, range(step, step + 1))
    assert made.steps == 3


@pytest.mark.parametrize("base", ["local_sgd", "osgp"])
def test_a_step_that_a_scaler_skipped_can_be_followed_by_an_evaluation(base):
    def skips():
        model, made = wrapped("sgd", base=base, tau=4)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(loss_of(model, 0) * float("inf")).backward()
        scaler.step(made)
        scaler.update()
        with made.averaged():
            pass
        model(batch(1)[0])  # a training forward that nothing follows
        with made.averaged():
            pass
        train(model, made, range(2, 5))
        return made.steps

    assert spawn(skips, 2) == [3, 3]


def test_evaluations_may_stand_inside_each_other():
    model, made = wrapped(base="local_sgd", tau=2)
    train(model, made, 3)
    before = weights(model).clone()
    with made.averaged():
        best = copy.deepcopy(made.averaged_model().state_dict())
        with made.averaged() as again:
            assert torch.equal(weights(again), before)
        with pytest.raises(RuntimeError, match=r"inside averaged\(\): call model.eval"):
            loss_of(model, 3)  # in training mode: from the average there is no way back
    assert torch.equal(weights(model), before) and best.keys() == model.state_dict().keys()
    train(model, made, range(3, 5))


def test_a_model_frozen_for_its_evaluation_trains_on():
    model, made = wrapped(**IDLE)
    train(model, made, 2)
    model.requires_grad_(False)
    with made.averaged():
        made.averaged_model()
    model.requires_grad_(True)
    train(model, made, range(2, 4))


def test_an_evaluation_that_ranks_reach_in_different_places_is_an_error_on_all():
    """Before anybody waits for a message that the others never sent."""

    def reaches():
        model, made = wrapped("sgd", base="osgp", tau=4, timeout=30.0)
        train(model, made, 1)
        if dist.get_rank() == 0:
            model(batch(0)[0])  # a trace, say
        with pytest.raises(RuntimeError, match="on some ranks, not on others"), made.averaged():
            pass

    spawn(reaches, 2)


# --- weights that are written ---


def test_perturbed_gradients_of_the_first_step_do_not_move_where_the_round_begins():
    """Sharpness-aware minimisation: backward, away, backward, back, step."""
    model, made = wrapped("sgd", base="local_sgd", tau=3)
    start = weights(model).clone()
    loss_of(model, 0).backward()
    away = [0.5 * p.grad for p in model.parameters()]
    with torch.no_grad():
        for p, e in zip(model.parameters(), away):
            p.add_(e)
    made.zero_grad()
    loss_of(model, 0).backward()
    with torch.no_grad():
        for p, e in zip(model.parameters(), away):
            p.sub_(e)
    made.step()
    x0 = torch.cat([made.state[p]["slowmo_x0"].flatten() for p in model.parameters()])
    assert (x0 - start).abs().max() < 1e-12


def test_a_clamp_of_some_elements_keeps_the_digits_of_the_others():
    def trained(clamp):
        model = Narrow()
        model.narrow.requires_grad_(True)
        made = slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=1e-4), **IDLE)
        for step in range(30):
            train(model, made, range(step, step + 1), dtype=torch.float32)
            with torch.no_grad():
                if clamp:
                    model.narrow.weight[0, 0] = 0.5
                made.accept()
        return made.replicas.named([segment.x for segment in made.replicas.segments], 0)["narrow.bias"][1:].clone()

    start = Narrow().narrow.bias[1:].float()
    moved, expected = trained(True) - start, trained(False) - start
    assert expected.abs().min() > 0 and torch.allclose(moved, expected, rtol=0.2)


@pytest.mark.parametrize("base", ["local_sgd", "sgp", "osgp", "dpsgd"])
def test_rebase_after_a_forward_pass_starts_from_the_weights_alone(base):
    """What OSGP has sent before is of the old ones."""

    def writes():
        model, made = wrapped("sgd", base=base, tau=100)
        train(model, made, 1)
        model(batch(1)[0])
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(10.0)
        made.rebase()
        for group in made.param_groups:
            group["lr"] = 1e-12
        train(model, made, range(2, 3))
        return float((weights(model) - 10).abs().max())

    assert max(spawn(writes, 2)) < 1e-6


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("tau", [1, 2])
def test_weights_loaded_after_a_dry_run_are_where_the_round_begins(tau, evaluated):
    model, made = wrapped("sgd", base="local_sgd", tau=tau, beta=0.9)
    model(batch(0)[0])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(10)
    if evaluated:
        made.averaged_model()
    for group in made.param_groups:
        group["lr"] = 1e-12
    before = weights(model).clone()
    train(model, made, 4)
    assert (weights(model) - before).abs().max() < 1e-6


def test_a_resumed_narrow_layer_keeps_its_master_weights():
    """At a rate below what bfloat16 can tell in a step."""

    def moved(resume):
        model, made = narrow(lr=2e-4)
        for part in range(10):
            train(model, made, range(10 * part, 10 * part + 10), dtype=torch.float32)
            if resume:
                saved = copy.deepcopy(model.state_dict()), made.state_dict()
                model, made = narrow(seed=1, lr=2e-4)
                model.load_state_dict(saved[0])
                made.load_state_dict(saved[1])
        return weights(model)

    assert torch.equal(moved(True), moved(False))


# --- the wrapped optimizer, and wrapping again ---


def test_the_wrapped_optimizers_own_calls_are_slowmos():
    model = net()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    made = slowmo.SlowMo(model, inner, **IDLE)
    train(model, made, 3)
    state = inner.state_dict()
    assert state["state"].keys() == made.state_dict()["state"].keys() and state["param_groups"][0]["slowmo_steps"] == 3
    train(model, made, range(3, 5))
    inner.load_state_dict(state)
    assert made.steps == 3 and all(float(values["step"]) == 3 for values in made.state.values())
    with pytest.raises(ValueError, match="wrap"):
        inner.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_a_state_that_is_refused_changes_nothing():
    model, made = wrapped("adam", **IDLE)
    train(model, made, 2)
    before, other = made.state_dict(), made.state_dict()
    other["state"][0]["step"] = torch.tensor(9.0)
    for values in other["state"].values():
        values["exp_avg"] += 5
    with pytest.raises(ValueError, match="different numbers of steps"):
        made.load_state_dict(other)
    after = made.state_dict()
    assert all(torch.equal(before["state"][p][key], value) for p, values in after["state"].items() for key, value in values.items())


def test_a_tensor_as_learning_rate_is_not_shared_with_a_loaded_state():
    model, made = wrapped(lambda groups: torch.optim.Adam(groups, lr=torch.tensor(0.1)), **IDLE)
    state = made.state_dict()
    made.load_state_dict(state)
    made.param_groups[0]["lr"].mul_(0.5)
    assert float(state["param_groups"][0]["lr"]) == pytest.approx(0.1) and made.state[nn.Parameter(torch.ones(1))] == {}


class Keeper(torch.optim.Optimizer):
    """Keeps what it likes."""

    def __init__(self, params, kept):
        super().__init__(params, {"kept": kept})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                assert self.state[p].setdefault("kept", copy.deepcopy(group["kept"])) == group["kept"]
                assert type(self.state[p]["kept"]) is type(group["kept"])


@pytest.mark.parametrize("kept", [3, None, "word", [1.0, 2.0], {"a": 1}], ids=str)
def test_any_state_of_an_optimizer_comes_back(kept):
    model, made = wrapped(lambda groups: Keeper(groups, kept), **IDLE)
    train(model, made, 2)
    state = made.state_dict()
    model, made = wrapped(lambda groups: Keeper(groups, kept), **IDLE)
    made.load_state_dict(state)
    assert all(values["kept"] == kept for values in made.state.values())
    train(model, made, range(2, 4))
    made.load_state_dict(wrapped(lambda groups: Keeper(groups, kept), **IDLE)[1].state_dict())  # of before the first step
    assert not made.state


@pytest.mark.parametrize(
    "wrong", [{"beta": 1.0}, {"tau": 0}, {"buffers": "none"}, {"base": "sgp", "graph": slowmo.Ring(3)}], ids=lambda wrong: list(wrong)[-1]
)
def test_after_a_refusal_the_corrected_call_works(wrong):
    model, seen = net(), []
    inner = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, inner, 3)
    inner.register_step_post_hook(lambda *_: seen.append(1))
    with pytest.raises(ValueError) as refusal:  # held, as a notebook holds the last error
        slowmo.SlowMo(model, inner, **wrong)
    loss_of(model, 0).backward()
    inner.step()
    assert seen == [1] and refusal
    made = slowmo.SlowMo(model, inner, **IDLE)
    train(model, made, 2)
    assert made.steps == 2 and len(seen) == 3 and {float(values["step"]) for values in made.state.values()} == {6.0}


def test_a_gradient_of_another_dtype_by_its_data_counts_once_in_every_step():
    model, made = wrapped("sgd", **IDLE)
    reference, torchs = plain("sgd")
    for step in range(3):
        loss_of(model, step).backward()
        loss_of(reference, step).backward()
        for p, other in zip(model.parameters(), reference.parameters()):
            p.grad.data = p.grad.data.half()
            other.grad = other.grad.half().double()
        made.step()  # zeroes gradients, wherever they are
        torchs.step()
        torchs.zero_grad()
        assert torch.equal(weights(model), weights(reference))


def test_a_gradient_from_before_wrapping_is_dropped():
    def trained(earlier):
        model = Narrow()
        if earlier:
            loss_of(model, 9, dtype=torch.float32).backward()
        made = slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), **IDLE)
        loss_of(model, 0, dtype=torch.float32).backward()
        made.step()
        return weights(model)

    assert torch.equal(trained(True), trained(False))


def test_an_optimizer_belongs_to_one_wrapper():
    model, made = wrapped(**IDLE)
    with pytest.raises(ValueError, match="which has its state"):
        slowmo.SlowMo(net(), made.inner_optimizer, **IDLE)


def test_a_model_may_be_wrapped_again_when_its_wrapper_is_gone():
    model, made = wrapped(**IDLE)
    train(model, made, 2)
    with pytest.raises(ValueError, match="already in the hands"):
        slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), **IDLE)
    del made
    gc.collect()
    model[0].requires_grad_(False)
    again = slowmo.SlowMo(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), **IDLE)
    train(model, again, range(2, 4))
    assert again.steps == 2


def test_a_discriminator_may_be_frozen_while_its_generator_learns():
    generator, discriminator = net(norm=False), nn.Linear(3, 1, dtype=torch.float64)
    g = slowmo.SlowMo(generator, torch.optim.SGD(generator.parameters(), lr=0.1), **IDLE)
    d = slowmo.SlowMo(discriminator, torch.optim.SGD(discriminator.parameters(), lr=0.1), **IDLE)
    for step in range(3):
        d.zero_grad()
        discriminator(generator(batch(step)[0]).detach()).square().mean().backward()
        d.step()
        discriminator.requires_grad_(False)
        g.zero_grad()
        discriminator(generator(batch(step)[0])).square().mean().backward()
        g.step()
        discriminator.requires_grad_(True)
    assert g.steps == d.steps == 3


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_of_it_is_refused(copied):
    with pytest.raises(RuntimeError, match="save state_dict"):
        copied(wrapped(**IDLE)[1])


# --- gradients that arrive in another way, or not at all ---


class Blocks(nn.Module):
    """Every trained layer inside a checkpoint, as in a model with frozen ends and adapters in its blocks."""

    def __init__(self, depth):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
        self.depth = depth

    def forward(self, x):
        x = x.requires_grad_()
        for layer in self.layers:
            call = layer
            for _ in range(self.depth):
                call = lambda x, inner=call: checkpoint(inner, x, use_reentrant=True)
            x = x + call(x)
        return x


@pytest.mark.parametrize("depth", [1, 2], ids=["once", "in each other"])
@AVERAGING
def test_gradients_are_final_where_all_are_formed_inside_reentrant_checkpoints(options, depth):
    def run(depth):
        model = Blocks(depth)
        made = slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.5), tau=1000, bucket_cap_mb=1e-3, **options)
        norms = []
        for step in range(4):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + made.cluster.rank))
            model(x * (1 + made.cluster.rank)).square().mean().backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
            made.step()
        return norms, weights(model)

    def both():
        return run(depth), run(0)

    for (norms, rows), (expected, others) in spawn(both, 2):
        assert norms == expected and torch.equal(rows, others)


@AVERAGING
def test_a_forward_pass_on_one_rank_that_no_backward_follows_changes_nothing(options):
    def run():
        found = []
        for logs in (False, True):
            model = net(norm=False)
            made = slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), tau=1000, timeout=30, **options)
            for step in range(4):
                made.zero_grad()
                loss_of(model, step).backward()
                if logs and made.cluster.rank == 0 and step == 1:
                    loss_of(model, 9)
                made.step()
            found.append(weights(model))
        return found

    for quiet, logged in spawn(run, 2):
        assert torch.equal(quiet, logged)


@pytest.mark.parametrize("write", [lambda p, g: p.grad.data.copy_(g), lambda p, g: p.grad.numpy().__setitem__(..., g.numpy())],
                         ids=["data", "numpy"])  # fmt: skip
def test_gradients_written_behind_torchs_back_count_once(write):
    model, made = wrapped("sgd", **IDLE)
    other, plain_made = plain("sgd")
    for k in range(3):
        for mine, its in zip(model.parameters(), other.parameters()):
            g = torch.full_like(its, 0.1 * (k + 1))
            write(mine, g)
            its.grad = g
        made.step()
        assert not gradients(model).any()
        plain_made.step()
    assert same(weights(model), weights(other))


def test_zero_grad_after_a_step_reads_no_gradient():
    """It would make the host wait for a GPU, once a step."""
    model, made = wrapped("sgd", **IDLE)
    loss_of(model, 0).backward()
    made.step()
    with Reads() as seen:
        made.zero_grad()
    assert not seen.names


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Which operations give a number to the host."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "local_scalar_dense" in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_other_tensors_in_the_models_place_are_no_step():
    """MAML: functional_call with adapted weights, whose gradients reach the model's own."""

    def meta(wrap):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        made = torch.optim.SGD(model.parameters(), lr=0.1)
        made = slowmo.SlowMo(model, made, base="local_sgd", tau=1000) if wrap else made
        for _ in range(3):
            made.zero_grad()
            own, x = dict(model.named_parameters()), torch.randn(4, 3)
            steps = torch.autograd.grad(model(x).square().sum(), [*own.values()], create_graph=True)
            fast = {name: p - 0.1 * g for (name, p), g in zip(own.items(), steps)}
            torch.func.functional_call(model, fast, (x,)).square().sum().backward()
            made.step()
        return weights(model)

    assert same(meta(True), meta(False))


def test_a_model_that_was_moved_in_mid_training_is_still_told():
    model, made = wrapped("sgd", **IDLE)
    loss_of(model, 0).backward()
    made.step()
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="moved, cast, added or replaced"):
        made.step()


# --- a reset is the state before the first step ---


class CountsInGroups(torch.optim.Optimizer):
    """Adam with the number of steps in its group, as apex and timm have it."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    v = state.setdefault("v", torch.zeros_like(p))
                    v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                    p.sub_(p.grad / (v / (1 - 0.999 ** group["step"])).sqrt().add_(1e-8), alpha=group["lr"])


@pytest.mark.parametrize("elementwise", [True, None], ids=["by segment", "whole"])
def test_a_reset_is_refused_at_the_first_step_where_an_optimizer_counts_in_its_groups(elementwise):
    model = net(norm=False)
    made = slowmo.SlowMo(model, CountsInGroups(model.parameters()), base="local_sgd", elementwise=elementwise)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"CountsInGroups counts in its parameter groups \(step\).*choose buffers='maintain'"):
        made.step()
    model = net(norm=False)
    made = slowmo.SlowMo(model, CountsInGroups(model.parameters()), base="local_sgd", tau=2, buffers="maintain", elementwise=elementwise)
    for k in range(4):
        loss_of(model, k).backward()
        made.step()
    assert made.param_groups[0]["step"] == 4


def test_a_counter_that_is_a_tensor_written_in_place_is_seen_too():
    class InPlace(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["lr"] *= 0.99  # no state: a rate is the user's
                group["step"] += 1
            super().step(closure)

    model = net(norm=False)
    made = InPlace([{"params": list(model.parameters()), "step": torch.zeros(())}], lr=0.1)
    made = slowmo.SlowMo(model, made, base="local_sgd")
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"groups \(step\)"):
        made.step()


class Own(torch.optim.SGD):
    """Not known to be elementwise."""


class Filled(Own):
    """Fills its state when it is built."""

    def __init__(self, params, lr=0.1, start=2.0):
        super().__init__(params, lr)
        self.defaults["start"] = start
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["own"] = torch.full_like(p, start)

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["own"].mul_(2)


def test_a_reset_of_an_optimizer_that_had_stepped_before_it_was_wrapped():
    model = net(norm=False)
    made = Own(model.parameters(), lr=0.1, momentum=0.9)
    loss_of(model, 0).backward()
    made.step()
    made = slowmo.SlowMo(model, made, base="local_sgd", tau=1)
    loss_of(model, 1).backward()
    made.step()
    assert all("slowmo_u" in made.state[p] and "momentum_buffer" not in made.state[p] for p in model.parameters())


def test_a_reset_builds_what_an_optimizer_starts_with():
    model = net(norm=False)
    made = slowmo.SlowMo(model, Filled(model.parameters(), start=3.0), base="local_sgd", tau=2)
    for k in range(4):
        loss_of(model, k).backward()
        made.step()
        value = 6.0 if k % 2 == 0 else 3.0
        assert all((made.state[p]["own"] == value).all() for p in model.parameters())


@pytest.mark.parametrize("elementwise", [True, None], ids=["by segment", "whole"])
def test_a_reset_where_the_optimizer_cannot_be_built_again(elementwise):
    class Configured(torch.optim.SGD):
        def __init__(self, params, config):
            super().__init__(params, lr=config["lr"], momentum=0.9)

    model = net(norm=False)
    made = Configured(model.parameters(), {"lr": 0.1})
    loss_of(model, 0).backward()
    made.step()
    made = slowmo.SlowMo(model, made, base="local_sgd", tau=1, elementwise=elementwise)
    loss_of(model, 1).backward()
    made.step()
    assert all("momentum_buffer" not in made.state[p] for p in model.parameters())


# --- what ranks must agree on ---


def test_ranks_with_other_graphs_or_other_strides_are_refused():
    def wraps(kind):
        rank = dist.get_rank()
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3)
        if kind == "strides" and rank:
            model = model.to(memory_format=torch.channels_last)
        mixing = torch.tensor([[0.5, 0.25], [0.5, 0.75]]) if rank else torch.tensor([[0.75, 0.5], [0.25, 0.5]])
        options = {"graph": slowmo.Mixing(2, mixing)} if kind == "graph" else {"elementwise": bool(rank)} if kind == "elementwise" else {}
        with pytest.raises(ValueError, match="is not that of rank"):
            slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=0.1), timeout=30, **options)
        return True

    for kind in ("graph", "strides", "elementwise"):
        assert all(spawn(wraps, 2, kind))


# --- numbers at their edges ---


def test_weights_of_half_precision_train_at_a_tiny_learning_rate():
    torch.manual_seed(0)
    model = nn.Linear(4, 2).half()
    made = slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=1e-2), base="local_sgd", tau=2, beta=0.5)
    for rate in (1e-2, 1e-5, 1e-7):
        made.param_groups[0]["lr"] = rate
        for _ in range(2):
            model(torch.randn(8, 4).half()).square().mean().backward()
            made.step()
    assert weights(model).isfinite().all()
