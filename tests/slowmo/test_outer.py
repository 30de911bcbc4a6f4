"""Slow steps: when they come and what they change."""

import pytest
import torch
import torch.distributed as dist
from helpers import (
    BASES,
    Several,
    assert_same_state,
    average,
    buffers,
    build,
    copied,
    quadratic,
    restart,
    run,
    sgd,
    slow,
    two_groups,
    write,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from slowmo.engine import BUFFERS
from slowmo.outer import Average, NesterovOuter, SlowMo, Streaming
from slowmo.state import load_state_dict, state_dict


def nesterov(parameters):
    return sgd(parameters, momentum=0.9, nesterov=True, weight_decay=0.01)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


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
    """Two segments, so that nothing is done once that must be done for each."""
    return build(Several(m), m, base, two_groups(optimizer), lambda b: OUTERS[outer](b, tau))


def blocks_of(replicas, values):
    blocks = [torch.zeros(len(values), segment.x.shape[1], dtype=values.dtype) for segment in replicas.segments]
    write(replicas, blocks, values)
    return blocks


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
    x0 = torch.nn.Parameter(average(twin))
    outer = torch.optim.SGD([x0], lr=alpha, momentum=beta)
    for t in range(1, 5):
        rows = run(task, replicas, algorithm, t * tau, 0.2)
        run(task, others, twin, t * tau, 0.2)
        x0.grad = x0.detach() - average(twin)
        outer.step()
        restart(twin, blocks_of(others, x0.detach()), "reset")
        torch.testing.assert_close(rows, others.rows(), rtol=1e-11, atol=1e-11)


def test_one_worker_without_slow_momentum_is_lookahead():
    task, alpha, tau = quadratic(1), 0.5, 4
    outer = lambda base: SlowMo(base, tau, alpha=alpha, beta=0, buffers="maintain")
    x = run(task, *build(task, 1, "local_sgd", nesterov, outer), 12, rate)
    fast = torch.nn.Parameter(task.x0.clone()[None])
    optimizer, slow = nesterov([fast]), fast.detach().clone()
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

    for name in (
        "all_reduce",
        "broadcast",
        "batch_isend_irecv",
        "all_gather",
        "barrier",
        "new_group",
        "init_process_group",
        "all_gather_object",
    ):
        monkeypatch.setattr(dist, name, refuse)
    replicas, algorithm = make(1, base, outer)
    x = run(Several(1), replicas, algorithm, 7, rate)
    assert torch.isfinite(x).all() and (x != Several(1).x0).all()
    assert algorithm.comm_volume() == (0, 0)
    if outer == "average-maintain":  # its own average: nothing happens, whatever the base
        plain = run(Several(1), *make(1, "local_sgd", "none"), 7, rate)
        torch.testing.assert_close(x, plain, rtol=1e-13, atol=1e-13)


def test_noaverage_moves_each_worker_on_its_own():
    """Without line 6 no worker ever meets another: m workers are m runs of one."""
    replicas, algorithm = make(3, "local_sgd", "noaverage-reset")
    x = run(Several(3), replicas, algorithm, 7, rate)
    for i in range(3):
        alone = Several(3)
        alone.batches = lambda step, workers, part, i=i: Several(3).batches(step, [i], part)
        own = run(alone, *build(alone, 1, "local_sgd", nesterov, lambda b: OUTERS["noaverage-reset"](b, 3)), 7, rate)
        torch.testing.assert_close(x[i : i + 1], own, rtol=1e-12, atol=1e-12)
    assert slow(algorithm, "u").shape == x.shape


# --- what a slow step changes ---


@pytest.mark.parametrize("base", ["local_sgd", "sgp", "osgp_irregular"])
def test_a_slow_step_is_lines_seven_and_eight(base):
    m, task = 4, Several(4)
    replicas, algorithm = build(task, m, base, two_groups(nesterov), lambda b: SlowMo(b, tau=3, alpha=0.9, beta=0.6))
    u, x0 = torch.zeros(1, 6, dtype=torch.float64), task.x0[None]
    seen, averaged = {}, algorithm.base.averaged

    def spy(segment):
        seen[segment] = averaged(segment)
        return seen[segment].clone()

    algorithm.base.averaged = spy
    for t in range(1, 4):
        rows = run(task, replicas, algorithm, 3 * t, rate)
        lr, x = rate(3 * t - 1), replicas.flat([seen.pop(segment) for segment in replicas.segments])
        u = 0.6 * u + (x0 - x) / lr
        x0 = x0 - 0.9 * lr * u
        torch.testing.assert_close(slow(algorithm, "u"), u, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slow(algorithm, "x0"), x0, rtol=1e-12, atol=1e-12)
        assert torch.equal(rows, slow(algorithm, "x0").expand(m, -1))
        assert not any(block.any() for block in buffers(algorithm).values())  # reset
        assert not seen


def test_x0_is_taken_before_the_first_step_and_what_was_loaded_before_counts():
    """A checkpoint may be loaded into a wrapped model before training: x0 is what training starts from."""
    replicas, algorithm = make(2, "local_sgd", "slowmo-maintain")
    assert algorithm.slow is None
    model = replicas.models[0]
    model.load_state_dict({name: torch.full_like(p, 3.0) for name, p in model.state_dict().items()})
    algorithm.start(0.1)
    assert (slow(algorithm, "x0")[0] == 1.5).all() and not slow(algorithm, "u").any()  # the other worker stands at 0
    algorithm.step()


def test_each_group_s_own_rate_divides_its_slow_momentum():
    """γ of lines 7 and 8 is the group's: with frozen gradients x0 - x is τ γ g in each, so u is τ g whatever γ."""
    optimizer = lambda parameters: two_groups(lambda groups: torch.optim.SGD(groups, lr=0.1))(parameters)
    replicas, algorithm = build(Several(2), 2, "local_sgd", optimizer, lambda b: SlowMo(b, 4, beta=0.5))
    algorithm.base.optimizer.param_groups[1]["lr"] = 0.025
    for _ in range(4):
        algorithm.start()
        for segment in replicas.segments:
            segment.grad.fill_(1.0)
        algorithm.step()
    torch.testing.assert_close(slow(algorithm, "u"), torch.full((1, 6), 4.0, dtype=torch.float64))


def test_reset_never_touches_u():
    replicas, algorithm = make(4, "sgp", "slowmo-reset")
    run(Several(4), replicas, algorithm, 5, rate)
    u = slow(algorithm, "u")
    assert u.any() and buffers(algorithm)["momentum_buffer"].any()
    restart(algorithm, algorithm.base.average(), "reset")
    assert torch.equal(slow(algorithm, "u"), u) and not any(block.any() for block in buffers(algorithm).values())


@pytest.mark.parametrize("outer", ["slowmo-reset", "slowmo-average", "noaverage-reset", "noaverage-maintain"])
@pytest.mark.parametrize("base", BASES)
def test_a_rate_of_zero_at_a_slow_step_changes_nothing(base, outer):
    """But for gossip, which where an exact average follows is left out: the workers stand where they stood."""
    task = Several(4)
    replicas, algorithm = make(4, base, outer)
    run(task, replicas, algorithm, 5, rate)  # one slow step, at 3
    u, x0, before = slow(algorithm, "u"), slow(algorithm, "x0"), copied(state_dict(algorithm))
    rows = run(task, replicas, algorithm, 6, 0.0)
    if outer.startswith("noaverage"):  # the same base step without an outer
        others, twin = make(4, base, "none")
        load_state_dict(twin, before)
        assert torch.equal(rows, run(task, others, twin, 6, 0.0))
    elif not base.endswith("irregular"):
        assert torch.equal(rows, torch.stack([torch.cat([worker[f"model.{name}"] for name in "abc"]) for worker in before["workers"]]))
    mean = average(algorithm)
    assert torch.equal(slow(algorithm, "u"), u) and torch.equal(slow(algorithm, "x0"), x0) and torch.isfinite(mean).all()
    rows = run(task, replicas, algorithm, 9, rate)  # and the next one works
    assert torch.isfinite(rows).all() and not torch.equal(slow(algorithm, "u"), u)


@pytest.mark.parametrize("base", ["sgp", "osgp", "sgp_irregular", "osgp_irregular"])
def test_a_rate_of_zero_at_a_slow_step_keeps_the_mean(base):
    replicas, algorithm = make(4, base, "slowmo-reset")
    run(Several(4), replicas, algorithm, 5, rate)
    mean, w = average(algorithm), algorithm.base.w.clone()
    run(Several(4), replicas, algorithm, 6, 0.0)
    torch.testing.assert_close(average(algorithm), mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(algorithm.base.w.sum(), w.sum())


def test_diloco_is_torch_nesterov_on_the_pseudo_gradient():
    task, m, tau = quadratic(4), 4, 3
    outer = lambda base: NesterovOuter(base, tau, alpha=0.7, beta=0.9, buffers="maintain")
    replicas, algorithm = build(task, m, "local_sgd", adam, outer)
    others, twin = build(task, m, "local_sgd", adam)
    x0 = torch.nn.Parameter(average(twin))
    slow = torch.optim.SGD([x0], lr=0.7, momentum=0.9, nesterov=True)
    for t in range(1, 5):
        lr = 0.0 if t == 3 else rate  # a round that changes nothing: momentum goes on, since nothing is divided by the rate
        rows = run(task, replicas, algorithm, t * tau, lr)
        run(task, others, twin, t * tau, lr)
        x0.grad = x0.detach() - average(twin)
        slow.step()
        restart(twin, blocks_of(others, x0.detach()), "maintain")
        torch.testing.assert_close(rows, others.rows(), rtol=1e-11, atol=1e-11)


# --- a fragment at a time ---

FRAGMENTS = ((slice(0, 3), 2), (slice(3, 6), 0))  # of Several cut in two: columns of a row, and k modulo 4 at their slow steps


def streaming(task, m, num_fragments=2, tau=4):
    return build(task, m, "local_sgd", adam, lambda base: Streaming(base, tau, alpha=0.7), num_fragments=num_fragments)


def test_streaming_is_nesterov_on_each_fragment_in_turn():
    task, m = Several(3), 3
    replicas, algorithm = streaming(task, m)
    others, twin = build(task, m, "local_sgd", adam)
    x0 = [torch.nn.Parameter(average(twin)[:, columns]) for columns, _ in FRAGMENTS]
    slow = [torch.optim.SGD([part], lr=0.7, momentum=0.9, nesterov=True) for part in x0]
    for k in range(1, 13):
        rows = run(task, replicas, algorithm, k, rate)
        run(task, others, twin, k, rate)
        for (columns, phase), part, step in zip(FRAGMENTS, x0, slow):
            if k % 4 == phase:
                part.grad = part.detach() - average(twin)[:, columns]
                step.step()
                values = others.rows()
                values[:, columns] = part.detach()
                restart(twin, blocks_of(others, values), "maintain")
        torch.testing.assert_close(rows, others.rows(), rtol=1e-11, atol=1e-11)


def test_streaming_one_fragment_is_diloco():
    task = Several(3)
    rows = run(task, *streaming(task, 3, num_fragments=1), 10, rate)
    other = run(
        task, *build(task, 3, "local_sgd", adam, lambda base: NesterovOuter(base, 4, alpha=0.7, beta=0.9, buffers="maintain")), 10, rate
    )
    assert torch.equal(rows, other)


@pytest.mark.parametrize("stop", range(1, 6))
def test_streaming_goes_on_anywhere_in_a_round(stop):
    task = Several(3)
    replicas, algorithm = streaming(task, 3)
    run(task, replicas, algorithm, stop, rate)
    again, resumed = streaming(task, 3)
    load_state_dict(resumed, copied(state_dict(algorithm)))
    assert torch.equal(run(task, again, resumed, 11, rate), run(task, replicas, algorithm, 11, rate))


def test_streaming_sends_as_much_in_more_messages():
    whole, parts = (streaming(Several(4), 4, num_fragments=n)[1].comm_volume() for n in (1, 2))
    assert parts == (2 * whole[0], whole[1])


def test_streaming_refuses_what_it_cannot_do():
    task = Several(2)
    with pytest.raises(ValueError, match="3 fragments and tau=2"):
        streaming(task, 2, num_fragments=3, tau=2)
    with pytest.raises(ValueError, match="take base=local_sgd"):
        build(task, 2, "sgp", adam, lambda base: Streaming(base, 4))
    with pytest.raises(ValueError, match="exact=true"):
        build(task, 2, "local_sgd", adam, lambda base: Streaming(base, 4, exact=False))
    with pytest.raises(ValueError, match="num_fragments=0: the number of"):
        streaming(task, 2, num_fragments=0)


# --- when ---


def slow_steps(algorithm):
    """The list that will hold the counts of finished inner steps at which the base was restarted."""
    base, seen = algorithm.base, []
    last, restart = base.replicas.segments[-1], base.restart
    base.restart = lambda segment, *more: (seen.append(base.steps) if segment is last else None) or restart(segment, *more)
    return seen


@settings(max_examples=30, deadline=None, derandomize=True)
@given(tau=st.integers(1, 7), steps=st.integers(0, 20), outer=st.sampled_from([o for o in OUTERS if o != "none"]))
def test_slow_steps_come_after_multiples_of_tau(tau, steps, outer):
    replicas, algorithm = make(2, "local_sgd", outer, tau=tau)
    seen = slow_steps(algorithm)
    run(Several(2), replicas, algorithm, steps, 0.1)
    assert algorithm.steps == steps and seen == [k for k in range(1, steps + 1) if k % tau == 0]


@pytest.mark.parametrize("stop", range(8))
def test_the_phase_survives_a_stop_anywhere(stop):
    replicas, algorithm = make(2, "sgp", "slowmo-reset", tau=3)
    run(Several(2), replicas, algorithm, stop, 0.1)
    again, resumed = make(2, "sgp", "slowmo-reset", tau=3)
    load_state_dict(resumed, state_dict(algorithm))
    seen = slow_steps(resumed)
    run(Several(2), again, resumed, 10, 0.1)
    assert seen == [k for k in (3, 6, 9) if k > stop]


def test_default_rate_is_the_optimizer_s():
    results = []
    for lr in (0.25, None):
        replicas, algorithm = build(quadratic(2), 2, "local_sgd", lambda parameters: sgd(parameters, lr=0.25), lambda b: SlowMo(b, 2))
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


@pytest.mark.parametrize("tau, steps, at", [(3, 7, [3, 6]), (1, 2, [1, 2])])
def test_the_caller_is_called_just_before_an_average(tau, steps, at):
    """With workers still apart: there a consensus distance says something."""
    replicas, algorithm = make(3, "local_sgd", "average-maintain", tau=tau)
    seen = []
    look = lambda step: seen.append((step, algorithm.steps, float((replicas.rows() - replicas.rows().mean(0)).norm())))
    rows = run(Several(3), replicas, algorithm, steps, rate, before_average=look)
    assert [(step, steps) for step, steps, _ in seen] == [(k, k) for k in at]
    assert all(apart > 1e-3 for *_, apart in seen)
    plain = run(Several(3), *make(3, "local_sgd", "average-maintain", tau=tau), steps, rate)
    assert torch.equal(rows, plain)


@pytest.mark.parametrize("outer", ["average-maintain", "slowmo-reset", "noaverage-reset", "diloco", "average-average"])
def test_comm_volume_of_a_slow_step_is_spread_over_a_round(outer):
    """Its gossip is dropped but for noaverage."""
    m, tau = 4, 3
    replicas, algorithm = make(m, "sgp", outer, tau=tau)
    run(Several(m), replicas, algorithm, 2, rate)  # buffers that are averaged are there after the first step
    times = {"noaverage-reset": 0, "average-average": 2}.get(outer, 1)
    gossip = 1 if outer == "noaverage-reset" else (tau - 1) / tau
    messages, numbers = algorithm.comm_volume()
    assert (messages, numbers) == pytest.approx((gossip + times * 2 * (m - 1) / tau, gossip + times * 2 * (m - 1) / m / tau))


def test_rebase_begins_a_round_where_it_is_called():
    replicas, algorithm = make(3, "local_sgd", "slowmo-reset")
    run(Several(3), replicas, algorithm, 4, rate)
    mean = average(algorithm)
    algorithm.rebase()
    assert torch.equal(slow(algorithm, "x0"), mean) and not slow(algorithm, "u").any() and algorithm.steps == 4


@pytest.mark.parametrize("outer", OUTERS)
def test_weights_written_in_mid_training_raise(outer):
    replicas, algorithm = make(2, "local_sgd", outer)
    run(Several(2), replicas, algorithm, 2, rate)
    with torch.no_grad():
        replicas.models[0].a.add_(1)
    with pytest.raises(RuntimeError, match=r"call accept\(\) .* rebase\(\)"):
        algorithm.start()


def test_a_loaded_state_replaces_what_was_there():
    """Also into an algorithm that has already trained: a state without optimizer tensors empties the optimizer."""
    replicas, algorithm = make(2, "sgp", "slowmo-reset")
    algorithm.rebase()
    start = copied(state_dict(algorithm))
    run(Several(2), replicas, algorithm, 5, rate)
    end = copied(state_dict(algorithm))
    load_state_dict(algorithm, start)
    assert_same_state(state_dict(algorithm) | {"groups": None}, start | {"groups": None})
    run(Several(2), replicas, algorithm, 5, rate)
    assert_same_state(state_dict(algorithm), end)
