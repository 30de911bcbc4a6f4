"""Learning-rate schedules: step (counted from 0) -> γ. `lr` is the peak."""

import bisect
import itertools


class Constant:
    """γ = lr at every step."""

    def __init__(self, lr: float, steps: int):
        self.lr = lr

    def __call__(self, step: int) -> float:
        return self.lr


class Step:
    """Step decay with linear warm-up (Goyal et al. 2017).

    warmup, milestones: in parts of the run, which has `of` parts in all (the paper's 200 epochs: warm-up 5, milestones 100, 150, 175,
    of 200), so that a shorter run keeps the shape; `of` null counts in steps. factor: at each milestone. warmup_from: the share of
    the peak at which the warm-up starts. ValueError for times out of order or past the end.
    """

    def __init__(self, lr: float, steps: int, warmup: float, milestones: list[float], of: float | None = None,
                 factor: float = 0.1, warmup_from: float = 0.0):  # fmt: skip
        whole = of or steps
        if not 0 <= factor <= 1 or not 0 <= warmup_from <= 1:
            raise ValueError(f"schedule: factor={factor} and warmup_from={warmup_from} lie in [0, 1]")
        times = [0, warmup, *milestones, whole]
        if not all(earlier <= later for earlier, later in itertools.pairwise(times)):
            raise ValueError(f"schedule: warmup={warmup} and milestones={list(milestones)} must come in this order within 0 to {whole}")
        self.lr, self.factor, self.warmup_from = lr, factor, warmup_from
        self.warmup = round(warmup * steps / whole)
        self.milestones = [round(t * steps / whole) for t in milestones]

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.lr * (self.warmup_from + (1 - self.warmup_from) * (step + 1) / self.warmup)
        return self.lr * self.factor ** bisect.bisect_right(self.milestones, step)


class InverseSqrt:
    """Linear warm-up from `start` to the peak in `warmup` steps, then proportional to 1 / sqrt(step) (Vaswani et al. 2017; fairseq)."""

    def __init__(self, lr: float, steps: int, warmup: int, start: float = 0.0):
        if warmup < 1:
            raise ValueError(f"schedule.warmup={warmup}: the inverse square root needs at least one warm-up step")
        self.lr, self.warmup, self.start = lr, warmup, start

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.start + (self.lr - self.start) * (step + 1) / self.warmup
        return self.lr * (self.warmup / (step + 1)) ** 0.5
