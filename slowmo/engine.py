"""What all base algorithms share: their verbs, and the inner step bucket by bucket.

The contract, over segments `[n, d]` (buckets.py):

    start(lr, average, fragment)  before the gradients; average: what an exact average that follows this step does to buffers, or None;
                                  fragment: of which segments alone, with LocalSGD
    step()                        after them: x <- the next iterate, gradients zeroed
    averaged(segment)             -> [1, d], the exact average over all m workers, under way since the segment was stepped
    restart(segment, x, buffers)  continue from x; the optimizer's buffers: reset | maintain | average

In between each bucket advances once: `_advance` steps it and sends it. That happens in `step` (late), or with overlap=True as soon as
backward has written its last gradient, so that messages travel while backward still runs; the iterates are the same bits.
"""

import abc
from collections.abc import Callable, Iterable
from typing import Literal

import torch

from slowmo.buckets import Bucket, Handover, Segment, start_mean
from slowmo.cluster import Pending
from slowmo.inner import inner_optimizer
from slowmo.replicas import Replicas

BUFFERS = ("reset", "maintain", "average")


class Engine(abc.ABC):
    """The verbs of a base algorithm; base.py has the algorithms, which change the methods at the end.

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
        self._average: str | None  # as `start` was told
        self._fragment: int | None
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
        self.handover.finish(self.inner.whole)
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

    def _begin(self) -> None:  # noqa: B027
        """Before the gradients."""

    @abc.abstractmethod
    def _advance(self, bucket: Bucket) -> None:
        """Step a bucket whose gradients are final, and send it."""

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

    def _start_averages(self, bucket: Bucket) -> None:
        """Line 6, where an exact average follows this step."""
        alone = self.cluster.num_workers == self.cluster.world_size == 1
        for segment in bucket.segments if self._average else ():
            if self._fragment in (None, segment.fragment):  # a worker alone is its own average: no copy
                self._averages[segment] = segment.x.detach if alone else self._start_average(segment)

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
