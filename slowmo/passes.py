"""Forward and backward of a rank's replicas in turn: as autograd runs them, compiled, or as CUDA graphs. All give the same gradients.

m replicas with a small batch each launch m times as many kernels as one model with all of it, and on a GPU launching may take longer
than computing. Two remedies, which may be combined:

compile   inductor fuses kernels. It compiles once for all replicas: their models differ only in tensors, which are inputs of what it
          makes. Random numbers are drawn as without it, so that dropout stays the same. All gradients of a compiled backward come
          at its end, and so do the hooks: messages that would have left during backward leave after it.
graph     a CUDA graph for each replica, captured before the first step: forward, backward, and the sums into its gradients and its
          loss. One for each, because a graph's kernels know addresses, and rows stay where they are: one graph for all would copy
          every row in and every gradient out. A graph reads one static batch, which each batch is copied into. Graphs that run after
          each other share the memory of their intermediate results; `graph=k` has k streams, on which k replicas run at a time and
          take k times that memory. No hook fires in a graph: buckets are handed on when all replicas are through.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_flatten, tree_unflatten

from slowmo.replicas import Replicas

Loss = Callable[[torch.nn.Module, Any], torch.Tensor]
WARM_UP = 3  # passes before a capture: libraries choose their algorithms in them


class Eager:
    """One replica's forward and backward by autograd. losses: `[n]`, to which each replica's are added."""

    def __init__(self, replicas: Replicas, loss: Loss, losses: torch.Tensor):
        self.replicas, self.loss, self.losses = replicas, loss, losses

    def __call__(self, row: int, batch: Any) -> None:
        loss = self.loss(self.replicas.models[row], batch)
        (loss if self.replicas.loss_scale == 1 else loss * self.replicas.loss_scale).backward()
        self.losses[row] += loss.detach()

    def finish(self) -> None:
        """All batches of a step are through."""


class Graphs:
    """The same, captured. batch: one that all others have the shapes of; streams: how many replicas run at a time.

    capture: `(call, stream) -> replay`, records what `call()` launches without running it; tests give one that needs no GPU.
    """

    def __init__(self, replicas: Replicas, loss: Loss, losses: torch.Tensor, batch: Any, streams: int,
                 capture: Callable[[Callable[[], None], int], Callable[[], None]] | None = None):  # fmt: skip
        self.replicas, self.loss, self.losses = replicas, loss, losses
        cuda = losses.is_cuda
        self.streams = [torch.cuda.Stream(losses.device) for _ in range(streams)] if cuda else []
        self.pools = [torch.cuda.graph_pool_handle() for _ in range(streams)] if cuda else []
        leaves, self.structure = tree_flatten(batch)
        self.inputs = [[leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves] for _ in range(streams)]
        self.members = []
        for row in range(len(replicas.models)):
            parts = [s.members[row * len(s.places) : (row + 1) * len(s.places)] for s in replicas.segments]
            self.members.append([(p, gradient) for part in parts for p, _, gradient in part])
        capture = capture or self._capture
        self.replays = [capture(functools.partial(self._pass, row), row % streams) for row in range(len(replicas.models))]

    def __call__(self, row: int, batch: Any) -> None:
        """ValueError for a batch of other shapes."""
        k = row % len(self.inputs)
        if self.streams:  # the replica that had this stream's batch before is through
            torch.cuda.current_stream(self.losses.device).wait_stream(self.streams[k])
        leaves, structure = tree_flatten(batch)
        if structure != self.structure or not all(_fits(*pair) for pair in zip(self.inputs[k], leaves)):
            raise ValueError("graph: a batch has other shapes than the one that was captured; choose graph=false")
        for static, leaf in zip(self.inputs[k], leaves):
            if isinstance(static, torch.Tensor):
                static.copy_(leaf, non_blocking=True)
        with self._on(k):
            self.replays[row]()

    def finish(self) -> None:
        for stream in self.streams:
            torch.cuda.current_stream(self.losses.device).wait_stream(stream)
        increment_version([segment.grad for segment in self.replicas.segments])  # a replay writes what autograd does not see
        self.replicas.announce_grads()

    def _pass(self, row: int) -> None:
        batch = tree_unflatten(self.inputs[row % len(self.inputs)], self.structure)
        loss = self.loss(self.replicas.models[row], batch)
        parameters, gradients = zip(*self.members[row])
        scaled = loss if self.replicas.loss_scale == 1 else loss * self.replicas.loss_scale
        found = torch.autograd.grad(scaled, parameters, allow_unused=True)
        with torch.no_grad():
            there = [pair for pair in zip(gradients, found) if pair[1] is not None]
            if there:
                torch._foreach_add_(*map(list, zip(*there)))
            self.losses[row] += loss.detach()

    @contextlib.contextmanager
    def _on(self, k: int) -> Iterator[None]:
        if not self.streams:
            yield
            return
        self.streams[k].wait_stream(torch.cuda.current_stream(self.losses.device))
        with torch.cuda.stream(self.streams[k]):
            yield

    def _capture(self, call: Callable[[], None], k: int) -> Callable[[], None]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.losses.device)
        try:
            # what threads do that read data or watch collectives is none of the graph's business
            with torch.cuda.graph(graph, pool=self.pools[k], stream=self.streams[k], capture_error_mode="thread_local"):
                call()
        except RuntimeError as error:  # ending a capture that failed fails too, which hides the reason and leaves the stream on
            torch.cuda.set_stream(current)
            raise (error.__context__ if isinstance(error.__context__, RuntimeError) else error) from None
        return graph.replay


def prepared(replicas: Replicas, loss: Loss, losses: torch.Tensor, batch: Any = None, compile: bool = False,
             graph: bool | int = False) -> Eager | Graphs:  # fmt: skip
    """What is called with (row, batch) for each batch of a step, and `finish()` after; changes nothing that training sees.

    losses: `[n]`, which each replica's losses are added to in place. batch: one of those to come, for what is compiled or captured.
    graph: false, true, or how many replicas may run at a time. Raises ValueError, with the reason, for what cannot be.
    """
    if graph and not losses.is_cuda:
        raise ValueError("graph captures a GPU's kernels: choose a CUDA device, or graph=false")
    if compile:
        torch.compiler.reset()  # what ran before in this process does not count against torch's limit of compilations
        loss = torch.compile(loss, options={"fallback_random": True})
    if compile or graph:
        what = "graph" if graph else "compile"
        try:
            draws = _warmed_up(replicas, loss, batch, WARM_UP if graph else 1)
            if graph and "cpu" in draws:
                raise ValueError("graph cannot be: the model draws random numbers on the CPU, and a graph would repeat them; choose false")
            if graph and int(graph) > 1 and draws:
                raise ValueError(f"graph={graph} cannot be: replicas at a time would draw each other's random numbers; choose true")
            if graph:
                return Graphs(replicas, loss, losses, batch, int(graph))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
            raise ValueError(f"{what} cannot be: {reason}; choose {what}=false") from error
    return Eager(replicas, loss, losses)


def _warmed_up(replicas: Replicas, loss: Loss, batch: Any, passes: int) -> set[str]:
    """Run the passes on a copy of the first model; of which devices they draw random numbers."""
    probe, device = copy.deepcopy(replicas.models[0]), replicas.segments[0].x.device
    parameters = [p for p in probe.parameters() if p.requires_grad]
    cuda = device.type == "cuda"
    stream = torch.cuda.Stream(device) if cuda else None
    with torch.random.fork_rng(devices=[device] if cuda else []):
        before = _random_states(device)
        if stream:
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            for _ in range(passes):
                torch.autograd.grad(loss(probe, batch), parameters, allow_unused=True)
        if stream:
            torch.cuda.current_stream(device).wait_stream(stream)
        after = _random_states(device)
    return {name for name in before if not torch.equal(before[name], after[name])}


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _fits(static: Any, leaf: Any) -> bool:
    if isinstance(static, torch.Tensor):
        return isinstance(leaf, torch.Tensor) and leaf.shape == static.shape and leaf.dtype == static.dtype
    return static is leaf or not isinstance(leaf, torch.Tensor) and static == leaf
