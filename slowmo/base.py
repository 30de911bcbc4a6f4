"""The base algorithms, together because they are read by comparison. Each is line 4 of Algorithm 1: one inner step of all workers.

A bucket whose gradients are there is stepped (`_update`) and sent (`_advance`), during backward or after it, as engine.py has it; `_landed`
waits for what was sent. Between steps rows hold the de-biased z = x / w, which is what models see, and no message is in flight. The
optimizer turns (gradient at z, z) into the update γd, so weight decay is taken at z. Where an exact average follows, gossip is dropped:
mixing keeps Σx and Σw, so the average is the same.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from slowmo.buckets import Bucket, Segment
from slowmo.engine import Engine
from slowmo.gossip import Gossip, add
from slowmo.replicas import Replicas
from slowmo.topology import Exponential, Graph, Ring, is_symmetric


class LocalSGD(Engine):
    """x_i <- x_i - γ d_i. Workers meet only when an outer algorithm averages them (outer.py). Parameters: see Engine."""

    def _update(self, bucket: Bucket) -> None:
        """Line 4."""
        self._optimizer_step(bucket)

    def _advance(self, bucket: Bucket) -> None:
        self._update(bucket)
        self._start_averages(bucket)


class AllReduce(LocalSGD):
    """x_i <- x_i - γ (direction of the mean gradient): every worker takes the same step. Large-batch SGD, the baseline.

    The mean is formed in buckets while the last backward of a step runs and is there when it returns, as with
    DistributedDataParallel; with overlap=True a bucket is stepped as soon as its mean has come.
    """

    _all_workers = True

    def comm_volume(self, average: str | None = None) -> tuple[float, float]:
        m = self.cluster.num_workers
        return (2.0 * (m - 1), 2 * (m - 1) / m) if m > 1 else (0.0, 0.0)  # ring: m - 1 pieces around, twice

    def _early(self) -> bool:
        return not self._average  # what is sent after a mean must not depend on when that comes

    def _behind(self) -> float:
        return math.inf if self.handover.reduce else 0


class SGP(LocalSGD):
    """Stochastic gradient push: x <- P(x - γd), w <- Pw, z = x / w (Assran et al. 2019). A bucket is sent as soon as it has been stepped.

    graph: `step -> {offset: weight}`, see topology.py; default the one-peer exponential. gossip_buffers: the optimizer's state takes
    part in every round, as in double-averaging (Yu et al. 2019). The memory of the spent gradients takes the first arrivals. On a graph
    that is not regular a step and an average take one more temporary of a segment.

    comm_dtype: `bfloat16` or `float16` rounds what workers send each other in a round, weights and exact averages stay as they are: half
    of the bytes, and a temporary of the rows' size. null: the rows' dtype.
    """

    def __init__(self, replicas: Replicas, optimizer: torch.optim.Optimizer, graph: Graph | None = None, gossip_buffers: bool = False,
                 comm_dtype: str | None = None, overlap: bool = False, elementwise: bool | None = None):  # fmt: skip
        super().__init__(replicas, optimizer, overlap, elementwise)
        if gossip_buffers and self.inner.whole:
            raise ValueError(f"gossip_buffers=True needs an elementwise optimizer, {type(optimizer).__name__} is not known to be one")
        self.graph = graph or Exponential(self.cluster.num_workers)
        self.gossip, self.gossip_buffers = Gossip(replicas, self.graph, comm_dtype), gossip_buffers
        rows = replicas.segments[0].x
        self.w = torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)
        self.regular = self.gossip.regular
        self._weights: Sequence[float | torch.Tensor]  # of the step that has been started
        self._next_w: torch.Tensor
        self._restarted: set[Segment] = set()  # since the last step began

    def restart(self, segment: Segment, x: torch.Tensor, buffers: str = "maintain", exact: bool = True) -> None:
        super().restart(segment, x, buffers, exact)
        self._restarted |= {segment} if exact else set()
        if len(self._restarted) == len(self.replicas.segments):  # everybody holds the average: nobody owes weight to anybody
            self.w = torch.ones_like(self.w)

    def comm_volume(self, average: str | None = None) -> tuple[float, float]:
        messages = self.gossip.mean_messages * self._gossiped(average)
        return messages, messages * self.gossip.compression

    def recv_buffers(self) -> float:
        most = self.gossip.most_messages * self._gossiped()
        return max(0, most - 1) + self.gossip.rounded(most)

    def _begin(self) -> None:
        self._restarted.clear()
        if not self._average:
            self._weights, self._next_w = self.gossip.weights(self.steps, self.w)
        elif self.gossip_buffers and self._average == "maintain":
            self._weights, _ = self.gossip.weights(self.steps, self.w)

    def _update(self, bucket: Bucket) -> None:
        surplus = [] if self.regular else [segment.x * (1 - 1 / self.w) for segment in bucket.segments]
        self._optimizer_step(bucket)
        for segment, part in zip(bucket.segments, surplus):  # (w z - γd) / w, of z - γd
            segment.x.div_(self.w).add_(part)

    def _advance(self, bucket: Bucket) -> None:
        super()._advance(bucket)
        for segment in bucket.segments:
            if not self._average:
                self.gossip.send(self.steps, segment, "z", segment.x, first=segment.spent)
            if self.gossip_buffers and self._average in (None, "maintain"):
                for name, block in self.inner.blocks(segment).items():
                    self.gossip.send(self.steps, segment, name, block)

    def _landed(self) -> Iterable[Segment]:
        for segment in self.replicas.segments:
            for name, arrivals in self.gossip.arrived(segment).items():
                block = segment.x if name == "z" else self.inner.blocks(segment)[name]
                block.mul_(self._weights[0])
                for weight, arrival in zip(self._weights[1:], arrivals):
                    add(block, weight, arrival)
            yield segment
        if not self._average:
            self.w = self._next_w

    def _start_average(self, segment: Segment) -> Callable[[], torch.Tensor]:
        """Σ x_i / Σ w_i."""
        if self.regular:
            return super()._start_average(segment)
        x, w = (self.cluster.mean(part, wait=False) for part in (segment.x * self.w, self.w))
        return lambda: x().div_(w())

    def _gossiped(self, average: str | None = None) -> int:
        """Rows that take part in a round."""
        buffers = len(self.inner.blocks(self.replicas.segments[0])) if self.gossip_buffers and average in (None, "maintain") else 0
        return buffers + (average is None)


class OSGP(SGP):
    """Overlap SGP: x <- Px - γd. Sends in `start`, waits in `step`: the message travels during forward and backward.

    The same iterates as the released code, which adds an arrival at the start of the next step; here nothing is in flight between
    steps, so nothing is drained and nothing more is saved. Where an exact average follows, it sends nothing before and steps as SGP.
    """

    def __init__(self, replicas: Replicas, optimizer: torch.optim.Optimizer, graph: Graph | None = None, comm_dtype: str | None = None,
                 overlap: bool = False, elementwise: bool | None = None):  # fmt: skip
        super().__init__(replicas, optimizer, graph, False, comm_dtype, overlap, elementwise)

    def recv_buffers(self) -> float:
        most = self.gossip.most_messages
        return most + self.gossip.rounded(most)  # gradients are formed while messages travel: their memory is not free

    def _begin(self) -> None:
        super()._begin()
        if not self._average:
            for segment in self.replicas.segments:
                self.gossip.send(self.steps, segment, "x", segment.x)

    def drop(self) -> None:
        super().drop()
        for segment in self.replicas.segments:
            self.gossip.arrived(segment)

    def _early(self) -> bool:
        return self._average is not None  # else a bucket waits for its message, which has until `step`

    def _advance(self, bucket: Bucket) -> None:
        if self._average:
            return super()._advance(bucket)
        changes: list[torch.Tensor | None] = []
        w = self._next_w
        for segment in bucket.segments:
            arrivals = self.gossip.arrived(segment)["x"]
            # rows + change = (Px) / w before γd is taken off; kept in the message, so that it takes no memory of its own
            change = arrivals[0].mul_(self._weights[1]) if arrivals else None if self.regular else torch.zeros_like(segment.x)
            if change is not None:
                for weight, arrival in zip(self._weights[2:], arrivals[1:]):
                    add(change, weight, arrival)
                add(change, self._weights[0] - 1 if self.regular else self._weights[0] - 1 / w, segment.x)
            changes.append(change)
        self._optimizer_step(bucket)
        for segment, change in zip(bucket.segments, changes):
            if not self.regular:
                segment.x.div_(w)
            if change is not None:
                segment.x.add_(change)


class DPSGD(OSGP):
    """D-PSGD (Lian et al. 2017): x <- Wx - γd with W symmetric, so that weights stay 1. The same messages as OSGP, both ways.

    graph: default the ring. Raises ValueError for one that is not symmetric.
    """

    def __init__(self, replicas: Replicas, optimizer: torch.optim.Optimizer, graph: Graph | None = None, comm_dtype: str | None = None,
                 overlap: bool = False, elementwise: bool | None = None):  # fmt: skip
        graph = graph or Ring(replicas.cluster.num_workers)
        if not all(is_symmetric(graph, step) for step in range(graph.cycle)):
            raise ValueError(f"D-PSGD needs symmetric mixing, {type(graph).__name__} is not: choose base/graph=ring or complete")
        super().__init__(replicas, optimizer, graph, comm_dtype, overlap, elementwise)
