"""A run shows itself, in 80 columns: a live bar on a terminal, plain lines elsewhere; and both kinds in log.txt. Process 0 only."""

import datetime
import io
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from experiments import files


class Progress:
    """steps: of the whole run; log: a file to append to. A line at every evaluation, and where there is no bar every `pause` seconds."""

    def __init__(self, steps: int, is_main: bool, log: Path | None = None, pause: float = 30.0):
        self.steps, self.is_main, self.pause = steps, is_main, pause
        self.live = is_main and sys.stdout.isatty()
        self.bar = self.log = None
        if self.live:
            columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Bar(*columns, TimeRemainingColumn(), console=Console(), refresh_per_second=4)
            self.task = self.bar.add_task("", total=steps, text="")
        if is_main and log:
            try:
                self.log = io.TextIOWrapper(files.open_file(log, "ab"), encoding="utf-8", line_buffering=True)
            except OSError as error:
                self.say(f"no log: {error}")  # a run is worth more
        self.shown, self.first, self.loss, self.headed = 0.0, None, 0.0, False

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()

    def step(self, step: int, lr: float, meter) -> None:
        """Shown at most four times per second, so that a GPU is not made to wait for its loss; the last step always."""
        if not self.is_main:
            return
        now = time.monotonic()
        if self.first is None:
            self.first, self.shown = (step, meter.seconds), now
        if now - self.shown < (0.25 if self.live else self.pause) and not (self.live and step == self.steps):
            return
        self.shown = now
        meter.synchronize()  # reading a loss waits for a GPU; that is training time
        if meter.count:
            self.loss = float(meter.losses.sum()) / meter.count / len(meter.losses)
        rate = (step - self.first[0]) / max(meter.seconds - self.first[1], 1e-9)
        text = f"loss {self.loss:.4f}  {rate:.3g} it/s"
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        else:
            _print(f"step {step}/{self.steps}  {text}  lr {lr:.4g}  {_clock((self.steps - step) / max(rate, 1e-9))} left")

    def row(self, row: dict) -> None:
        """A metric row: five short columns."""
        fourth = ("accuracy", ".2f") if "accuracy" in row else ("consensus_distance", ".3g")
        columns = (("train_loss", ".4f"), ("validation_loss", ".4f"), fourth)
        if not self.headed:
            titles = ("train loss", "val. loss", fourth[0].removeprefix("consensus_"), "time")
            self.say(f"{'step':>15}" + "".join(f"{title:>12}" for title in titles))
            self.headed = True
        numbers = "".join(f"{_number(row.get(name), form):>12}" for name, form in columns)
        self.say(f"{row['step']}/{self.steps}".rjust(15) + numbers + f"{_clock(row['seconds']):>12}")

    def say(self, text: str) -> None:
        """On the screen and in the log."""
        if self.bar:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.is_main:
            _print(text)
        self.write(text)

    def write(self, text: str) -> None:
        """In the log alone."""
        if self.log:
            try:
                self.log.write(f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n")
            except OSError:  # a full disk: what matters writes too, and says so
                self.log = None


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever read along has gone: the run is worth more, and log.txt has the words
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _number(value: float | None, form: str) -> str:
    """Wide numbers in fewer digits."""
    text = "-" if value is None else format(value, form)
    return text if len(text) <= 12 else format(value, ".3g")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
