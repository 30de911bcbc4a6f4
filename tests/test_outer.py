"""Slow steps: when they come, what they change, and that a run saved anywhere goes on bitwise."""

import itertools

import pytest
import torch
import torch.distributed as dist
from helpers import BASES, build, quadratic, run, sgd
from hypothesis import given, settings
from hypothesis import strategies as st

from slowmo import Average, NesterovOuter, SlowMo
from slowmo.base import BUFFERS
from slowmo.train import TrainingMeter, train


def nesterov(rows):
    return sgd(rows, momentum=0.9, nesterov=True, weight_decay=0.01)


def adam(rows):
    return torch.optim.Adam([rows], lr=0.1)


OUTERS = {
    **{f"average-{b}": lambda base, tau, b=b: Average(base, tau, buffers=b) for b in BUFFERS},
    **{f"slowmo-{b}": lambda base, tau, b=b: SlowMo(base, tau, alpha=0.9, beta=0.6, buffers=b) for b in BUFFERS},
    **{f"noaverage-{b}": lambda base, tau, b=b: SlowMo(base, tau, beta=0.6, buffers=b, exact=False) for b in BUFFERS},
    "diloco": lambda base, tau: NesterovOuter(base, tau, alpha=0.7, beta=0.9, buffers="maintain"),
    "none": lambda base, tau: base,
}


