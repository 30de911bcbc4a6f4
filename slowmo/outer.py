"""SlowMo, Algorithm 1 of Wang, Tantia, Ballas, Rabbat (ICLR 2020), and its siblings. Numbers in comments are the paper's lines.

    u <- β u + (x0 - x) / γ         x0 <- x0 - α γ u           x: the average of the workers, every τ inner steps

An outer wraps a base (base.py) and has its verbs: `start()` before the gradients, `step(lr)` after them. k counts finished inner steps;
a slow step comes after each k that τ divides. x0 is taken when the outer is built, before the first step. Memory: x0 and u, `[1, d]`
each, and two temporaries `[1, d]` at a slow step; with exact=False these are `[n, d]`.
"""

import torch

from slowmo.base import BUFFERS


class Average:
    """Every τ steps all workers restart from their exact average: with LocalSGD this is Local SGD. Holds no state of its own.

    buffers: what happens to the base optimizer's buffers then, reset | maintain | average (`average` is the double averaging of
    Yu et al. 2019). Raises ValueError for τ < 1 or another word.
    """

    def __init__(self, base, tau: int, buffers: str = "maintain"):
        if not isinstance(tau, int) or tau < 1:
            raise ValueError(f"tau={tau}: the number of inner steps between slow steps is a whole number >= 1")
        if buffers not in BUFFERS:
            raise ValueError(f"buffers={buffers!r}: choose one of {', '.join(BUFFERS)}")
        self.base, self.tau, self.buffers, self.exact = base, tau, buffers, True
        self.replicas, self.cluster, self.rows, self.u = base.replicas, base.cluster, base.rows, None

    @property
    def steps(self) -> int:
        return self.base.steps

    def start(self) -> None:
        self.base.start()

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        """One inner step; after every τ-th, the slow step. lr: γ, default the learning rate in the optimizer."""
        self.base.step(lr)
        if self.steps % self.tau == 0:
            self._slow_step(float(self.base.optimizer.param_groups[0]["lr"]))

    def _slow_step(self, lr: float) -> None:
        self.base.restart(self.base.average(), self.buffers)

    def average(self) -> torch.Tensor:
        """The exact mean of the workers as they stand, `[1, d]`; changes nothing."""
        return self.base.average()

    def state(self) -> tuple[dict, dict]:
        """As the base's, with x0 and u: what a run needs to go on."""
        return self.base.state()

    def load(self, rows: dict, shared: dict) -> None:
        self.base.load(rows, shared)

    def sends(self) -> tuple[float, float]:
        """As the base's, with the averages of the slow steps."""
        messages, lengths = self.base.sends()
        m, blocks = self.cluster.size, int(self.exact)
        if self.buffers == "average":
            blocks += len(self.base.optimizer_rows())
        return messages + 2 * (m - 1) * blocks / self.tau, lengths + 2 * (m - 1) / m * blocks / self.tau


class SlowMo(Average):
    """Algorithm 1. alpha: slow learning rate α > 0. beta: slow momentum 0 <= β < 1.

    exact=False is the paper's noaverage: no line 6, each worker does lines 7 and 8 on its own iterate. A slow step whose learning
    rate is 0 changes nothing (line 7 divides by it). Raises ValueError for parameters outside these ranges.
    """

    def __init__(self, base, tau: int, alpha: float = 1.0, beta: float = 0.7, buffers: str = "reset", exact: bool = True):
        super().__init__(base, tau, buffers)
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta}: the slow momentum lies in [0, 1)")
        if not alpha > 0:
            raise ValueError(f"alpha={alpha}: the slow learning rate is positive, 1 in the paper")
        self.alpha, self.beta, self.exact = alpha, beta, exact
        self.x0 = self._iterate().clone()
        self.u = torch.zeros_like(self.x0)

    def _slow_step(self, lr):
        if lr == 0:
            return
        x = self._iterate()                                     # 6  exact average
        self.u.mul_(self.beta).add_(self.x0 - x, alpha=1 / lr)  # 7  slow momentum
        self.x0.sub_(self.u, alpha=self.alpha * lr)             # 8  outer iterate
        self._restart()                                         # 2  reset | maintain | average

    def _iterate(self) -> torch.Tensor:
        return self.base.average() if self.exact else self.rows.detach()

    def _restart(self) -> None:
        self.base.restart(self.x0, self.buffers, self.exact)

    def state(self):
        rows, shared = super().state()
        (shared if self.exact else rows).update(x0=self.x0, u=self.u)
        return rows, shared

    def load(self, rows, shared):
        super().load(rows, shared)
        saved = shared if self.exact else rows
        self.x0.copy_(saved["x0"])
        self.u.copy_(saved["u"])


class NesterovOuter(SlowMo):
    """DiLoCo's outer step (Douillard et al. 2023), to compare with: Nesterov momentum on x0 - x, not divided by the learning rate."""

    def _slow_step(self, lr):
        x = self._iterate()
        delta = self.x0 - x
        self.u.mul_(self.beta).add_(delta)
        self.x0.sub_(delta.add_(self.u, alpha=self.beta), alpha=self.alpha)
        self._restart()
