"""The golden numbers: hand-computed trajectories on scalars, exact in float32 and float64, compared with ==."""

import pytest
import torch
from helpers import Scalars, build, run, sgd, slow

import slowmo
from slowmo.outer import Average, SlowMo

PAIR, FOUR = [-1.0, 7.0], [-1.0, 7.0, 4.0, -2.0]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def after_slow_steps(task, m, base, outer, lr, tau, count, optimizer=sgd):
    """x after each slow step, and the algorithm; every worker must hold the same."""
    replicas, algorithm = build(task, m, base, optimizer, outer)
    xs = []
    for t in range(1, count + 1):
        rows = run(task, replicas, algorithm, t * tau, lr)
        assert (rows == rows[0]).all()
        xs.append(rows[0].item())
    return xs, algorithm


@DTYPES
def test_local_sgd_with_slowmo(dtype):
    task, u = Scalars(PAIR, dtype=dtype), []
    replicas, algorithm = build(task, 2, "local_sgd", outer=lambda base: SlowMo(base, tau=2, beta=0.5))
    for t, x in enumerate((2.5, 3.625, 3.71875), 1):
        assert (run(task, replicas, algorithm, 2 * t, 0.5) == x).all()
        u.append(slow(algorithm, "u").item())
    assert u == [-3, -2.25, -0.1875]


@DTYPES
@pytest.mark.parametrize("alpha, beta, expected", [(0.5, 0.5, [1.75, 2.59375, 3.16796875]), (1, 0, [2.5, 2.875, 2.96875])])
def test_alpha_and_beta(dtype, alpha, beta, expected):
    task = Scalars(PAIR, dtype=dtype)
    outer = lambda base: SlowMo(base, tau=2, alpha=alpha, beta=beta)
    assert after_slow_steps(task, 2, "local_sgd", outer, 0.5, 2, 3)[0] == expected


@DTYPES
def test_no_slow_momentum_is_local_sgd_bitwise(dtype):
    task = Scalars(PAIR, dtype=dtype)
    xs, _ = after_slow_steps(task, 2, "local_sgd", lambda base: Average(base, tau=2), 0.5, 2, 3)
    assert xs == [2.5, 2.875, 2.96875]


@DTYPES
@pytest.mark.parametrize(
    "lr, expected",
    [
        (lambda k: 0.5 if k < 2 else 0.25, [2.5, 3.09375, 3.349609375]),
        (lambda k: 0.5 if k < 1 else 0.25, [2.25, 3.203125, 3.5908203125]),
    ],
)
def test_slow_momentum_is_divided_by_the_rate_of_the_last_inner_step(dtype, lr, expected):
    task = Scalars(PAIR, dtype=dtype)
    assert after_slow_steps(task, 2, "local_sgd", lambda base: SlowMo(base, tau=2, beta=0.5), lr, 2, 3)[0] == expected


@pytest.mark.parametrize(
    "buffers, expected",
    [
        ("reset", [1.953125, 2.5562744140625, 2.461392402648926]),
        ("maintain", [1.953125, 2.7232666015625, 2.6985597610473633]),
        ("average", [1.953125, 2.6661376953125, 2.5846452713012695]),
    ],
)
@DTYPES
def test_buffers_with_nesterov(dtype, buffers, expected):
    task = Scalars(PAIR, a=[1.0, 0.5], dtype=dtype)
    optimizer = lambda rows: sgd(rows, momentum=0.5, nesterov=True)
    outer = lambda base: SlowMo(base, tau=2, beta=0.5, buffers=buffers)
    assert after_slow_steps(task, 2, "local_sgd", outer, 0.5, 2, 3, optimizer)[0] == expected


@DTYPES
def test_sgp(dtype):
    task = Scalars(FOUR, dtype=dtype)
    replicas, algorithm = build(task, 4, "sgp")
    assert run(task, replicas, algorithm, 4, 0.5).flatten().tolist() == [1.6875, 2.1875, 1.6875, 2.1875]
    assert (algorithm.w == 1).all()


@DTYPES
def test_sgp_with_slowmo(dtype):
    task = Scalars(FOUR, dtype=dtype)
    assert after_slow_steps(task, 4, "sgp", lambda base: SlowMo(base, tau=3, beta=0.5), 0.5, 3, 2)[0][1] == 2.421875


@DTYPES
def test_osgp_and_what_is_in_flight(dtype):
    """The numerators kept before the last arrival are what the step gave less what arrived: half of each predecessor's start."""
    task = Scalars(FOUR, dtype=dtype)
    replicas, algorithm = build(task, 4, "osgp")
    before = run(task, replicas, algorithm, 3, 0.25)
    after = run(task, replicas, algorithm, 4, 0.25)
    hop = next(hop for hop in slowmo.Exponential(4)(3) if hop)
    assert (after - before.roll(hop, 0) / 2).flatten().tolist() == [-0.1640625, 2.4375, 1.66796875, -0.36328125]
    assert after.flatten().tolist() == [1.171875, 2.7109375, 1.83984375, 1.01171875]
    assert (algorithm.w == 1).all()


@DTYPES
def test_osgp_with_slowmo_loses_no_message(dtype):
    task = Scalars(FOUR, dtype=dtype)
    xs, _ = after_slow_steps(task, 4, "osgp", lambda base: SlowMo(base, tau=3, beta=0.5), 0.25, 3, 2)
    assert xs[1] == 2.111083984375
