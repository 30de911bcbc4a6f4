"""The command line for tests: `python run.py ...` and what torchrun starts, in children forked after torch is imported.

A child runs run.py itself as `__main__`, in a folder of the test's, and leaves by os._exit: a run costs tenths of a second.
"""

import contextlib
import copy
import dataclasses
import gc
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import hydra
import numpy as np
import torch
import yaml
from omegaconf import OmegaConf

import run  # noqa: F401  the imports of every child, done once
from experiments.data import photos  # noqa: F401
from experiments.runner import build, config, plan, run_dir
from experiments.tasks import cifar10, imagenet, quadratic  # noqa: F401
from slowmo.train import TrainingMeter

with contextlib.suppress(FileNotFoundError):  # the extra is not installed
    from experiments.tasks import wmt16  # noqa: F401

ROOT = Path(__file__).parents[2]


def _remembered(parse):
    """yaml.load, but each text is parsed once: Hydra reads a hundred files for a command, five times each."""
    seen = {}

    def load(stream, Loader):
        text = stream if isinstance(stream, str) else stream.read()
        key = text, Loader.__name__
        if key not in seen:
            seen[key] = parse(text, Loader=Loader)
        return copy.deepcopy(seen[key])

    return load


yaml.load = _remembered(yaml.load)
# what torch and Hydra import, and their parsers learn, when first used: a second in every child otherwise
torch.optim.SGD([torch.zeros(1, requires_grad=True)])
torch.zeros_like(torch.nn.Parameter(torch.empty(1, device="meta")))
with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
    OmegaConf.to_yaml(hydra.compose("config", ["experiment=quickstart_slowmo_local_sgd", "steps=1", "optimizer.lr=0.1"]), resolve=True)


@dataclasses.dataclass
class Done:
    """How a command ended. codes: one a process, negative for a signal that killed it; code: the first's."""

    codes: list[int]
    out: str
    err: str

    @property
    def code(self) -> int:
        return self.codes[0]

    @property
    def text(self) -> str:
        return self.out + self.err

    def fact(self, name: str) -> str:
        """A line of the plan that `dry_run=true` prints."""
        return re.search(rf"^{re.escape(name)}  +(.*)$", self.out, re.MULTILINE)[1]


class Command:
    """A command under way in `cwd`, its runs in `cwd`/runs. before: called in each child with its rank, say to set a trap."""

    def __init__(self, *overrides: str, cwd, processes: int = 1, before=None, environment=None):
        self.logs = Path(tempfile.mkdtemp(dir=cwd, prefix="log-"))
        launcher = {} if processes == 1 else {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self.pids, self.codes = [], {}
        for rank in range(processes):
            ranks = {"RANK": rank, "LOCAL_RANK": rank} if launcher else {}
            pid = os.fork()
            if not pid:
                self._child(rank, overrides, cwd, before, launcher | ranks | (environment or {}))
            self.pids.append(pid)

    def poll(self) -> bool:
        """Whether all processes have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, timeout: float = 100.0) -> Done:
        end = time.monotonic() + timeout
        while not self.poll():
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"no end after {timeout} s: {self._text('out')}{self._text('err')}")
            time.sleep(0.005)
        return Done([self.codes[pid] for pid in self.pids], self._text("out"), self._text("err"))

    def signal(self, number: int, rank: int = 0) -> None:
        os.kill(self.pids[rank], number)

    def kill(self) -> None:
        for pid in self.pids:
            if pid not in self.codes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _text(self, name: str) -> str:
        return "".join((self.logs / f"{rank}.{name}").read_text() for rank in range(len(self.pids)))

    def _child(self, rank, overrides, cwd, before, environment):
        code = 1
        gc.disable()  # a collection would touch, and so copy, all of torch's objects
        os.fsync = lambda file: None  # milliseconds each; a killed process loses nothing that the kernel has
        try:
            for name, target in (("out", 1), ("err", 2)):
                file = os.open(self.logs / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT, 0o600)
                os.dup2(file, target)
            sys.stdout, sys.stderr = (open(target, "w", closefd=False) for target in (1, 2))
            os.environ.update({name: str(value) for name, value in environment.items()})
            os.chdir(cwd)
            sys.argv = [str(ROOT / "run.py"), *overrides]
            if before:
                before(rank)
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # gloo's threads now and then abort a regular exit; and pytest's own ends are not for a child


def command(*overrides: str, cwd, timeout: float = 100.0, **options) -> Done:
    """Run a command to its end."""
    started = Command(*overrides, cwd=cwd, **options)
    try:
        return started.wait(timeout)
    finally:
        started.kill()


def forked(folder):
    """subprocess.run, but `python run.py ...` runs in a child as above, with its logs in `folder`."""
    real = subprocess.run

    def start(words, **options):
        if "run.py" not in words:
            return real(words, **options)
        done = command(*words[words.index("run.py") + 1 :], cwd=folder)
        return subprocess.CompletedProcess(words, done.code, done.out, done.err)

    return start


def planned(*words: str) -> tuple[dict, config.Composed, Done]:
    """(the plan, its composed config, what `dry_run=true` prints of it) in this folder, without a process."""
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = config.compose(list(words))
        config.check(composed)
        composed.cfg.cluster.device = "cpu"
        task = build.build(composed.cfg.task)
        summary = plan.make(composed, task)[0]
        return summary, composed, Done([0], plan.show(summary, run_dir.run_dir(composed, task)), "")


def finished(*overrides: str, cwd, **options) -> Path:
    """Run a command that must end well; its run's folder."""
    done = command(*overrides, cwd=cwd, **options)
    assert done.codes == [0] * len(done.codes), done.text
    return Path(cwd) / re.search(r"^(?:\w+: )?(\S+)/result\.json|, see (\S+)/result\.json", done.out, re.MULTILINE)[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def at_call(place, name: str, count: int, act, after: bool = False):
    """Replace `place.name` so that its `count`-th call comes with `act()`, before it or after it."""
    real, calls = getattr(place, name), [0]

    def trap(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count and not after:
            act()
        result = real(*args, **kwargs)
        if calls[0] == count and after:
            act()
        return result

    setattr(place, name, trap)


def signal_at_step(step: int, number: int, only: int | None = None):
    """A `before` for Command: each process (`only`: that rank) sends itself a signal as its step-th step begins."""

    def before(rank):
        if only in (None, rank):
            at_call(TrainingMeter, "start", step, lambda: os.kill(os.getpid(), number))

    return before


def problem(path, c, a=None) -> Path:
    """Problem G of the golden numbers as a file: worker i minimises a_i (x - c_i)^2 / 2, all start at 1."""
    np.savez(path, A=np.array(a or [1.0] * len(c))[:, None, None], b=np.array(c, dtype=float)[:, None], x0=np.ones(1))
    return path


def arrays(folder) -> dict[str, np.ndarray]:
    with np.load(Path(folder) / "final.npz") as archive:
        return dict(archive)
