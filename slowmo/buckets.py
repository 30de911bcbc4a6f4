"""How a row is cut: buckets, the unit of arrival and of sending, made of segments, the unit of the optimizer and of messages.

A bucket is neighbouring parameters, from the end of the model (the order in which backward reaches them). A segment is a bucket's part
in one parameter group of the optimizer and one fragment of the model (there is one fragment, but for outer.Streaming): one contiguous
Parameter `[n, d]`, whose rows belong to the n workers of this rank. Model parameters and their gradients are views into segments.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.autograd.graph import increment_version

from slowmo.cluster import Cluster, Pending

if TYPE_CHECKING:
    from slowmo.replicas import Replicas

Named = list[tuple[str, torch.nn.Parameter]]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model's parameter lies in its segment's row: `numel` elements from `offset`, with `shape` and `stride`."""

    name: str
    index: int  # among the trained parameters of the model, in its order
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def of(self, block: torch.Tensor, row: int) -> torch.Tensor:
        """The view of this parameter in `row` of a tensor laid out as the segment's, `[n, d]` or `[1, d]`."""
        return block.as_strided(self.shape, self.stride, block.storage_offset() + row * block.stride(0) + self.offset)

    def stacked(self, block: torch.Tensor) -> torch.Tensor:
        """The views of all rows as one tensor `[n, *shape]`."""
        return block.as_strided((len(block), *self.shape), (block.stride(0), *self.stride), block.storage_offset() + self.offset)