def rate(step):
    return 0.3 / (1 + step // 3)


def make(m, base, outer, optimizer=nesterov, tau=3):
    return build(quadratic(m, d=3), m, base, optimizer, lambda b: OUTERS[outer](b, tau))


# --- identities ---


@pytest.mark.parametrize("m", [1, 4])
def test_tau_one_without_slow_momentum_is_large_batch_sgd(m):
    task = quadratic(m)
    large = run(task, *build(task, m, "allreduce"), 8, rate)
    slow = run(task, *build(task, m, "local_sgd", outer=lambda base: SlowMo(base, tau=1, alpha=1, beta=0)), 8, rate)
    torch.testing.assert_close(slow, large, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", ["local_sgd", "sgp", "osgp"])
def test_constant_rate_is_torch_sgd_on_the_pseudo_gradient(base):
    """x0 <- SGD(lr=α, momentum=β) applied to x0 - x, with the same base restarted from it."""
    m, tau, alpha, beta, task = 4, 3, 0.8, 0.6, quadratic(4)
    replicas, algorithm = build(task, m, base, nesterov, lambda b: SlowMo(b, tau, alpha=alpha, beta=beta))
    others, twin = build(task, m, base, nesterov)
    x0 = torch.nn.Parameter(twin.average())
    outer = torch.optim.SGD([x0], lr=alpha, momentum=beta)
    for t in range(1, 5):
        rows = run(task, replicas, algorithm, t * tau, 0.2)
        run(task, others, twin, t * tau, 0.2)
        x0.grad = x0.detach() - twin.average()
        outer.step()
        twin.restart(x0.detach(), "reset")
        torch.testing.assert_close(rows, twin.rows.detach()[:, :6], rtol=1e-11, atol=1e-11)


def test_one_worker_without_slow_momentum_is_lookahead():
    task, alpha, tau = quadratic(1), 0.5, 4
    outer = lambda base: SlowMo(base, tau, alpha=alpha, beta=0, buffers="maintain")
    x = run(task, *build(task, 1, "local_sgd", nesterov, outer), 12, rate)
    fast = torch.nn.Parameter(task.x0.clone()[None])
    optimizer, slow = nesterov(fast), fast.detach().clone()
    for step in range(12):
        (batch,) = task.batches(step, [0], (0, 1))
        model = torch.nn.Module()
        model.x = fast[0]
        fast.grad = None
        task.loss(model, batch).backward()
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        if (step + 1) % tau == 0:
            slow += alpha * (fast.detach() - slow)
            fast.data.copy_(slow)
    torch.testing.assert_close(x, slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("buffers", BUFFERS)
@pytest.mark.parametrize("base", BASES)
def test_one_worker_is_its_own_average(base, buffers):
    outer = lambda exact: lambda b: SlowMo(b, 3, beta=0.6, buffers=buffers, exact=exact)
    exact, own = (run(quadratic(1), *build(quadratic(1), 1, base, nesterov, outer(e)), 10, rate) for e in (True, False))
    assert torch.equal(exact, own)


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("base", BASES)
def test_one_worker_needs_nobody(base, outer, monkeypatch):
    def refuse(*arguments, **options):
        pytest.fail("one worker alone communicates")

    for name in ("all_reduce", "broadcast", "batch_isend_irecv", "all_gather", "barrier", "new_group", "init_process_group"):
        monkeypatch.setattr(dist, name, refuse)
    replicas, algorithm = make(1, base, outer)
    x = run(quadratic(1, d=3), replicas, algorithm, 7, rate)
    assert torch.isfinite(x).all() and (x != quadratic(1, d=3).x0).all()
    assert algorithm.sends() == (0, 0)
    if outer == "average-maintain":  # its own average: nothing happens, whatever the base
        plain = run(quadratic(1, d=3), *make(1, "local_sgd", "none"), 7, rate)
        torch.testing.assert_close(x, plain, rtol=1e-13, atol=1e-13)


def test_noaverage_moves_each_worker_on_its_own():
    """Without line 6 no worker ever meets another: m workers are m runs of one."""
    replicas, algorithm = make(3, "local_sgd", "noaverage-reset")
    x = run(quadratic(3, d=3), replicas, algorithm, 7, rate)
    for i in range(3):
        alone = quadratic(3, d=3)
        alone.batches = lambda step, workers, part, i=i: quadratic(3, d=3).batches(step, [i], part)
        own = run(alone, *build(alone, 1, "local_sgd", nesterov, lambda b: OUTERS["noaverage-reset"](b, 3)), 7, rate)
        torch.testing.assert_close(x[i : i + 1], own, rtol=1e-12, atol=1e-12)
    assert algorithm.u.shape == algorithm.rows.shape


# --- what a slow step changes ---


@pytest.mark.parametrize("base", ["local_sgd", "sgp", "osgp_irregular"])
def test_a_slow_step_is_lines_seven_and_eight(base):
    m, task = 4, quadratic(4)
    replicas, algorithm = build(task, m, base, nesterov, lambda b: SlowMo(b, tau=3, alpha=0.9, beta=0.6))
    u, x0 = algorithm.u.clone(), algorithm.x0.clone()
    assert torch.equal(x0[0, :6], task.x0) and not u.any()  # x0 is taken before the first step
    average = algorithm.base.average
    seen = []
    algorithm.base.average = lambda: seen.append(average()) or seen[-1].clone()
    for t in range(1, 4):
        rows = run(task, replicas, algorithm, 3 * t, rate)
        lr, x = rate(3 * t - 1), seen.pop()
        u = 0.6 * u + (x0 - x) / lr
        x0 = x0 - 0.9 * lr * u
        torch.testing.assert_close(algorithm.u, u, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(algorithm.x0, x0, rtol=1e-12, atol=1e-12)
        assert torch.equal(rows, algorithm.x0[:, :6].expand(m, -1))
        assert not any(block.any() for block in algorithm.base.optimizer_rows().values())  # reset
        assert not seen


def test_reset_never_touches_u():
    replicas, algorithm = make(4, "sgp", "slowmo-reset")
    run(quadratic(4, d=3), replicas, algorithm, 5, rate)
    u = algorithm.u.clone()
    assert u.any() and algorithm.base.optimizer.state
    algorithm.base.restart(algorithm.average(), "reset")
    assert torch.equal(algorithm.u, u) and not any(block.any() for block in algorithm.base.optimizer_rows().values())


@pytest.mark.parametrize("outer", ["slowmo-reset", "slowmo-average", "noaverage-reset", "noaverage-maintain"])
@pytest.mark.parametrize("base", BASES)
def test_a_rate_of_zero_at_a_slow_step_changes_nothing(base, outer):
    task = quadratic(4, d=3)
    replicas, algorithm = make(4, base, outer)
    run(task, replicas, algorithm, 5, rate)  # one slow step, at 3
    u, x0 = algorithm.u.clone(), algorithm.x0.clone()
    others, twin = make(4, base, "none")  # the same base step without an outer
    rows, shared = algorithm.base.state()
    twin.load({k: v.clone() for k, v in rows.items()}, {k: v.clone() for k, v in shared.items()})
    expected = run(task, others, twin, 6, 0.0)
    assert torch.equal(run(task, replicas, algorithm, 6, 0.0), expected)
    assert torch.equal(algorithm.u, u) and torch.equal(algorithm.x0, x0)
    rows = run(task, replicas, algorithm, 9, rate)  # and the next one works
    assert torch.isfinite(rows).all() and torch.isfinite(algorithm.u).all() and not torch.equal(algorithm.u, u)


def test_diloco_is_torch_nesterov_on_the_pseudo_gradient():
    task, m, tau = quadratic(4), 4, 3
    outer = lambda base: NesterovOuter(base, tau, alpha=0.7, beta=0.9, buffers="maintain")
    replicas, algorithm = build(task, m, "local_sgd", adam, outer)
    others, twin = build(task, m, "local_sgd", adam)
    x0 = torch.nn.Parameter(twin.average())
    slow = torch.optim.SGD([x0], lr=0.7, momentum=0.9, nesterov=True)
    for t in range(1, 5):
        rows = run(task, replicas, algorithm, t * tau, rate)
        run(task, others, twin, t * tau, rate)
        x0.grad = x0.detach() - twin.average()
        slow.step()
        twin.restart(x0.detach(), "maintain")
        torch.testing.assert_close(rows, twin.rows.detach()[:, :6], rtol=1e-11, atol=1e-11)


# --- when ---


def slow_steps(algorithm):
    """The list that will hold the counts of finished inner steps at which the base was restarted."""
    base, seen = algorithm.base, []
    restart = base.restart
    base.restart = lambda *arguments: seen.append(base.steps) or restart(*arguments)
    return seen


@settings(max_examples=30, deadline=None, derandomize=True)
@given(tau=st.integers(1, 7), steps=st.integers(0, 20), outer=st.sampled_from([o for o in OUTERS if o != "none"]))
def test_slow_steps_come_after_multiples_of_tau(tau, steps, outer):
    replicas, algorithm = make(2, "local_sgd", outer, tau=tau)
    seen = slow_steps(algorithm)
    run(quadratic(2, d=3), replicas, algorithm, steps, 0.1)
    assert algorithm.steps == steps and seen == [k for k in range(1, steps + 1) if k % tau == 0]


@pytest.mark.parametrize("stop", range(8))
def test_the_phase_survives_a_stop_anywhere(stop):
    replicas, algorithm = make(2, "sgp", "slowmo-reset", tau=3)
    run(quadratic(2, d=3), replicas, algorithm, stop, 0.1)
    again, resumed = make(2, "sgp", "slowmo-reset", tau=3)
    resumed.load(*algorithm.state())
    seen = slow_steps(resumed)
    run(quadratic(2, d=3), again, resumed, 10, 0.1)
    assert seen == [k for k in (3, 6, 9) if k > stop]


def test_default_rate_is_the_optimizer_s():
    results = []
    for lr in (0.25, None):
        replicas, algorithm = build(quadratic(2), 2, "local_sgd", lambda rows: sgd(rows, lr=0.25), lambda b: SlowMo(b, 2))
        results.append(run(quadratic(2), replicas, algorithm, 6, lambda step: lr))
    assert torch.equal(*results)


# --- refusals ---


REFUSED = [
    ({"tau": 0}, "tau=0.*whole number >= 1"),
    ({"tau": -3}, "tau=-3.*whole number >= 1"),
    ({"tau": 1.5}, "tau=1.5.*whole number >= 1"),
    ({"buffers": "restart"}, "'restart': choose one of reset, maintain, average"),
    ({"beta": 1}, r"beta=1.*\[0, 1\)"),
    ({"beta": -0.1}, r"beta=-0.1.*\[0, 1\)"),
    ({"beta": float("nan")}, r"beta=nan.*\[0, 1\)"),
    ({"alpha": 0}, "alpha=0.*positive"),
    ({"alpha": -1.0}, "alpha=-1.0.*positive"),
    ({"alpha": float("nan")}, "alpha=nan.*positive"),
]


@pytest.mark.parametrize("outer, options, remedy", [
    (outer, *refused) for outer in (Average, SlowMo, NesterovOuter) for refused in REFUSED
    if outer is not Average or refused[0].keys() <= {"tau", "buffers"}
])  # fmt: skip
def test_refusals_name_the_range(outer, options, remedy):
    base = build(quadratic(2), 2, "local_sgd")[1]
    with pytest.raises(ValueError, match=remedy):
        outer(base, **({"tau": 2} | options))


# --- saving ---


def clone(state):
    return [{name: tensor.detach().clone() for name, tensor in part.items()} for part in state]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("base, outer", list(itertools.product(BASES, OUTERS)))
@pytest.mark.parametrize("optimizer", [nesterov, adam])
def test_a_run_saved_anywhere_goes_on_bitwise(base, outer, optimizer):
    m, tau, steps = 3, 3, 8
    task = quadratic(m, d=3)
    replicas, algorithm = make(m, base, outer, optimizer, tau)
    states = [clone(algorithm.state())]
    tally = TrainingMeter(m, torch.device("cpu"))
    for _ in train(task, replicas, algorithm, rate, steps, task.seed, tally):
        states.append(clone(algorithm.state()))
    assert not torch.equal(states[-1][0]["z"], states[-2][0]["z"])
    for stop in (1, 3, 4, 5):  # inside the first round, at its end, and inside the second
        others, fresh = make(m, base, outer, optimizer, tau)
        saved = clone(states[stop])
        fresh.load(*saved)
        assert_same(saved, states[stop])  # loading leaves the caller's tensors alone
        assert_same(clone(fresh.state()), states[stop])
        assert all(torch.equal(model.x, row[:3]) for model, row in zip(others.models, states[stop][0]["z"]))
        run(task, others, fresh, min(stop + 4, steps), rate)
        assert_same(clone(fresh.state()), states[min(stop + 4, steps)])
        assert_same(saved, states[stop])


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "RAdam", "Adadelta", "Adamax", "NAdam", "AdamW"])
def test_other_optimizers_go_on_bitwise(name):
    def optimizer(rows):
        return getattr(torch.optim, name)([rows], lr=0.1)

    task = quadratic(2)
    replicas, algorithm = build(task, 2, "sgp", optimizer, lambda b: SlowMo(b, 3, buffers="maintain"))
    run(task, replicas, algorithm, 5, rate)
    others, fresh = build(task, 2, "sgp", optimizer, lambda b: SlowMo(b, 3, buffers="maintain"))
    fresh.load(*clone(algorithm.state()))
    run(task, replicas, algorithm, 9, rate)
    run(task, others, fresh, 9, rate)
    assert_same(clone(fresh.state()), clone(algorithm.state()))


def test_a_loaded_state_replaces_what_was_there():
    """Also into an algorithm that has already trained: a state without optimizer tensors empties the optimizer."""
    replicas, algorithm = make(2, "sgp", "slowmo-reset")
    start = clone(algorithm.state())
    run(quadratic(2, d=3), replicas, algorithm, 5, rate)
    end = clone(algorithm.state())
    algorithm.load(*start)
    assert_same(clone(algorithm.state()), start)
    run(quadratic(2, d=3), replicas, algorithm, 5, rate)
    assert_same(clone(algorithm.state()), end)


@pytest.mark.parametrize("outer", ["average-maintain", "slowmo-reset", "noaverage-reset", "diloco", "average-average"])
def test_sends_of_a_slow_step_are_spread_over_a_round(outer):
    m, tau = 4, 3
    ring = (2 * (m - 1) / tau, 2 * (m - 1) / m / tau)
    _, algorithm = make(m, "sgp", outer)
    # averaged with the parameters once it is there, after the first step
    algorithm.base.optimizer.state[algorithm.rows]["momentum_buffer"] = torch.zeros_like(algorithm.rows)
    messages, lengths = algorithm.sends()
    times = {"noaverage-reset": 0, "average-average": 2}.get(outer, 1)
    assert (messages, lengths) == pytest.approx((1 + times * ring[0], 1 + times * ring[1]))
