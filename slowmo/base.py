"""The base algorithms, together because they are read by comparison. Each is line 4 of Algorithm 1: one inner step of all workers.

The contract, over segments `[n, d]` (buckets.py):

    start(lr, average, fragment)  before the gradients; average: what an exact average that follows this step does to buffers, or None;
                                  fragment: of which segments alone, with LocalSGD
    step()                        after them: x <- the next iterate, gradients zeroed
    averaged(segment)             -> [1, d], the exact average over all m workers, under way since the segment was stepped
    restart(segment, x, buffers)  continue from x; the optimizer's buffers: reset | maintain | average

In between each bucket advances once: `_advance` steps it and sends it. That happens in `step` (late), or with overlap=True as soon as
backward has written its last gradient, so that messages travel while backward still runs; the iterates are the same bits.

Between steps rows hold the de-biased z = x / w, which is what models see, and no message is in flight. The optimizer turns (gradient at
z, z) into the update γd, so weight decay is taken at z. Where an exact average follows, gossip is dropped: mixing keeps Σx and Σw, so
the average is the same.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch

from slowmo.buckets import Bucket, Handover, Segment, start_mean
from slowmo.cluster import Pending
from slowmo.inner import inner_optimizer
from slowmo.replicas import Replicas
from slowmo.topology import Exponential, Graph, Ring, Weight, is_symmetric

BUFFERS = ("reset", "maintain", "average")


class LocalSGD:
    """x_i <- x_i - γ d_i. Workers meet only when an outer algorithm averages them (outer.py).

    optimizer: a torch optimizer over the parameters of `replicas.models[0]`; inner.py says which. overlap: buckets advance during
    backward; `.grad` is None from then until `step` returns, so nothing can read or clip gradients. elementwise: see inner.py. Where a
    worker is several ranks, their gradients are averaged first, in buckets, during backward.
    Raises ValueError for another optimizer, or with overlap for one that is not elementwise.
    """

    _all_workers = False  # whether gradients are averaged over all workers or inside a worker
    # of an algorithm without an outer one
    due: Literal[False] = False
    exact: bool = True
    slow: None = None
    slow_names: tuple[str, ...] = ()
    tau: None = None

    def __init__(self, replicas: Replicas, optimizer: torch.optim.Optimizer, overlap: bool = False, elementwise: bool | None = None):
        self.replicas, self.optimizer, self.cluster, self.overlap = replicas, optimizer, replicas.cluster, overlap
        self.inner = inner_optimizer(optimizer, replicas, elementwise, overlap)
        reduces = self._all_workers and self.cluster.num_workers > 1 or self.cluster.worker_size > 1
        self.handover = Handover(replicas, self._start_mean if reduces else None, overlap or reduces)
        self.base, self.steps = self, 0  # finished steps; never restart
        self._average: str | None = None
        self._fragment: int | None = None
        self._averages: dict[Segment, Callable[[], torch.Tensor]] = {}

    @property
    def started(self) -> bool:
        return self.handover.enabled

    @torch.no_grad()
    def start(self, lr: float | None = None, average: str | None = None, fragment: int | None = None) -> None:
        """A step begins, with learning rate `lr` (default: those of the parameter groups). Once more: its gradients come anew."""
        self.take_writes()
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        self.inner.pull()
        first, self._average, self._fragment = not self.started, average, fragment
        self.handover.enable(self._advance, self.overlap and self._early(), self._behind())
        if first:
            self._begin()

    @torch.no_grad()
    def step(self) -> None:
        """The rest of the inner step. Afterwards nothing but the exact averages is under way."""
        if not self.started:
            self.start()
        elif not self.overlap:
            self.inner.pull()  # a scheduler may have moved since
        self.handover.finish(self.inner.step_all)
        for segment in self._landed():
            segment.zero_grads()
            segment.written()
        self.inner.push()
        self.replicas.remember()
        self.steps += 1

    def take_writes(self, frozen: bool = False) -> None:
        """Rows follow weights that were written before the first step, or when a state is loaded. RuntimeError for later ones.

        frozen: parameters may be frozen just now, as nothing is trained."""
        if self.replicas.check(frozen):
            if self.steps:
                raise RuntimeError(
                    "weights were written from outside in mid-training: call accept() after a clamp or the like, rebase() where training "
                    "begins anew from them, or write before the first step"
                )
            self.replicas.forget()
        self.replicas.accept_writes()

    def rebase(self) -> None:
        """Go on from the weights as they are now, whoever wrote them. A step that has been started begins anew."""
        if self.started:
            self.drop()
        self.replicas.forget()
        self.replicas.accept_writes()

    def drop(self) -> None:
        """A step that has been started is not taken."""
        self.handover.drop()

    @torch.no_grad()
    def averaged(self, segment: Segment) -> torch.Tensor:
        """Σ x_i / Σ w_i after a step that was started with `average`, `[1, d]`, to be overwritten by whoever restarts; once."""
        return self._averages.pop(segment)()

    @torch.no_grad()
    def average(self) -> list[torch.Tensor]:
        """The exact average of the workers as they stand, `[1, d]` for each segment. A collective; changes nothing."""
        waits = [self._start_average(segment) for segment in self.replicas.segments]
        return [wait() for wait in waits]

    @torch.no_grad()
    def restart(self, segment: Segment, x: torch.Tensor, buffers: str = "maintain", exact: bool = True) -> None:
        """The segment's rows <- x: `[1, d]`, or with exact=False `[n, d]`, each its own.

        buffers: `reset` leaves the optimizer as if it had never stepped, `maintain` as it is; `average` averages each buffer over the
        workers and keeps counters. ValueError for another word.
        """
        if buffers not in BUFFERS:
            raise ValueError(f"buffers={buffers!r}: choose one of {', '.join(BUFFERS)}")
        segment.x.copy_(x)
        segment.written()
        if buffers == "reset":
            self.inner.reset(segment)
        elif buffers == "average":
            self.inner.average(segment)
        self.replicas.remember()

    def comm_volume(self, average: str | None = None) -> tuple[float, float]:
        """What a worker sends per step, on the mean over a cycle of the graph, beside an average that follows (of this kind):
        (messages, numbers in units of d)."""
        return 0.0, 0.0

    def recv_buffers(self) -> float:
        """Rows `[n, d]` that messages take, beside rows and gradients."""
        return 0

    # --- what differs between algorithms ---

    def _begin(self) -> None:
        """Before the gradients."""

    def _advance(self, bucket: Bucket) -> None:
        """Step a bucket whose gradients are final, and send it."""
        self._update(bucket)
        if self._average:
            alone = self.cluster.num_workers == self.cluster.world_size == 1
            for segment in bucket.segments:
                if self._fragment in (None, segment.fragment):  # a worker alone is its own average: no copy
                    self._averages[segment] = segment.x.detach if alone else self._start_average(segment)

    def _landed(self) -> Iterable[Segment]:
        """When all buckets have advanced: each segment, as soon as what was sent to it has come."""
        return self.replicas.segments

    def _early(self) -> bool:
        """Whether buckets may advance during backward in this step."""
        return True

    def _behind(self) -> float:
        """How many buckets advancing stays behind the mean of gradients: what is sent then must not wait for the youngest one."""
        return 1 if self.handover.reduce else 0

    def _start_average(self, segment: Segment) -> Callable[[], torch.Tensor]:
        return self.cluster.mean(segment.x.detach(), wait=False)

    def _update(self, bucket: Bucket) -> None:
        """Line 4."""
        self._optimizer_step(bucket)

    def _optimizer_step(self, bucket: Bucket) -> None:
        """x <- x - γd, in place. The gradients are spent."""
        for segment in bucket.segments:
            if self.replicas.loss_scale != 1:
                segment.grad.div_(self.replicas.loss_scale)
        self.inner.step(bucket)
        if self.handover.overlap:
            for segment in bucket.segments:
                segment.take_grads()
                segment.written()

    def _start_mean(self, bucket: Bucket) -> Pending:
        """Of a bucket's gradients: over all workers, or over this worker's ranks."""
        count = self.cluster.world_size * len(self.replicas.models) if self._all_workers else self.cluster.worker_size
        return start_mean(bucket, self.cluster, count, inside=not self._all_workers)


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
    part in every round, as in double-averaging (Yu et al. 2019). Neighbours exchange z with their weight and the receiver forms
    z_i <- Σ_j P_ij w_j z_j / w_i: nothing is scaled before it is sent, so there is no send buffer; the memory of the spent gradients takes
    the first arrivals. On a graph that is not regular a step and an average take one more temporary of a segment.

    comm_dtype: `bfloat16` or `float16` rounds what workers send each other in a round, weights and exact averages stay as they are: half
    of the bytes, and a temporary of the rows' size. null: the rows' dtype.
    """

    def __init__(self, replicas: Replicas, optimizer: torch.optim.Optimizer, graph: Graph | None = None, gossip_buffers: bool = False,
                 comm_dtype: str | None = None, overlap: bool = False, elementwise: bool | None = None):  # fmt: skip
        super().__init__(replicas, optimizer, overlap, elementwise)
        graph = graph or Exponential(self.cluster.num_workers)
        if graph.size != self.cluster.num_workers:
            m = self.cluster.num_workers
            raise ValueError(f"a graph of {graph.size} workers for a cluster of {m}: build it with the cluster's size")
        if comm_dtype not in (None, "bfloat16", "float16"):
            raise ValueError(f"comm_dtype={comm_dtype!r}: choose bfloat16, float16, or null for the rows' own dtype")
        self.graph, self.gossip_buffers = graph, gossip_buffers
        self.comm_dtype: torch.dtype | None = getattr(torch, comm_dtype) if comm_dtype else None
        rows = replicas.segments[0].x
        self.w = torch.ones(len(rows), 1, dtype=rows.dtype, device=rows.device)
        # weights that are plain numbers: all workers receive what they give, and w is 1 between steps
        self.regular = not any(isinstance(weight, tuple) for step in range(graph.cycle) for weight in graph(step).values())
        self._inboxes: dict[tuple[Segment, str, int], torch.Tensor] = {}
        self._arrivals: dict[Segment, dict[str, Callable[[], list[torch.Tensor]]]] = defaultdict(dict)
        self._weights: Sequence[float | torch.Tensor] = []
        self._next_w = self.w

    def restart(self, segment: Segment, x: torch.Tensor, buffers: str = "maintain", exact: bool = True) -> None:
        super().restart(segment, x, buffers, exact)
        if exact:  # everybody holds the average: nobody owes weight to anybody
            self.w = torch.ones_like(self.w)

    def comm_volume(self, average: str | None = None) -> tuple[float, float]:
        cycle = [len(self.graph(step)) - 1 for step in range(self.graph.cycle)]
        messages = sum(cycle) / len(cycle) * self._gossiped(average)
        size = self.replicas.segments[0].x.element_size()
        return messages, messages * (self.comm_dtype.itemsize / size if self.comm_dtype else 1)

    def recv_buffers(self) -> float:
        return max(0, self._most_arrivals() - 1) + self._rounded()

    def _begin(self) -> None:
        if not self._average:
            self._weights, self._next_w = self._mixing()
        elif self.gossip_buffers and self._average == "maintain":
            self._weights, _ = self._mixing()

    def _update(self, bucket: Bucket) -> None:
        surplus = [] if self.regular else [segment.x * (1 - 1 / self.w) for segment in bucket.segments]
        self._optimizer_step(bucket)
        for segment, part in zip(bucket.segments, surplus):  # (w z - γd) / w, of z - γd
            segment.x.div_(self.w).add_(part)

    def _advance(self, bucket: Bucket) -> None:
        super()._advance(bucket)
        for segment in bucket.segments:
            if not self._average:
                self._arrivals[segment]["z"] = self._send(segment, "z", segment.x)
            if self.gossip_buffers and self._average in (None, "maintain"):
                for name, block in self.inner.blocks(segment).items():
                    self._arrivals[segment][name] = self._send(segment, name, block)

    def _landed(self) -> Iterable[Segment]:
        for segment in self.replicas.segments:
            for name, arrive in self._arrivals.pop(segment, {}).items():
                block = segment.x if name == "z" else self.inner.blocks(segment)[name]
                arrivals = arrive()
                block.mul_(self._weights[0])
                for weight, arrival in zip(self._weights[1:], arrivals):
                    _add(block, weight, arrival)
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

    def _most_arrivals(self) -> int:
        """The most rows that arrive in a step."""
        return max(len(self.graph(step)) - 1 for step in range(self.graph.cycle)) * self._gossiped()

    def _rounded(self) -> float:
        """Rows that rounding takes: of each message what leaves and what arrives."""
        size = self.replicas.segments[0].x.element_size()
        return 2 * self._most_arrivals() * self.comm_dtype.itemsize / size if self.comm_dtype else 0

    def _inbox(self, segment: Segment, name: str, k: int) -> torch.Tensor:
        if k == 0 and name == "z":
            return segment.spent()
        if (segment, name, k) not in self._inboxes:
            self._inboxes[segment, name, k] = torch.empty_like(segment.x, requires_grad=False)
        return self._inboxes[segment, name, k]

    def _send(self, segment: Segment, name: str, block: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
        """Start sending `block` along this step's edges; the result waits and gives the arrivals, rows `[n, d]` for each edge."""
        offsets = [offset for offset in self.graph(self.steps) if offset]
        inboxes = [self._inbox(segment, name, k) for k in range(len(offsets))]
        waits = [self.cluster.shift(block.detach(), *edge, self.comm_dtype) for edge in zip(offsets, inboxes)]
        return lambda: [wait() for wait in waits]

    def _mixing(self) -> tuple[Sequence[float | torch.Tensor], torch.Tensor]:
        """This round's (weights [kept, then one per arrival], new w): x_i <- Σ_j P_ij x_j written for z = x / w."""
        graph = self.graph(self.steps)
        if self.regular:
            numbers = {offset: weight for offset, weight in graph.items() if not isinstance(weight, tuple)}  # that is all of them
            return [numbers.get(0, 0.0), *(weight for offset, weight in numbers.items() if offset)], self.w
        numerators = [self._of_senders(graph.get(0, 0.0), 0) * self.w]
        for offset, weight in graph.items():
            if offset:
                numerators.append(self._of_senders(weight, offset) * self.cluster.shift(self.w, offset, torch.empty_like(self.w))())
        w = sum(numerators, torch.zeros_like(self.w))
        return [numerator / w for numerator in numerators], w

    def _of_senders(self, weight: Weight, offset: int) -> torch.Tensor:
        """What each worker here gets from the worker `offset` before it, `[n, 1]`."""
        m = self.cluster.num_workers
        values = [weight[(i - offset) % m] if isinstance(weight, tuple) else weight for i in self.cluster.local_workers]
        return torch.tensor(values, dtype=self.w.dtype, device=self.w.device).unsqueeze(1)


class OSGP(SGP):
    """Overlap SGP: x <- Px - γd. Sends in `start`, waits in `step`: the message travels during forward and backward.

    The same iterates as the released code, which adds an arrival at the start of the next step; here nothing is in flight between
    steps, so nothing is drained and nothing more is saved. Where an exact average follows, it sends nothing before and steps as SGP.
    """

    def __init__(self, replicas: Replicas, optimizer: torch.optim.Optimizer, graph: Graph | None = None, comm_dtype: str | None = None,
                 overlap: bool = False, elementwise: bool | None = None):  # fmt: skip
        super().__init__(replicas, optimizer, graph, False, comm_dtype, overlap, elementwise)

    def recv_buffers(self) -> float:
        return self._most_arrivals() + self._rounded()  # gradients are formed while messages travel: their memory is not free

    def _begin(self) -> None:
        super()._begin()
        if not self._average:
            for segment in self.replicas.segments:
                self._arrivals[segment]["x"] = self._send(segment, "x", segment.x)

    def drop(self) -> None:
        super().drop()
        for messages in self._arrivals.values():
            for arrive in messages.values():
                arrive()
        self._arrivals.clear()

    def _early(self) -> bool:
        return self._average is not None  # else a bucket waits for its message, which has until `step`

    def _advance(self, bucket: Bucket) -> None:
        if self._average:
            return super()._advance(bucket)
        changes: list[torch.Tensor | None] = []
        w = self._next_w
        for segment in bucket.segments:
            arrivals = self._arrivals.pop(segment)["x"]()
            # rows + change = (Px) / w before γd is taken off; kept in the message, so that it takes no memory of its own
            change = arrivals[0].mul_(self._weights[1]) if arrivals else None if self.regular else torch.zeros_like(segment.x)
            if change is not None:
                for weight, arrival in zip(self._weights[2:], arrivals[1:]):
                    _add(change, weight, arrival)
                _add(change, self._weights[0] - 1 if self.regular else self._weights[0] - 1 / w, segment.x)
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


def _add(block: torch.Tensor, weight: float | torch.Tensor, arrival: torch.Tensor) -> None:
    """block += weight * arrival, without a temporary."""
    block.add_(arrival, alpha=weight) if not isinstance(weight, torch.Tensor) else block.addcmul_(arrival, weight)