class Segment:
    """x: Parameter `[n, d]`; grad: tensor `[n, d]`; group, fragment: the number of each; places: of its parameters.

    members: (parameter, its view of x, its view of grad), all parameters of the first worker, then of the second, and so on.
    d is a multiple of 64 bytes and parameters start at multiples of 32, the rest is zeros: an element then meets the same vector
    instruction under every layout, so that gossip gives the same bits; and cuDNN treats parameters as it does those of any model.
    """

    def __init__(self, group: int, fragment: int, places: list[Place], rows: int, dtype: torch.dtype, device: torch.device):
        last = places[-1]
        d = _rounded(last.offset + last.shape.numel(), 64 // dtype.itemsize)
        self.group, self.fragment, self.places = group, fragment, places
        self.x = torch.nn.Parameter(torch.zeros(rows, d, dtype=dtype, device=device))
        self.grad = torch.zeros_like(self.x, requires_grad=False)
        self.members: list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]] = []
        self._memory: list[tuple[int, torch.dtype]] = []
        self._homes: list[int] = []  # addresses of the gradients
        self._shown: set[int] = set()  # numbers of the members of another dtype whose .grad is a copy of the mean
        self._clean, self._taken = self.grad._version, False
        self.arrived = False  # that a gradient has come since they were zeroed is known from a hook or from who put it there

    def adopt(self, row: int, parameters: list[torch.nn.Parameter]) -> None:
        """Make these parameters, of one worker's model, views of `row`. Those of another dtype stay as they are: see `written`."""
        for place, p in zip(self.places, parameters, strict=True):
            x, g = place.of(self.x.detach(), row), place.of(self.grad, row)
            if not x.is_meta:  # the same memory in a storage of its own: saving a model then writes its own bytes only
                x = torch.from_dlpack(x)
            x.copy_(p.detach())
            if p.dtype == x.dtype:
                p.data, p.grad = x, g
            else:
                p.grad = None
            self.members.append((p, x, g))
            self._memory.append((p.data_ptr(), p.dtype))
            self._homes.append(g.data_ptr())

    def in_place(self) -> bool:
        """Whether the first worker's parameters are still what they were made: not moved, cast or given other memory."""
        return all((p.data_ptr(), p.dtype) == memory for (p, _, _), memory in zip(self.members[: len(self.places)], self._memory))

    def take_writes(self) -> None:
        """Where parameters of another dtype were written from outside, the row follows them."""
        for p, x, _ in self.members:
            if p.dtype != x.dtype:  # element by element: those that nobody wrote keep their digits
                x.copy_(torch.where(p.detach() == x.to(p.dtype), x, p.detach().to(x.dtype)))

    def gather_grads(self) -> None:
        """Bring home gradients that are not views: those of another dtype, and those that the user replaced or took away."""
        written, found = self.has_gradient, False
        for k, (p, x, g) in enumerate(self.members):
            shown = k in self._shown
            if p.grad is g and g.data_ptr() != self._homes[k] and p.dtype == x.dtype:  # by p.grad.data = ...
                row, place = divmod(k, len(self.places))
                home = self.places[place].of(self.grad, row)
                self.members[k] = p, x, home
                found = self.arrived = True
                home.copy_(g)
                p.grad = g = home
            elif p.grad is g or shown and p.grad is not None and torch.equal(p.grad, g.to(p.dtype)):  # as it was shown
                found |= written
            elif p.grad is None:
                if written and (p.dtype == g.dtype or shown):
                    g.zero_()
                else:
                    found |= written and p.dtype != g.dtype
            elif p.grad.layout != torch.strided:
                raise ValueError("a gradient is sparse: build the layer with sparse=False, rows are dense")
            else:
                found = self.arrived = True
                g.copy_(p.grad) if p.dtype == g.dtype or shown else g.add_(p.grad)
            if p.grad is not g:
                p.grad = g if p.dtype == g.dtype else None
        self._shown.clear()
        if not found:
            self._clean = self.grad._version

    def show_grads(self) -> None:
        """Parameters of another dtype hold their gradients too, for whoever reads or clips them, until `gather_grads`."""
        for k, (p, x, g) in enumerate(self.members):
            if p.dtype != x.dtype:
                p.grad = g.to(p.dtype)
                self._shown.add(k)

    @property
    def has_gradient(self) -> bool:
        """Whether anything was written to the gradients since they were zeroed: a view's write counts for its block."""
        return self.grad._version != self._clean

    def notice_grads(self) -> None:
        """Before a step: gradients that were written behind torch's back, p.grad.data.copy_(...) or p.grad.numpy()[:] = ..., count."""
        if not self.has_gradient and not self.grad.is_meta and bool(self.grad.any()):
            increment_version([self.grad])

    @property
    def reached(self) -> bool:
        """Whether a gradient has come: a clip writes to zeros, too."""
        return self.has_gradient and (self.arrived or bool(self.grad.any()))

    def take_grads(self) -> None:
        """From here to `zero_grads` nobody sees the gradients: their memory is the inbox of a message."""
        self._taken = True
        for p, _, _ in self.members:
            p.grad = None

    def spent(self) -> torch.Tensor:
        """The gradients' memory, for something else until `zero_grads`."""
        self._clean = -1
        return self.grad

    def zero_grads(self) -> None:
        """Zeros, and each parameter's gradient its view again."""
        if self.has_gradient:
            self.grad.zero_()
        if self._taken:
            for p, x, g in self.members:
                p.grad = g if p.dtype == x.dtype else None
        self._clean, self._taken, self.arrived = self.grad._version, False, False

    def used(self, block: torch.Tensor) -> list[torch.Tensor]:
        """What parameters take of a block, `[n or 1, numel]` each: between them an optimizer without ε divides 0 by 0."""
        return [block[:, place.offset : place.offset + place.shape.numel()] for place in self.places]

    def written(self) -> None:
        """x has changed: a stale graph shall raise as it does in torch, and copies of another dtype follow."""
        increment_version([p for p, _, _ in self.members])
        for p, x, _ in self.members:
            if p.dtype != x.dtype:
                p.data.copy_(x)


@dataclasses.dataclass
class Bucket:
    index: int
    segments: list[Segment]


def cut(parameters: Named, kinds: list[tuple[int, int]], rows: int, dtype: torch.dtype, bucket_cap_mb: float) -> list[Bucket]:
    """Buckets for `parameters`, a list of (name, parameter); kinds: of each the numbers of its parameter group and fragment.

    bucket_cap_mb: MiB per row, as DDP's. The first bucket is a 25th of it, so that the wire is busy early, and each is at most twice the
    one before, so that it stays busy where sending takes longer than computing. The last ones halve, down to an eighth of it, because no
    computation hides the last.
    """
    full = bucket_cap_mb * 2**20 / dtype.itemsize
    left = sum(p.numel() for _, p in parameters)
    pieces: list[list[int]] = [[]]
    limit, size = full / 25, 0
    for index in reversed(range(len(parameters))):
        pieces[-1].append(index)
        size += parameters[index][1].numel()
        left -= parameters[index][1].numel()
        if size >= limit and left:
            limit, size = min(2 * size, full, max(left, full / 4) / 2), 0
            pieces.append([])
    return [Bucket(number, _segments(parameters, kinds, piece, rows, dtype)) for number, piece in enumerate(pieces)]


