"""Learning-rate schedules."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.runner.schedules import Constant, InverseSqrt, Step

PAPER = {"warmup": 5, "milestones": [100, 150, 175], "of": 200}


def test_constant():
    assert {Constant(0.3, 10)(step) for step in range(10)} == {0.3}


def test_step_at_every_corner():
    schedule = Step(1.0, 400, **PAPER)  # two steps an epoch
    assert [schedule(step) for step in (0, 4, 9)] == [0.1, 0.5, 1.0]
    corners = {10: 1.0, 199: 1.0, 200: 0.1, 299: 0.1, 300: 0.01, 349: 0.01, 350: 0.001, 399: 0.001}
    assert {step: schedule(step) for step in corners} == pytest.approx(corners)


def test_factor_and_start_of_the_warmup():
    schedule = Step(0.8, 100, warmup=10, milestones=[50], factor=0.25, warmup_from=0.5)
    assert [schedule(step) for step in (0, 4, 9, 10, 49, 50, 99)] == pytest.approx([0.44, 0.6, 0.8, 0.8, 0.8, 0.2, 0.2])


def test_parts_default_to_steps():
    assert [Step(1.0, 8, warmup=2, milestones=[4, 6])(step) for step in range(8)] == pytest.approx(
        [0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])  # fmt: skip


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    parts=st.integers(1, 40), steps=st.integers(1, 60),
    times=st.lists(st.floats(0, 1), min_size=1, max_size=5).map(sorted),
)  # fmt: skip
def test_step_keeps_its_shape_and_is_never_zero(parts, steps, times):
    warmup, *marks = times
    make = lambda n: Step(1.0, n, warmup=warmup * 40, milestones=[40 * t for t in marks], of=40)
    short, long = make(steps), make(steps * parts)
    values = [short(step) for step in range(steps)]
    assert all(0 < value <= 1 for value in values)
    after = round(warmup * steps)
    assert values[:after] == sorted(values[:after]) and values[after:] == sorted(values[after:], reverse=True)
    # the corners lie at the same parts of the run, up to a half step of rounding
    for few, many in zip([short.warmup, *short.milestones], [long.warmup, *long.milestones], strict=True):
        assert abs(few / steps - many / (steps * parts)) <= 0.5 / steps + 0.5 / (steps * parts) + 1e-12


def test_a_shorter_run_keeps_the_shape_exactly_where_it_can():
    whole, short = Step(0.7, 2000, **PAPER), Step(0.7, 400, **PAPER)
    assert [short(step) for step in range(10, 400)] == [whole(5 * step) for step in range(10, 400)]
    assert [short(step) for step in range(10)] == [whole(5 * step + 4) for step in range(10)]


@pytest.mark.parametrize(
    "options",
    [
        {"warmup": 5, "milestones": [150, 100], "of": 200},
        {"warmup": 5, "milestones": [100, 201], "of": 200},
        {"warmup": 5, "milestones": [-1], "of": 200},
        {"warmup": -1, "milestones": [], "of": 200},
        {"warmup": 201, "milestones": [], "of": 200},
        {"warmup": 20, "milestones": [10], "of": 200},
        {"warmup": 0, "milestones": [60]},  # in steps, of 50
        {"warmup": float("nan"), "milestones": []},
    ],
)
def test_step_refuses(options):
    with pytest.raises(ValueError, match="must come in this order"):
        Step(1.0, 50, **options)


def test_inverse_sqrt():
    schedule = InverseSqrt(2.0, 1000, warmup=4, start=1.0)
    assert [schedule(step) for step in range(4)] == [1.25, 1.5, 1.75, 2.0]
    assert schedule(15) == 1.0 and schedule(63) == 0.5  # 2 sqrt(4 / 16), 2 sqrt(4 / 64)


@pytest.mark.parametrize("warmup", [1, 7, 4000])
def test_inverse_sqrt_is_continuous_at_the_peak_and_never_zero(warmup):
    schedule = InverseSqrt(0.001, 10**6, warmup=warmup)
    assert schedule(warmup - 1) == 0.001  # the last of the warm-up is the first of the curve: (warmup / warmup) ** 0.5
    assert schedule(warmup) == pytest.approx(0.001 * (warmup / (warmup + 1)) ** 0.5)
    assert max(schedule(step) for step in range(3 * warmup)) == 0.001
    assert schedule(0) > 0 and schedule(10**6 - 1) > 0


def test_inverse_sqrt_refuses():
    with pytest.raises(ValueError, match="at least one warm-up step"):
        InverseSqrt(0.1, 100, warmup=0)
