"""SlowMo, Algorithm 1 of Wang, Tantia, Ballas, Rabbat (ICLR 2020), and its siblings. Numbers in comments are the paper's lines.

    u <- β u + (x0 - x) / γ         x0 <- x0 - α γ u           x: the average of the workers, every τ inner steps

An outer wraps a base (base.py) and has its verbs: `start(lr)` before the gradients, `step()` after them. k counts finished inner steps;
a slow step comes after each k that τ divides. x0 is taken at the first start, before the first step. Everything is done segment by
segment: x0 and u are `[1, d]` for each, and a slow step takes one temporary of a segment; with exact=False `[n, d]`, and no temporary.
"""

from collections.abc import Callable

import torch

from slowmo.base import LocalSGD
from slowmo.buckets import Segment
from slowmo.engine import BUFFERS

Kept = dict[Segment, tuple[torch.Tensor, ...]]  # of each segment, one for each of `slow_names`


class Average:
    """Every τ steps all workers restart from their exact average: with LocalSGD this is Local SGD. Holds no state of its own.

    buffers: what happens to the base optimizer's buffers then, reset | maintain | average (`average` is the double averaging of
    Yu et al. 2019). Raises ValueError for τ < 1 or another word.
    """

    slow_names: tuple[str, ...] = ()  # of what it keeps for each segment

    def __init__(self, base: LocalSGD, tau: int, buffers: str = "maintain"):
        if not isinstance(tau, int) or isinstance(tau, bool) or tau < 1:
            raise ValueError(f"tau={tau}: the number of inner steps between slow steps is a whole number >= 1")
        if buffers not in BUFFERS:
            raise ValueError(f"buffers={buffers!r}: choose one of {', '.join(BUFFERS)}")
        self.base, self.tau, self.buffers, self.exact = base, tau, buffers, True
        self.replicas = base.replicas
        self.slow: Kept | None = None

    @property
    def steps(self) -> int:
        return self.base.steps

    @property
    def due(self) -> bool:
        """Whether a slow step comes after the next inner step."""
        return (self.base.steps + 1) % self.tau == 0

    @property
    def fragment(self) -> int | None:
        """Which part of the model the next slow step is for; None: all of it."""
        return None

    def start(self, lr: float | None = None) -> None:
        """An inner step begins. lr: γ, default the learning rates in the optimizer."""
        if self.slow is None or not self.base.steps and not self.base.started and self.replicas.check():
            self.rebase()
        self.base.start(lr, self.buffers if self.exact and self.due else None, self.fragment)

    @torch.no_grad()
    def step(self, before_average: Callable[[], None] | None = None) -> None:
        """The rest of the inner step, and after every τ-th the slow step. before_average: called just before that, line 6."""
        if not self.base.started:
            self.start()
        slow, fragment = self.due, self.fragment
        self.base.step()
        if self.buffers == "reset" and (names := self.base.inner.counted):
            raise RuntimeError(
                f"{type(self.base.optimizer).__name__} counts in its parameter groups ({', '.join(sorted(names))}), which buffers='reset' "
                "would leave as they are, beside states that begin anew: choose buffers='maintain'"
            )
        if slow and before_average:
            before_average()
        for segment in self.replicas.segments if slow else ():
            if fragment in (None, segment.fragment):
                self._slow_step(segment, float(self.base.optimizer.param_groups[segment.group]["lr"]))

    @torch.no_grad()
    def rebase(self) -> None:
        """The weights as they are now are x0, and nothing is remembered of before. A collective."""
        self.base.rebase()
        self.slow = {}

    def _slow_step(self, segment: Segment, lr: float) -> None:
        self.base.restart(segment, self.base.averaged(segment), self.buffers)

    def comm_volume(self) -> tuple[float, float]:
        """What a worker sends per step, on average over a round: (messages, numbers in units of d)."""
        inner, last = self.base.comm_volume(), self.base.comm_volume(self.buffers if self.exact else None)
        m, blocks = self.base.cluster.num_workers, int(self.exact)
        if self.buffers == "average":
            blocks += len(self.base.inner.blocks(self.replicas.segments[0]))
        average = (2 * (m - 1) * blocks, 2 * (m - 1) / m * blocks)
        messages, numbers = (((self.tau - 1) * a + b + c) / self.tau for a, b, c in zip(inner, last, average))
        return messages, numbers


