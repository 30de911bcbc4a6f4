"""Half precision for tasks that offer it: the network computes in it, rows and losses stay as they are."""

import contextlib

import torch

from experiments.tasks import Task


class HalfPrecision(Task):
    """A task whose `device` is known; `compute_in` is called once, and forward passes run under `precision()`."""

    def compute_in(self, autocast: str | None, loss_scale: float) -> None:
        """autocast: bfloat16, float16 (losses times `loss_scale`) or None. ValueError for another word."""
        if autocast not in (None, "bfloat16", "float16"):
            raise ValueError(f"task.autocast={autocast}: choose bfloat16, float16 or null")
        self.autocast = getattr(torch, autocast) if autocast else None
        self.loss_scale = loss_scale if autocast == "float16" else 1.0

    def precision(self):
        return torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