def fragments(parameters: Named, count: int) -> list[int]:
    """Of each parameter the number of its fragment: `count` runs of neighbours from the model's start, as even as parameters allow."""
    sizes = [p.numel() for _, p in parameters]
    before = itertools.accumulate(sizes, initial=0)
    return [count * (start + size // 2) // sum(sizes) for start, size in zip(before, sizes)]


def _segments(parameters: Named, kinds: list[tuple[int, int]], piece: list[int], rows: int, dtype: torch.dtype) -> list[Segment]:
    segments = []
    for group, fragment in sorted({kinds[index] for index in piece}):
        offset, places = 0, []
        for index in piece:
            if kinds[index] == (group, fragment):
                name, p = parameters[index]
                stride = p.stride() if is_dense(p) else torch.empty(p.shape, device="meta").stride()
                places.append(Place(name, index, offset, p.shape, stride))
                offset = _rounded(offset + p.numel(), 32 // dtype.itemsize)
        segments.append(Segment(group, fragment, places, rows, dtype, parameters[piece[0]][1].device))
    return segments


def is_dense(p: torch.Tensor) -> bool:
    """Whether p's elements fill one stretch of memory without holes or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(p.stride(), p.shape) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def start_mean(bucket: Bucket, cluster: Cluster, count: int, inside: bool) -> Pending:
    """Start the mean of a bucket's gradients over `count` rows, of all ranks or of those `inside` a worker; every row then holds it."""
    parts, waits = [], []
    for segment in bucket.segments:
        part = segment.grad[0] if len(segment.grad) == 1 else segment.grad.sum(0)
        part.div_(count)  # now, while backward still runs
        segment.arrived = True  # on some rank perhaps: all do the same
        parts.append(part)
        waits.append(cluster.all_reduce(part, inside=inside, wait=False))

    def wait() -> None:
        for finish in waits:
            finish()
        for segment, part in zip(bucket.segments, parts):
            if len(segment.grad) > 1:
                segment.grad.copy_(part)
        parts.clear()

    return Pending(wait, lambda: all(finish.is_completed() for finish in waits))


class Handover:
    """Hands buckets on, each once per step and all ranks in the same order: while backward runs, or what is left in `finish`.

    reduce: `bucket -> wait`, starts the mean of its gradients, or None where none is needed. advance: called with a bucket whose gradients
    are final. overlap: during backward. behind: how many buckets `advance` stays behind `reduce` during backward: 1 where what it sends
    must wait for the mean before; math.inf where `advance` may wait for `finish`.
    """

    def __init__(self, replicas: "Replicas", reduce: Callable[[Bucket], Pending] | None = None, hooks: bool = False):
        self.replicas, self.buckets, self.reduce = replicas, replicas.buckets, reduce
        self.starter: Callable[[], None] | None = None  # called where gradients arrive for a step that nobody has started
        if hooks:
            replicas.register_grad_hook(self._arrived)
        self.advance: Callable[[Bucket], None]  # from `enable` on, as the next ones
        self.overlap: bool
        self.behind: float
        self.missing: list[int]
        self.passes: int  # backward passes of this step that have ended
        self.graphs: set[int]  # those that have begun, by torch's number
        self.enabled, self.paused, self.touched, self.first_unsent, self.first_waiting = False, False, False, 0, 0
        self.again = False  # whether gradients are counted from the start when the next one comes
        self.waits: list[Pending] = []

    def enable(self, advance: Callable[[Bucket], None], overlap: bool, behind: float = 0) -> None:
        """A step begins."""
        self.advance, self.overlap, self.behind, self.enabled = advance, overlap, behind, True
        self.rearm()

    def rearm(self) -> None:
        """Gradients are counted from the start. RuntimeError where backward has begun the step: it cannot be undone."""
        if self.half_done:
            raise RuntimeError("backward has begun a step that was not finished: call step() after each, or choose overlap=False")
        self.settle()
        self.first_unsent, self.waits, self.touched, self.passes, self.graphs, self.again = 0, [], False, 0, set(), False
        copies = len(self.replicas.models) * self.replicas.accumulate
        self.missing = [copies * sum(len(s.places) for s in bucket.segments) for bucket in self.buckets]

    def finish(self, whole: Bucket | None = None) -> None:
        """Hand on everything that is left. whole: of all segments, for an optimizer that steps them at once; without overlap."""
        self._send_all()
        if self.reduce and not self.overlap:
            self.settle()
            for segment in self.replicas.segments:
                segment.gather_grads()  # what was done to the means
        if whole:
            self.enabled = False  # an optimizer that raises leaves a step that begins anew
            self.advance(whole)
            self.first_waiting = len(self.buckets)
        while self.first_waiting < len(self.buckets):
            self._advance()
        self.enabled, self.touched, self.first_waiting, self.first_unsent = False, False, 0, 0

    def drop(self) -> None:
        """The step is not taken. RuntimeError where backward has begun to."""
        self.rearm()
        self.enabled = False

    def settle(self) -> None:
        """Wait for the means that are under way, so that gradients are what they will be."""
        for wait in self.waits[self.first_waiting :]:
            wait()

    @property
    def half_done(self) -> bool:
        """Whether a bucket of this step has advanced, or may have: all ranks must see the same."""
        return self.first_waiting > 0 or self.overlap and self.first_unsent > 0

    @torch.no_grad()
    def _arrived(self, index: int, during_backward: bool = True) -> None:
        if not self.enabled and self.starter:
            self.starter()
        if self.again:
            self.rearm()
        if not self.enabled or self.paused or not (self.overlap or self.reduce):
            return
        if index < self.first_unsent:
            raise RuntimeError(
                "a gradient arrived for a bucket that has gone: more backward passes than declared, or a layer shared by reentrant "
                "checkpoints. Say accumulate=k for k passes per step, put all but the last under no_sync(), or call step() after each"
            )
        self.touched = True
        self.missing[index] -= 1
        while self.first_unsent < len(self.buckets) and self.missing[self.first_unsent] <= 0:
            self._send()
        graph = torch._C._current_graph_task_id()
        if during_backward and self.reduce and not self.overlap and graph not in self.graphs:
            self.graphs.add(graph)
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    @torch.no_grad()
    def _backward_ended(self) -> None:
        """Whoever reads gradients after the last backward of a step sees the mean, as with DDP: of parameters that got none, too."""
        if (node := torch._C._current_autograd_node()) is not None:
            return self._when_outer_ends(node)
        self.passes += 1
        if self.passes == len(self.replicas.models) * self.replicas.accumulate:
            self._send_all()
        if self.first_unsent == len(self.buckets):
            self.settle()
            for segment in self.replicas.segments:
                segment.show_grads()

    def _when_outer_ends(self, node: torch.autograd.graph.Node) -> None:
        """A backward has ended inside `node` of another, as a reentrant checkpoint's does: look again when that one ends. It may form no
        gradient of a parameter itself."""

        def outside(*_: object) -> None:
            handle.remove()
            graph = torch._C._current_graph_task_id()
            if self.enabled and graph not in self.graphs:
                self.graphs.add(graph)
                torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

        handle = node.register_hook(outside)

    def _send_all(self) -> None:
        while self.first_unsent < len(self.buckets):
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[self.first_unsent]
        for segment in bucket.segments:
            segment.notice_grads()
            segment.gather_grads()
        self.waits.append(self.reduce(bucket) if self.reduce else Pending())
        self.first_unsent += 1
        while self.overlap and self.first_waiting < self.first_unsent - self.behind:
            self._advance()
        # what waits for the end anyway may use the time before it: it sends nothing, so ranks need not agree on when
        while self.overlap and self.behind == math.inf and self._mean_is_there():
            self._advance()

    def _mean_is_there(self) -> bool:
        return self.first_waiting < self.first_unsent and self.waits[self.first_waiting].is_completed()

    def _advance(self) -> None:
        self.waits[self.first_waiting]()
        bucket = self.buckets[self.first_waiting]
        self.first_waiting += 1
        self.advance(bucket)


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