class SlowMo(Average):
    """Algorithm 1. alpha: slow learning rate α > 0. beta: slow momentum 0 <= β < 1.

    exact=False is the paper's noaverage: no line 6, each worker does lines 7 and 8 on its own iterate. A slow step whose learning
    rate is 0 changes nothing, since line 7 divides by it; a subclass whose `_update` does not says divides_by_lr = False.
    Raises ValueError for parameters outside these ranges.
    """

    slow_names = ("x0", "u")
    divides_by_lr = True

    def __init__(self, base: LocalSGD, tau: int, alpha: float = 1.0, beta: float = 0.7, buffers: str = "reset", exact: bool = True):
        super().__init__(base, tau, buffers)
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta}: the slow momentum lies in [0, 1)")
        if not alpha > 0:
            raise ValueError(f"alpha={alpha}: the slow learning rate is positive, 1 in the paper")
        self.alpha, self.beta, self.exact = alpha, beta, exact

    @torch.no_grad()
    def rebase(self) -> None:
        super().rebase()
        x0 = self.base.average() if self.exact else [segment.x.detach().clone() for segment in self.replicas.segments]
        self.slow = {segment: (x, torch.zeros_like(x)) for segment, x in zip(self.replicas.segments, x0)}

    def blank(self) -> Kept:
        """As `rebase`, with zeros: what a loaded state is written into."""
        rows = 1 if self.exact else len(self.replicas.models)
        zeros = lambda segment: torch.zeros(rows, segment.x.shape[1], dtype=segment.x.dtype, device=segment.x.device)
        self.slow = {segment: (zeros(segment), zeros(segment)) for segment in self.replicas.segments}
        return self.slow

    def _slow_step(self, segment: Segment, lr: float) -> None:
        assert self.slow is not None, "start takes x0"
        x0, u = self.slow[segment]
        x = self.base.averaged(segment) if self.exact else segment.x    # 6  exact average, under way since its gradient was there
        if lr == 0 and self.divides_by_lr:
            return
        self._update(x0, u, x, lr)
        self.base.restart(segment, x0, self.buffers, self.exact)        # 2  reset | maintain | average

    def _update(self, x0: torch.Tensor, u: torch.Tensor, x: torch.Tensor, lr: float) -> None:
        if x0.dtype == torch.float16:  # as scalars 1/γ and αγ may leave its range
            u.mul_(self.beta).add_(_less(x0, x).div_(lr))
            x0.sub_(torch.mul(u, self.alpha * lr, out=x))
            return
        u.mul_(self.beta).add_(_less(x0, x), alpha=1 / lr)              # 7  slow momentum
        x0.sub_(u, alpha=self.alpha * lr)                               # 8  outer iterate


class NesterovOuter(SlowMo):
    """DiLoCo's outer step (Douillard et al. 2023), to compare with: Nesterov momentum on x0 - x, not divided by the learning rate."""

    divides_by_lr = False

    def _update(self, x0: torch.Tensor, u: torch.Tensor, x: torch.Tensor, lr: float) -> None:
        delta = _less(x0, x)
        u.mul_(self.beta).add_(delta)
        x0.sub_(delta.add_(u, alpha=self.beta), alpha=self.alpha)


class Streaming(NesterovOuter):
    """Streaming DiLoCo (Douillard et al. 2025, section 3.1): the fragments of the model take their slow steps in turn.

    Each does so every τ steps, evenly spaced, the last one where τ divides k: the same bytes, in as many smaller portions. Over LocalSGD,
    since between averages the workers exchange nothing. How many fragments is said to Replicas, with 1 it is NesterovOuter.
    Raises ValueError over another base, for exact=False and for more fragments than τ.
    """

    def __init__(self, base: LocalSGD, tau: int, alpha: float = 1.0, beta: float = 0.9, buffers: str = "maintain", exact: bool = True):
        super().__init__(base, tau, alpha, beta, buffers, exact)
        if type(base) is not LocalSGD or not exact:
            raise ValueError(f"streaming over {type(base).__name__}, exact={exact}: take base=local_sgd and exact=true")
        if self.replicas.num_fragments > tau:
            raise ValueError(f"{self.replicas.num_fragments} fragments and tau={tau}: each takes a step of its own, so at most τ")

    @property
    def fragment(self) -> int | None:
        count, k = self.replicas.num_fragments, self.base.steps % self.tau + 1
        return next((n for n in range(count) if (n + 1) * self.tau // count == k), None)

    @property
    def due(self) -> bool:
        return self.fragment is not None

    def comm_volume(self) -> tuple[float, float]:
        messages, numbers = super().comm_volume()
        return messages * self.replicas.num_fragments, numbers


def _less(x0: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x0 - x, in the memory of x, which nobody reads again."""
    return torch.sub(x0, x, out=x)


Algorithm = LocalSGD | Average  # what the loop takes: a base, or an outer one over it
