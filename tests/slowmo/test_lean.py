"""The update path allocates no block of the rows' size beyond what the docstrings name."""

import pytest
import torch
from helpers import BASES, build, quadratic, sgd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import slowmo
from slowmo import outer

M, D = 4, 64


class Allocated(TorchDispatchMode):
    """The sizes, in numbers, of the tensors that operations make anew."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def tensors(tree):
            return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]

        known = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        self.sizes += [t.numel() for t in tensors(result) if t.untyped_storage().data_ptr() not in known]
        return result


def allocations(base, outer=None, steps=2) -> list[int]:
    """Sizes >= a row that one step allocates, after `steps` have run."""
    replicas, algorithm = build(quadratic(M, d=D), M, base, lambda rows: sgd(rows, momentum=0.9, weight_decay=0.1), outer)
    (segment,) = replicas.segments
    for _ in range(steps):
        algorithm.start(0.1)
        segment.grad.fill_(0.1)
        algorithm.step()
    algorithm.start(0.1)
    segment.grad.fill_(0.1)
    with Allocated() as mode:
        algorithm.step()
    return sorted(size for size in mode.sizes if size >= D)


@pytest.mark.parametrize("base", [name for name in BASES if "irregular" not in name])
def test_an_inner_step_allocates_no_block(base):
    # AllReduce forms the mean gradient, one row; the others nothing
    assert allocations(base) == ([D] if base == "allreduce" else [])


def test_an_irregular_graph_takes_one_block():
    # SGP: (1 - 1 / w) z; OSGP: nothing, its message carries it
    assert allocations("sgp_irregular") == [M * D]
    assert allocations("osgp_irregular") == []


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_reads_no_number(overlap):
    """Which a GPU would have to be waited for: on the meta device there is none."""
    model = torch.nn.Linear(3, 3, device="meta")
    algorithm = slowmo.LocalSGD(
        slowmo.Replicas(model, slowmo.Cluster(1, "meta")), torch.optim.SGD(model.parameters(), lr=0.1), overlap=overlap
    )
    algorithm.start(0.1)
    model(torch.empty(1, 3, device="meta")).sum().backward()
    algorithm.step()


def test_a_slow_step_takes_one_row():
    # the average; x0 minus it takes its place
    assert allocations("sgp", lambda base: outer.SlowMo(base, tau=3, beta=0.5)) == [D]
    assert allocations("sgp", lambda base: outer.NesterovOuter(base, tau=3, beta=0.5)) == [D]
    assert allocations("local_sgd", lambda base: outer.Average(base, tau=3)) == [D]
    # without exact averages each worker has its own difference, in its row
    assert allocations("sgp", lambda base: outer.SlowMo(base, tau=3, beta=0.5, exact=False)) == []
