"""The golden numbers (exact: dyadic) through the wrapper, in a loop as anybody writes it; each worker is a process."""

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from torch import nn

import slowmo

C = (-1.0, 7.0)
FOUR = (-1.0, 7.0, 4.0, -2.0)
NESTEROV = {"momentum": 0.5, "nesterov": True}


class Scalar(nn.Module):
    """Worker i minimises a_i (x - c_i)^2 / 2; everybody starts at 1."""

    def __init__(self, dtype):
        super().__init__()
        self.x = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, a, c):
        return a * (self.x - c).square().sum() / 2


def go(c, steps, lr, options, sgd=None, a=None, dtype=torch.float64):
    """Every iterate of every worker, and its u if there is one: [workers][step] -> (x, u)."""

    def run():
        rank = dist.get_rank()
        model = Scalar(dtype)
        made = slowmo.SlowMo(model, torch.optim.SGD(model.parameters(), lr=1.0, **(sgd or {})), **options)
        seen = []
        for step in range(steps):
            made.param_groups[0]["lr"] = lr(step) if callable(lr) else lr
            made.zero_grad()
            model(a[rank] if a else 1.0, c[rank]).backward()
            made.step()
            u = made.state_dict()["state"][0].get("slowmo_u")
            seen.append((model.x.item(), None if u is None else u.item()))
        return seen

    return spawn(run, len(c))


@pytest.mark.parametrize("overlap", [False, True], ids=["late", "overlap"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options, lr, expected", [
    ({"beta": 0.5}, 0.5, [2.5, 3.625, 3.71875]),
    ({"beta": 0.5, "alpha": 0.5}, 0.5, [1.75, 2.59375, 3.16796875]),
    ({"beta": 0.0}, 0.5, [2.5, 2.875, 2.96875]),
    ({"beta": 0.5}, lambda step: 0.5 if step < 2 else 0.25, [2.5, 3.09375, 3.349609375]),
    ({"beta": 0.5}, lambda step: 0.5 if step < 1 else 0.25, [2.25, 3.203125, 3.5908203125]),
], ids=["alpha 1", "alpha 1/2", "beta 0", "rate falls after a round", "rate falls inside a round"])  # fmt: skip
def test_local_sgd_with_slow_momentum(options, lr, expected, dtype, overlap):
    out = go(C, 6, lr, dict(base="local_sgd", tau=2, overlap=overlap, **options), dtype=dtype)
    for worker in out:
        assert [x for x, _ in worker[1::2]] == expected
    assert out[0][0] != out[1][0]
    if options == {"beta": 0.5} and lr == 0.5:
        assert [u for _, u in out[0][1::2]] == [-3, -2.25, -0.1875]


@pytest.mark.parametrize("buffers, expected", [
    ("reset", [1.953125, 2.5562744140625, 2.461392402648926]),
    ("maintain", [1.953125, 2.7232666015625, 2.6985597610473633]),
    ("average", [1.953125, 2.6661376953125, 2.5846452713012695]),
])  # fmt: skip
def test_what_happens_to_buffers(buffers, expected):
    for worker in go(C, 6, 0.5, {"base": "local_sgd", "tau": 2, "beta": 0.5, "buffers": buffers}, NESTEROV, a=(1.0, 0.5)):
        assert [x for x, _ in worker[1::2]] == expected


@pytest.mark.parametrize("overlap", [False, True], ids=["late", "overlap"])
@pytest.mark.parametrize("base, options, lr, steps, expected", [
    ("sgp", {"tau": 10**6}, 0.5, 4, [1.6875, 2.1875, 1.6875, 2.1875]),
    ("sgp", {"tau": 3, "beta": 0.5}, 0.5, 6, [2.421875] * 4),
    ("osgp", {"tau": 10**6}, 0.25, 4, [1.171875, 2.7109375, 1.83984375, 1.01171875]),
    ("osgp", {"tau": 3, "beta": 0.5}, 0.25, 6, [2.111083984375] * 4),
])  # fmt: skip
def test_gossip(base, options, lr, steps, expected, overlap):
    out = go(FOUR, steps, lr, dict(base=base, overlap=overlap, **options))
    assert [worker[-1][0] for worker in out] == expected


def test_large_batch_sgd():
    """tau 1, alpha 1, beta 0 over plain SGD; and AllReduce: the same iterates."""
    expected, x = [], 1.0
    for _ in range(4):
        x -= 0.5 * (x - 3.0)
        expected.append(x)
    for options in (
        {"base": "local_sgd", "tau": 1, "beta": 0.0},
        {"base": "allreduce", "tau": 10**6},
        {"base": "allreduce", "tau": 1, "beta": 0.0},
    ):
        for worker in go(C, 4, 0.5, options):
            assert [x for x, _ in worker] == expected


def test_slow_momentum_at_a_constant_rate_is_torchs_momentum_on_whole_rounds():
    out = go(C, 12, 0.25, {"base": "local_sgd", "tau": 3, "beta": 0.5, "alpha": 0.5})
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    outer = torch.optim.SGD([x], lr=0.5, momentum=0.5)
    for k in range(4):
        inner = [x.item()] * 2
        for _ in range(3):
            inner = [v - 0.25 * (v - c) for v, c in zip(inner, C)]
        x.grad = x.detach() - sum(inner) / 2
        outer.step()
        assert out[0][3 * k + 2][0] == pytest.approx(x.item(), abs=1e-14)
