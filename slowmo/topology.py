"""Communication graphs: who sends what to whom at a step.

Every graph of the paper looks the same from every worker, so a graph is a function of the step alone:

    graph(step) -> {hop: share}     worker j sends `share` of itself to worker j + hop (mod m); hop 0 is what it keeps

The shares of a sender add up to 1 (column-stochastic mixing, what push-sum needs). A share is a number when it is the same for all
workers, or a tuple of m numbers, one a sender. Steps count from 0 and never restart. graph.size is m; after graph.cycle steps the graph
repeats.
"""

import torch


class Exponential:
    """One-peer directed exponential graph: hops 1, 2, 4, ... < m in turn, half kept, half sent (Assran et al. 2019).

    `peers` = 2 is its two-peer form: two consecutive hops a step, a third kept. With m a power of two and one peer, log2(m) rounds
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
        return _equal([hop % self.size for hop in (1, -1) if hop % self.size])


class Complete:
    """Everybody to everybody: one round is the exact average. m - 1 messages a worker: for comparison, not for speed."""

    def __init__(self, size: int):
        self.size, self.cycle = size, 1

    def __call__(self, step: int) -> dict[int, float]:
        return _equal(range(1, self.size))


class Mixing:
    """Any column-stochastic matrices, used in turn. matrices: `[m, m]` or a list of them, entry [i][j] the share that j sends to i.

    Where workers receive unequally, push-sum weights differ from 1. ValueError when a column does not sum to 1 or an entry is negative.
    """

    def __init__(self, size: int, matrices):
        stack = torch.as_tensor(matrices, dtype=torch.float64)
        stack = stack if stack.ndim == 3 else stack.unsqueeze(0)
        if stack.shape[1:] != (size, size):
            raise ValueError(f"mixing matrices of shape {list(stack.shape[1:])} for {size} workers: give [{size}, {size}]")
        if (stack < 0).any() or not torch.allclose(stack.sum(1), torch.ones(1, dtype=torch.float64)):
            raise ValueError("a mixing matrix needs entries >= 0 and columns that sum to 1: what a worker keeps and sends is all it has")
        if (stack.diagonal(dim1=1, dim2=2) <= 0).any():
            raise ValueError("a mixing matrix needs a positive diagonal: a worker that keeps nothing can end up with weight 0")
        self.size, self.cycle = size, len(stack)
        self.rounds = [self._shares(matrix) for matrix in stack]

    def _shares(self, matrix: torch.Tensor) -> dict[int, tuple[float, ...]]:
        hops = {hop: tuple(matrix[(j + hop) % self.size, j].item() for j in range(self.size)) for hop in range(self.size)}
        return {hop: shares for hop, shares in hops.items() if any(shares)}

    def __call__(self, step: int) -> dict[int, tuple[float, ...]]:
        return self.rounds[step % len(self.rounds)]


def _equal(hops) -> dict[int, float]:
    """Equal shares for what is kept and each distinct hop (at m = 2 and 3 several rules name the same edge twice)."""
    hops = list(dict.fromkeys(hops))
    return {hop: 1 / (len(hops) + 1) for hop in [0, *hops]}


def mixing_matrix(graph, step: int) -> torch.Tensor:
    """The m x m matrix P of a round, float64: entry [i, j] is the share of itself that worker j gives to worker i."""
    matrix = torch.zeros(graph.size, graph.size, dtype=torch.float64)
    for hop, share in graph(step).items():
        for j in range(graph.size):
            matrix[(j + hop) % graph.size, j] += share[j] if isinstance(share, tuple) else share
    return matrix


def is_symmetric(graph, step: int) -> bool:
    """Whether the round's matrix is symmetric: i gives j what j gives i."""
    m, hops = graph.size, graph(step)
    for hop, share in hops.items():
        back = hops.get(-hop % m)
        turned = tuple(share[(j - hop) % m] for j in range(m)) if isinstance(share, tuple) else share
        if back != turned:
            return False
    return True
