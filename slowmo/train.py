"""The loop. It decides nothing: the caller evaluates, saves, prints and stops between two steps.

A task gives `model()`, `batches(step, workers, part)`, `loss(model, batch)` and `evaluate(model, part)`; experiments/tasks/__init__.py
has the contract.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol

import torch

from slowmo.outer import Algorithm
from slowmo.passes import Eager, Graphs, prepared
from slowmo.replicas import Replicas
from slowmo.vectorize import VmapReplicas, vectorized


class Task(Protocol):
    """What training and evaluation ask of a task."""

    def batches(self, step: int, workers: range, part: tuple[int, int], /) -> Iterable[Any]: ...

    def loss(self, model: torch.nn.Module, batch: Any, /) -> torch.Tensor: ...

    def evaluate(self, model: torch.nn.Module, part: tuple[int, int], /) -> dict[str, Any]: ...


class TrainingMeter:
    """What the loop counts: seconds of training alone, and each worker's losses since the last metric row.

    losses: `[n]`, float64. Both survive in checkpoints, so clocks and training losses go on where they were.
    """

    def __init__(self, rows: int, device: torch.device):
        self.seconds, self.count, self.device = 0.0, 0, device
        self.started: float  # of the clock, from `start` on
        self.losses = torch.zeros(rows, dtype=torch.float64, device=device)
        self.first_bad = torch.zeros((), dtype=torch.int64, device=device)  # the first step with a loss that is not finite; 0: none

    def start(self) -> None:
        """Training goes on now."""
        self.started = time.perf_counter()

    def stop(self) -> None:
        """Training pauses."""
        self.seconds += time.perf_counter() - self.started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training; what a GPU still has to do is."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        begun = time.perf_counter()
        yield
        self.started += time.perf_counter() - begun

    def synchronize(self) -> None:
        """Wait for a GPU's pending work and count it as training; called before anything that is not training."""
        if self.device.type == "cuda":
            self.start()
            torch.cuda.synchronize(self.device)
            self.stop()

    def watch(self, step: int) -> None:
        """Remember the first step after which a loss is not finite. A GPU is not waited for."""
        bad = ~torch.isfinite(self.losses).all() & (self.first_bad == 0)
        self.first_bad += bad * step

    def diverged(self) -> bool:
        """Whether a loss since the last metric row was NaN or infinite, on this rank. Waits for a GPU."""
        self.synchronize()
        return not bool(torch.isfinite(self.losses).all())


def train(task: Task, replicas: Replicas, algorithm: Algorithm, schedule: Callable[[int], float], steps: int, seed: int,
          meter: TrainingMeter, vectorize: str | bool = "auto", before_average: Callable[[int], object] | None = None,
          compile: bool = False, graph: bool | int = False) -> Iterator[int]:  # fmt: skip
    """Yields the number of finished steps after each, from where `algorithm` stands to `steps`.

    schedule: step (from 0) -> γ. A worker's batch may come in micro-batches that go through its model one after another. The random
    numbers that a model draws (dropout) depend on (seed, step, worker, micro-batch) alone, whichever rank of a worker has it. vectorize:
    see vectorize.py. before_average: called with the number of finished inner steps just before each slow step; its time is not training.
    compile, graph: see passes.py; ValueError together with vectorize=True.
    """
    cluster = replicas.cluster
    at_once: VmapReplicas | Literal[False] | None = None
    passes: Eager | Graphs
    if vectorize is True and (compile or graph):
        raise ValueError("vectorize=true computes all replicas at once, compile and graph one after another: choose one of them")
    for step in range(algorithm.steps, steps):
        next_batches = functools.partial(task.batches, step, cluster.local_workers, (cluster.worker_rank, cluster.worker_size))
        if at_once is None:  # trying it out is not training
            mode = vectorize if len(replicas.models) > 1 and not (compile or graph) else False
            first = next(iter(next_batches())) if mode or compile or graph else None
            at_once = vectorized(replicas, task.loss, first, mode) or False
            passes = prepared(replicas, task.loss, meter.losses, first, compile, graph)
        meter.start()
        algorithm.start(schedule(step))
        batches = next_batches()
        if at_once:
            meter.losses += at_once(task.loss, list(batches))
            batches = ()
        for i, batch in enumerate(batches):
            row, k = divmod(i, replicas.accumulate)
            micro_batch = cluster.worker_rank + k * cluster.worker_size
            torch.manual_seed((((seed * 1_000_003 + step) * 65_537 + cluster.local_workers[row]) * 1_009 + micro_batch) % 2**63)
            passes(row, batch)
        if not at_once:
            passes.finish()
        meter.count += 1
        meter.watch(step + 1)
        if algorithm.due and before_average:
            algorithm.step(functools.partial(_pause, meter, before_average, step + 1))
        else:
            algorithm.step()
        meter.stop()
        yield step + 1


def _pause(meter: TrainingMeter, call: Callable[[int], object], step: int) -> None:
    with meter.paused():
        call(step)
