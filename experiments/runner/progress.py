"""A run shows itself: a live bar on a terminal, plain lines elsewhere. Process 0 only."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """steps: of the whole run. A line at every evaluation, and in a log file one every `pause` seconds besides."""

    def __init__(self, steps: int, is_main: bool, pause: float = 30.0):
        self.steps, self.is_main, self.pause = steps, is_main, pause
        self.live = is_main and sys.stdout.isatty()
        self.bar = None
        if self.live:
            columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Bar(*columns, TimeRemainingColumn(), console=Console(), refresh_per_second=4)
            self.task = self.bar.add_task("", total=steps, text="")
        self.accuracy, self.shown, self.first, self.loss = "", 0.0, None, 0.0

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def step(self, step: int, lr: float, meter) -> None:
        """Shown at most four times a second, so that a GPU is not made to wait for its loss."""
        if not self.is_main:
            return
        now = time.monotonic()
        if self.first is None:
            self.first, self.shown = (step, meter.seconds), now
            return
        if now - self.shown < (0.25 if self.live else self.pause):
            return
        self.shown = now
        meter.synchronize()  # reading a loss waits for a GPU; that is training time
        if meter.count:
            self.loss = float(meter.losses.sum()) / meter.count / len(meter.losses)
        rate = (step - self.first[0]) / max(meter.seconds - self.first[1], 1e-9)
        text = f"loss {self.loss:.4f}  lr {lr:.4g}  {rate:.2f} it/s{self.accuracy}"
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        else:
            print(f"step {step}/{self.steps}  {text}  {(self.steps - step) / max(rate, 1e-9):.0f} s left", flush=True)

    def row(self, row: dict) -> None:
        """A line for a metric row."""
        if "accuracy" in row:
            self.accuracy = f"  accuracy {row['accuracy']:.2f}"
        names = ("epoch", "train_loss", "validation_loss", "accuracy", "accuracy_min", "accuracy_max", "spread", "u_norm", "seconds")
        self.say(f"step {row['step']}/{self.steps}  " + "  ".join(f"{name} {row[name]:.5g}" for name in names if row.get(name) is not None))

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, highlight=False)
        elif self.is_main:
            print(text, flush=True)
