"""Checkpoints: SlowMo's own in mid-round to the bit, plain torch's in both directions, DCP's."""

import copy
import inspect
import io

import pytest
import torch
import torch.distributed as dist
from loops import IDLE, TORCH, decay_groups, everywhere, loss_of, net, plain, same, train, weights, wrapped
from processes import spawn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_optimizer_state_dict, set_state_dict

import slowmo

KINDS = ["sgd", "nesterov", "adamw", "adagrad", "nadam", "asgd"]


def through_a_file(state):
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def build(kind, **options):
    return wrapped(kind, groups=decay_groups, tau=4, beta=0.6, **options)


@pytest.mark.parametrize("at", [1, 4, 6], ids=["first round", "after a slow step", "mid-round"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_goes_on_to_the_bit(kind, at):
    model, made = build(kind)
    train(model, made, at)
    saved = through_a_file({"model": model.state_dict(), "optimizer": made.state_dict()})
    whole = train(model, made, range(at, at + 7))
    for order in (("model", "optimizer"), ("optimizer", "model")):
        model, made = build(kind)
        train(model, made, 2)  # what is there is forgotten
        for part in order:
            {"model": model, "optimizer": made}[part].load_state_dict(saved[part])
        assert made.steps == at
        assert torch.equal(train(model, made, range(at, at + 7)), whole)


@pytest.mark.parametrize("base", ["local_sgd", "sgp", "osgp", "dpsgd", "allreduce", "irregular"])
def test_a_resume_of_several_ranks_goes_on_to_the_bit(base):
    def run():
        options = {"base": base}
        if base == "irregular":
            options = {"base": "sgp", "graph": slowmo.Mixing(2, [[0.75, 0.5], [0.25, 0.5]])}
        model, made = build("nesterov", **options)
        train(model, made, 6)
        saved = through_a_file({"model": model.state_dict(), "optimizer": made.state_dict()})
        whole = train(model, made, range(6, 13))
        model, made = build("nesterov", seed=7, **options)
        model.load_state_dict(saved["model"])
        made.load_state_dict(saved["optimizer"])
        again = train(model, made, range(6, 13))
        return torch.equal(whole, again), saved["optimizer"]["param_groups"][0].get("slowmo_w"), everywhere(whole)

    out = spawn(run, 2)
    assert all(equal for equal, _, _ in out)
    assert all((w not in (None, 1)) == (base == "irregular") for _, w, _ in out)


def test_the_layout_is_torchs_with_a_few_names_more():
    model, made = build("adamw")
    train(model, made, 5)
    reference, other = plain("adamw", groups=decay_groups)
    train(reference, other, 5)
    ours, theirs = made.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() == {"state", "param_groups"}
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert ours["state"][key].keys() == state.keys() | {"slowmo_x0", "slowmo_u"}
        for name, value in state.items():
            assert ours["state"][key][name].shape == value.shape and ours["state"][key][name].dtype == value.dtype
    for mine, group in zip(ours["param_groups"], theirs["param_groups"]):
        assert mine["params"] == group["params"] and mine.keys() - {"slowmo_w"} == group.keys() | {"slowmo_steps"}
        assert mine["slowmo_steps"] == 5 and mine.get("slowmo_w", 1) == 1


def test_a_saved_state_is_the_callers_and_stays_as_it_is():
    model, made = build("adamw")
    train(model, made, 5)
    saved = made.state_dict()
    before = copy.deepcopy(saved)
    train(model, made, range(5, 8))
    made.load_state_dict(saved)
    train(model, made, range(5, 8))
    for key, state in before["state"].items():
        assert all(torch.equal(value, saved["state"][key][name]) for name, value in state.items())


@pytest.mark.parametrize("kind", TORCH)
def test_from_plain_torch(kind):
    reference, other = plain(kind, groups=decay_groups)
    train(reference, other, 5)
    saved = through_a_file({"model": reference.state_dict(), "optimizer": other.state_dict()})
    model, made = wrapped(kind, groups=decay_groups, **IDLE)
    model.load_state_dict(saved["model"])
    made.load_state_dict(saved["optimizer"])
    assert torch.equal(train(model, made, range(5, 10)), train(reference, other, range(5, 10)))


@pytest.mark.parametrize("kind", TORCH)
def test_to_plain_torch(kind):
    out = []
    # torch's own loader gives some scalars another dtype (NAdam's mu_product), so both go through it
    for model, made in (wrapped(kind, groups=decay_groups, **IDLE), plain(kind, groups=decay_groups)):
        train(model, made, 5)
        saved = through_a_file({"model": model.state_dict(), "optimizer": made.state_dict()})
        reference, other = plain(kind, groups=decay_groups)
        reference.load_state_dict(saved["model"])
        other.load_state_dict(saved["optimizer"])
        out.append(train(reference, other, range(5, 10)))
    assert torch.equal(*out)


def test_from_an_optimizer_that_has_stepped_before_it_was_wrapped():
    reference, other = plain("adamw")
    train(reference, other, 3)
    model, inner = plain("adamw")
    train(model, inner, 3)
    made = slowmo.SlowMo(model, inner, **IDLE)
    assert torch.equal(train(model, made, range(3, 6)), train(reference, other, range(3, 6)))


@pytest.mark.parametrize("foreach", [False, True])
def test_counters_that_are_numbers_as_in_old_states(foreach):
    def make():
        model = net()
        return model, torch.optim.Adam(model.parameters(), foreach=foreach)

    states = [make(), make()]
    train(*states[0], 2)
    old = copy.deepcopy(states[0][1].state_dict())
    for values in old["state"].values():
        values["step"] = int(values["step"])
    model, optimizer = states[1]
    made = slowmo.SlowMo(model, optimizer, **IDLE)
    model.load_state_dict(states[0][0].state_dict())
    made.load_state_dict(old)
    assert torch.equal(train(model, made, range(2, 4)), train(*states[0], range(2, 4)))


def test_a_number_more_than_a_known_optimizer_has_comes_back():
    model, optimizer = plain("sgd")
    for p in model.parameters():
        optimizer.state[p]["norm"] = torch.tensor(1.0)
    made = slowmo.SlowMo(model, optimizer, **IDLE)
    train(model, made, 1)
    made.load_state_dict(made.state_dict())
    assert all(values["norm"] == 1 for values in made.state.values())


def test_parameters_of_a_group_that_have_taken_other_numbers_of_steps_are_refused():
    model, optimizer = plain("adamw", norm=False)
    train(model, optimizer, 1)
    loss_of(model, 1).backward()
    next(model.parameters()).grad = None
    optimizer.step()
    with pytest.raises(ValueError, match="have taken different numbers of steps need parameter groups of their own"):
        slowmo.SlowMo(model, optimizer, **IDLE)


def test_slow_momentum_starts_anew_from_plain_torchs_checkpoint():
    reference, other = plain("sgd")
    train(reference, other, 5)
    model, made = wrapped("sgd", tau=3, beta=0.6, seed=4)
    model.load_state_dict(reference.state_dict())
    made.load_state_dict(other.state_dict())
    start = weights(model)
    train(model, made, range(5, 6))
    x0 = torch.cat([s["slowmo_x0"].flatten() for _, s in sorted(made.state_dict()["state"].items())])
    assert made.steps == 1 and torch.equal(x0, start)


@pytest.mark.parametrize("kind", ["nesterov", "adamw", "adagrad"])
def test_distributed_checkpoints_state_dicts(kind):
    """torch.distributed.checkpoint's get_state_dict and set_state_dict, which name parameters and rebuild the groups."""
    model, made = build(kind)
    train(model, made, 6)
    saved = through_a_file(dict(zip(("model", "optimizer"), get_state_dict(model, made))))
    whole = train(model, made, range(6, 12))
    model, made = build(kind, seed=9)
    set_state_dict(model, made, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    assert made.steps == 6
    assert torch.equal(train(model, made, range(6, 12)), whole)


def test_distributed_checkpoints_on_disk_of_two_ranks(tmp_path):
    """Workers differ, so each rank saves its own folder."""
    import torch.distributed.checkpoint as dcp

    if "no_dist" not in inspect.signature(dcp.save).parameters:
        pytest.skip("this torch saves only what all ranks save together")

    def run():
        folder = tmp_path / str(dist.get_rank())
        model, made = build("nesterov", base="local_sgd")
        train(model, made, 6)
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, made)))
        dcp.save(parts, checkpoint_id=folder, no_dist=True)
        whole = train(model, made, range(6, 12))
        model, made = build("nesterov", base="local_sgd", seed=9)
        train(model, made, 1)  # DCP loads in place, into a state that is there
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, made)))
        dcp.load(parts, checkpoint_id=folder, no_dist=True)
        set_state_dict(model, made, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        return made.steps, torch.equal(whole, train(model, made, range(6, 12)))

    assert spawn(run, 2) == [(6, True)] * 2


def test_flattened_optimizer_state():
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, made = build("adamw")
    train(model, made, 6)
    saved = through_a_file({"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, made, options=options)})
    whole = train(model, made, range(6, 12))
    model, made = build("adamw", seed=9)
    train(model, made, 1)
    model.load_state_dict(saved["model"])
    set_optimizer_state_dict(model, made, saved["optimizer"], options=options)
    assert made.steps == 6 and torch.equal(train(model, made, range(6, 12)), whole)


@pytest.mark.parametrize("buffers", ["reset", "maintain", "average"])
@pytest.mark.parametrize("kind", ["nesterov", "adamw", "adagrad", "nadam"])
def test_buffers_at_a_slow_step(kind, buffers):
    """reset: the state of an optimizer that has never stepped; maintain: as it was; average: the mean of the workers."""

    def run():
        model, made = wrapped(kind, base="local_sgd", tau=4, buffers=buffers)
        train(model, made, 4)
        alone, other = plain(kind)
        train(alone, other, 4)  # the same iterates until the slow step
        return made.state_dict()["state"], other.state_dict()["state"]

    (mine, own), (_, peer) = spawn(run, 2)
    fresh = plain(kind)[1].state_dict()["state"]
    for key, state in mine.items():
        for name, value in state.items():
            if name.startswith("slowmo_"):
                continue
            if buffers == "reset":
                expected = fresh.get(key, {}).get(name, torch.zeros_like(value))
            elif buffers == "maintain" or name in ("step", "mu_product"):
                expected = own[key][name]
            else:
                expected = (own[key][name] + peer[key][name]) / 2
            assert same(value, expected), (name, buffers)


def test_hooks_of_state_dicts_run():
    model, made = build("adamw")
    train(model, made, 2)
    seen = []
    made.register_state_dict_post_hook(lambda optimizer, state: seen.append("saved"))
    made.register_load_state_dict_post_hook(lambda optimizer: seen.append("loaded"))
    made.load_state_dict(made.state_dict())
    assert seen == ["saved", "loaded"]


def test_frozen_parameters_are_in_the_groups_and_in_no_state():
    model = net()
    model[0].weight.requires_grad_(False)
    made = slowmo.SlowMo(model, TORCH["adamw"](model.parameters()), tau=2)
    before = model[0].weight.clone()
    train(model, made, 3)
    saved = through_a_file(made.state_dict())
    assert torch.equal(model[0].weight, before) and 0 not in saved["state"] and 0 in saved["param_groups"][0]["params"]
    made.load_state_dict(saved)
    train(model, made, range(3, 5))
    assert made.steps == 5
