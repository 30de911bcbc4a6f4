"""Communication graphs: who sends what to whom at a step.

Every graph of the paper looks the same from every worker, so a graph is a function of the step alone:

    graph(step) -> {offset: weight}     worker j sends `weight` of itself to worker j + offset (mod m); offset 0 is what it keeps

The weights of a sender add up to 1 (column-stochastic mixing, what push-sum needs). A weight is a number when it is the same for all
workers, or a tuple of m numbers, one a sender. Steps count from 0 and never restart. graph.size is m; after graph.cycle steps the graph
repeats.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

Weight = float | tuple[float, ...]


class Graph(Protocol):
    """What a graph is, see above."""

    size: int
    cycle: int

    def __call__(self, step: int) -> Mapping[int, Weight]: ...


class Exponential:
    """One-peer directed exponential graph: offsets 1, 2, 4, ... < m in turn, half kept, half sent (Assran et al. 2019).

    `peers` = 2 is its two-peer form: two consecutive offsets per step, a third kept. With m a power of two and one peer, log2(m) rounds
    are the exact average.
    """

    def __init__(self, size: int, peers: int = 1):
        if peers < 1:
            raise ValueError(f"peers={peers}: a worker sends to at least one peer a step, set peers=1 or 2")
        self.size, self.peers = size, peers
        # bit_length is floor(log2(m - 1)) + 1 in integers; logarithms in floats are wrong for some m
        self.rounds = (size - 1).bit_length()
        self.cycle = max(1, self.rounds)

    def __call__(self, step: int) -> dict[int, float]:
        return _equal([2 ** ((self.peers * step + k) % self.rounds) for k in range(self.peers)] if self.rounds else [])


class Ring:
    """Undirected ring: a third to each neighbour, a third kept (a half and a half for m = 2). Symmetric: fit for D-PSGD."""

    def __init__(self, size: int):
        self.size, self.cycle = size, 1

    def __call__(self, step: int) -> dict[int, float]:
        return _equal([offset % self.size for offset in (1, -1) if offset % self.size])


class Complete:
    """Everybody to everybody: one round is the exact average. m - 1 messages per worker: for comparison, not for speed."""

    def __init__(self, size: int):
        self.size, self.cycle = size, 1

    def __call__(self, step: int) -> dict[int, float]:
        return _equal(range(1, self.size))


class Mixing:
    """Any column-stochastic matrices, used in turn. matrices: `[m, m]` or a list of them, entry `[i][j]` the weight that j sends to i.

    Where workers receive unequally, push-sum weights differ from 1. ValueError when a column does not sum to 1 or an entry is negative.
    """

    def __init__(self, size: int, matrices: Any):
        stack = torch.as_tensor(matrices, dtype=torch.float64)
        stack = stack if stack.ndim == 3 else stack.unsqueeze(0)
        if stack.shape[1:] != (size, size):
            raise ValueError(f"mixing matrices of shape {list(stack.shape[1:])} for {size} workers: give [{size}, {size}]")
        if (stack < 0).any() or not torch.allclose(stack.sum(1), torch.ones(1, dtype=torch.float64)):
            raise ValueError("a mixing matrix needs entries >= 0 and columns that sum to 1: what a worker keeps and sends is all it has")
        if (stack.diagonal(dim1=1, dim2=2) <= 0).any():
            raise ValueError("a mixing matrix needs a positive diagonal: a worker that keeps nothing can end up with weight 0")
        self.size, self.cycle = size, len(stack)
        self.rounds = [self._weights(matrix) for matrix in stack]

    def _weights(self, matrix: torch.Tensor) -> dict[int, tuple[float, ...]]:
        offsets = {offset: tuple(matrix[(j + offset) % self.size, j].item() for j in range(self.size)) for offset in range(self.size)}
        return {offset: weights for offset, weights in offsets.items() if any(weights)}

    def __call__(self, step: int) -> dict[int, tuple[float, ...]]:
        return self.rounds[step % len(self.rounds)]


def _equal(offsets: Iterable[int]) -> dict[int, float]:
    """Equal weights for what is kept and each distinct offset (at m = 2 and 3 several rules name the same edge twice)."""
    offsets = list(dict.fromkeys(offsets))
    return {offset: 1 / (len(offsets) + 1) for offset in [0, *offsets]}


def mixing_matrix(graph: Graph, step: int) -> torch.Tensor:
    """The m x m matrix P of a round, float64: entry [i, j] is the weight of itself that worker j gives to worker i."""
    matrix = torch.zeros(graph.size, graph.size, dtype=torch.float64)
    for offset, weight in graph(step).items():
        for j in range(graph.size):
            matrix[(j + offset) % graph.size, j] += weight[j] if isinstance(weight, tuple) else weight
    return matrix


def is_symmetric(graph: Graph, step: int) -> bool:
    """Whether the round's matrix is symmetric: i gives j what j gives i."""
    m, offsets = graph.size, graph(step)
    for offset, weight in offsets.items():
        back = offsets.get(-offset % m)
        turned = tuple(weight[(j - offset) % m] for j in range(m)) if isinstance(weight, tuple) else weight
        if back != turned:
            return False
    return True
