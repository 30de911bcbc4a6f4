"""In backward or late: the same bits, whatever else is chosen."""

import contextlib
import dataclasses
import functools
import os

import pytest
import torch
import torch.distributed as dist
from helpers import irregular
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from loops import weights
from pool import Pool
from torch import nn

import slowmo
from slowmo.cluster import Cluster

STEPS = 7
OPTIMIZERS = {
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
}


@dataclasses.dataclass(frozen=True)
class Case:
    base: str = "sgp"
    tau: int = 3
    buffers: str = "reset"
    exact: bool = True
    alpha: float = 1.0
    beta: float = 0.5
    graph: str | None = None
    optimizer: str = "nesterov"
    bucket_cap_mb: float = 1e-4
    accumulate: int = 1
    ranks_per_worker: int = 1
    order: tuple[int, ...] = (0, 1, 2, 3)  # in which the blocks are used, so in which their gradients come
    unused: bool = False  # rank 0 leaves a block out at every other step
    dtype: str = "float64"
    narrow: bool = False  # one block is in bfloat16, with master rows


class Blocks(nn.Module):
    """Four blocks of different sizes whose order in forward is not that in which they were built."""

    def __init__(self, case):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 3 + 4 * k), nn.Tanh(), nn.Linear(3 + 4 * k, 5)) for k in range(4))
        self.norm, self.order = nn.LayerNorm(5), case.order
        self.to(getattr(torch, case.dtype))
        if case.narrow:
            self.blocks[2].bfloat16()

    def forward(self, x, left_out=None):
        for k in self.order:
            if k != left_out:
                x = x + self.blocks[k](x.to(self.blocks[k][0].weight.dtype)).to(x.dtype)
        return self.norm(x)


def graph(name, m):
    if name.startswith("irregular"):
        return irregular(m, in_turn=name.endswith("in turn"))
    return {"exponential": slowmo.Exponential, "two peers": lambda m: slowmo.Exponential(m, peers=2), "ring": slowmo.Ring}[name](m)


@functools.cache
def _cluster(num_workers, process):
    return Cluster(num_workers)


def cluster(num_workers):
    """One for all cases of a process: each makes groups of its own, which cost sockets. A forked process must not take its parent's."""
    return _cluster(num_workers, os.getpid())


def train(case, overlap):
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    workers, dtype = ranks // case.ranks_per_worker, getattr(torch, case.dtype)
    torch.manual_seed(0)
    model = Blocks(case)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr": 0.02},
    ]
    made = OPTIMIZERS[case.optimizer](groups)
    options = {"graph": graph(case.graph, workers)} if case.graph else {}
    made = slowmo.SlowMo(model, made, case.base, case.tau, case.alpha, case.beta, case.buffers, case.exact, cluster=cluster(workers),
                         overlap=overlap, bucket_cap_mb=case.bucket_cap_mb, accumulate=case.accumulate, **options)  # fmt: skip
    for step in range(STEPS):
        made.zero_grad()
        left_out = 1 if case.unused and rank == 0 and step % 2 else None
        for part in range(case.accumulate):
            data = torch.Generator().manual_seed(1000 * rank + 10 * step + part)
            x, y = (torch.randn(6, 5, generator=data, dtype=torch.float64).to(dtype) for _ in range(2))
            (model(x, left_out) - y).square().mean().backward()
        if overlap and case.base in ("sgp", "local_sgd") and not case.unused and case.ranks_per_worker == 1:
            assert all(p.grad is None for p in parameters), "a gradient is visible after its bucket has gone"
        made.step()
    state = made.state_dict()
    return weights(model), torch.cat([v.double().flatten() for s in state["state"].values() for _, v in sorted(s.items())]), made.steps


def compare(case):
    """In a process: (whether late and overlap agree, the parameters' bytes)."""
    late, early = (train(case, overlap) for overlap in (False, True))
    assert torch.isfinite(late[0]).all()
    return all(map(torch.equal, late[:2], early[:2])) and late[2] == early[2] == STEPS, late[0].numpy().tobytes()


@st.composite
def cases(draw, processes):
    base = draw(st.sampled_from(["local_sgd", "sgp", "osgp", "dpsgd", "allreduce"]))
    directed = [None, "exponential", "two peers", "ring", "irregular", "irregular in turn"]
    graphs = {"sgp": directed, "osgp": directed, "dpsgd": [None, "ring"]}.get(base, [None])
    ranks = draw(st.sampled_from([1, 2] if processes > 1 else [1]))
    name = draw(st.sampled_from(graphs))
    return Case(
        base=base,
        tau=draw(st.sampled_from([1, 2, 3, 50])),
        buffers=draw(st.sampled_from(["reset", "maintain", "average"])),
        exact=draw(st.booleans()),
        alpha=draw(st.sampled_from([1.0, 0.5])),
        beta=draw(st.sampled_from([0.0, 0.5])),
        graph=name if not str(name).startswith("irregular") or processes // ranks > 1 else None,
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        bucket_cap_mb=draw(st.sampled_from([1e-6, 1e-4, 5e-4, 2e-3, 25.0])),
        accumulate=draw(st.sampled_from([1, 1, 3])),
        ranks_per_worker=ranks,
        order=tuple(draw(st.permutations(range(4)))),
        unused=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float64", "float32"])),
        narrow=draw(st.booleans()),
    )


@contextlib.contextmanager
def pool_of(processes):
    pool = Pool(compare, processes)
    try:
        yield pool
    finally:
        pool.close()


# no shrinking: a failed case kills its processes, and a case is short as it is
TRIES = settings(
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@settings(TRIES, max_examples=60)
@given(cases(1))
def test_one_process(case):
    assert compare(case)[0]


@pytest.fixture(scope="module")
def two():
    with pool_of(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four():
    with pool_of(4) as pool:
        yield pool


@settings(TRIES, max_examples=30)
@given(case=cases(2))
@example(case=Case("allreduce", tau=3))
@example(case=Case("sgp", graph="irregular", exact=False))
def test_two_processes(two, case):
    check(two(case), case, 2)


@pytest.mark.slow
@settings(TRIES, max_examples=100)
@given(case=cases(4))
@example(case=Case("sgp", graph="two peers"))
@example(case=Case("osgp", graph="irregular", ranks_per_worker=2))
def test_four_processes(four, case):
    check(four(case), case, 4)


def check(answers, case, processes):
    assert all(equal for equal, _ in answers)
    rows = [torch.frombuffer(bytearray(row), dtype=getattr(torch, case.dtype)) for _, row in answers]
    for first in range(0, processes, case.ranks_per_worker):  # the ranks of a worker hold the same
        for row in rows[first + 1 : first + case.ranks_per_worker]:
            assert torch.equal(rows[first], row), f"ranks of a worker differ at {(rows[first] != row).nonzero().flatten().tolist()}"
    if case.base == "allreduce" or STEPS % case.tau == 0 and case.exact:  # just after an average all workers do
        assert all(torch.equal(rows[0], row) for row in rows)
