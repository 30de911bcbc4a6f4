"""The command line around a run: help, sweeps, exit codes, and what was wrong, in one line and last on the screen.

0        done: a result is written; of a sweep all jobs
3        diverged: a result is written, and asking again changes nothing
2        refused: the config or the data are wrong
1        an error that nobody foresaw
128 + n  saved and stopped by signal n, or killed by it; a sweep ends there
"""

import contextlib
import dataclasses
import datetime
import errno
import os
import re
import signal
import sys
import textwrap
import traceback
from pathlib import Path

import hydra
import torch
import torch.distributed as dist
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.runner import config, launch
from experiments.runner.execute import stopped_by
from slowmo.checkpoint import PeerError

CONFIGS = Path(__file__).parents[2] / "configs"
COMMANDS = """\
  python run.py experiment=quickstart_slowmo_local_sgd                              the quickstart: real pictures, minutes on two cores
  python run.py experiment=quickstart_slowmo_local_sgd dry_run=true                 what it would do, send and take
  python run.py experiment=cifar10_small_slowmo_sgp outer=lookahead outer.tau=6     another option of a group, another value of a key
  python run.py -m experiment=cifar10_small_sgp,cifar10_small_slowmo_sgp seed=1,2,3 a sweep of six runs
  python run.py experiment=imagenet_slowmo_sgp launch=slurm_dgx1                    a SLURM job; launch=local: processes on this machine
"""


@dataclasses.dataclass
class Outcome:
    """How a job ended. words: its command; elsewhere: what is to be launched for it."""

    words: list[str]
    status: str = "done"
    code: int = 0
    said: str = ""
    elsewhere: tuple | None = None
    interrupted: int = 0


@dataclasses.dataclass
class Sweep:
    """The sweep under way: the number of its job, and where processes meet."""

    number: int = 0
    store: dist.Store | None = None


job = Outcome([])  # the one under way
_sweep: Sweep | None = None


def leading() -> bool:
    """Whether this process speaks for all."""
    return int(os.environ.get("RANK", 0)) == 0


def say(text: str) -> None:
    if leading():
        print(text, flush=True)


def ended(code: int) -> None:
    """This job has run here, and its run ended with this exit code."""
    job.code, job.status = code, {0: "done", 3: "diverged"}.get(code, "failed")


def later(cfg, command: launch.Command) -> None:
    """This job is to be launched elsewhere."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise ValueError(f"launch={cfg.launch.name}: a sweeper plugin of Hydra's runs its jobs itself, choose launch=inprocess")
    job.elsewhere = (cfg, command)


@contextlib.contextmanager
def refusing():
    """What is wrong with a job ends it with one line. What all processes find one of them says; an OSError may be a machine's own."""
    try:
        yield
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        job.status, job.code, job.said = "refused", 2, reason(error)
        own = isinstance(error, OSError) and not isinstance(error, HydraException) or dist.is_initialized()
        if leading() or own and not isinstance(error, PeerError):
            print(f"error: {job.said}", file=sys.stderr, flush=True)
    if stopped_by[0]:
        job.status, job.code, job.interrupted = "stopped", 128 + stopped_by[0], stopped_by[0]


def enter(main) -> None:
    """Run the command of sys.argv, a sweep job by job, and leave the process with its exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on, and they are told here
    global job
    words = sys.argv[1:]
    job = Outcome(words)
    if not words or {"-h", "--help"} & set(words):
        say(overview())
        leave(0)
    with refusing():
        jobs = expand(words)
    if job.code:
        leave(job.code)
    if jobs is None:
        done = _run(main, words)
        leave(max(done.code, _submit([done])))
    leave(sweep(main, jobs))


def sweep(main, jobs: list[list[str]]) -> int:
    """Each job after the one before, whatever became of that; those of SLURM together at the end. The largest exit code."""
    global _sweep
    done, _sweep = [], Sweep()
    for k, words in enumerate(jobs):
        _sweep.number = k
        done.append(_run(main, words))
        if done[-1].interrupted:
            done += [Outcome(rest, "not started") for rest in jobs[k + 1 :]]
            for one in done:
                if one.elsewhere and one.elsewhere[0].launch.name == "slurm":
                    one.status, one.elsewhere = "not started", None
            break
    code = max(_submit(done), *(one.code for one in done))
    say(table(done))
    return code


def table(done: list[Outcome]) -> str:
    """What became of the jobs of a sweep: a line each, of its words those in which jobs differ."""
    same = set.intersection(*(set(one.words) for one in done)) if len(done) > 1 else set()
    names = [" ".join(word for word in one.words if word not in same) for one in done]
    width = max(map(len, names))
    counts = {status: sum(one.status == status for one in done) for status in dict.fromkeys(one.status for one in done)}
    lines = [f"  {one.status:12}{name:{width}}  {one.said}".rstrip() for one, name in zip(done, names)]
    return "\n".join([f"{len(done)} jobs: {', '.join(f'{count} {status}' for status, count in counts.items())}", *lines])


def _run(main, words: list[str]) -> Outcome:
    """One job through Hydra, on this machine to its end."""
    global job
    job, sys.argv[1:], stopped_by[0] = Outcome(words), words, 0
    try:
        with refusing():
            try:
                main()
            except SystemExit as end:  # Hydra's own commands: --cfg, --info
                job.code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if job.elsewhere and job.elsewhere[0].launch.name == "local":
                cfg, command = job.elsewhere
                job.code, job.interrupted = launch.local(cfg, command.words)
                kinds = {0: "done", 2: "refused", 3: "diverged", 128 + job.interrupted: "stopped"}
                job.status = kinds.get(job.code, "failed")
    except KeyboardInterrupt:
        job.status, job.code, job.interrupted = "stopped", 128 + signal.SIGINT, signal.SIGINT
    except Exception as error:
        traceback.print_exc()
        job.status, job.code, job.said = "failed", 1, f"{type(error).__name__}: {_first(error)}"
    finally:
        if _sweep and dist.is_initialized():  # left behind by an error: the next job's processes must be able to meet
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
    return job


def _submit(done: list[Outcome]) -> int:
    """Hand SLURM what is for it: jobs that ask for the same things as one array."""
    global job
    arrays: dict[str, list[Outcome]] = {}
    for one in done:
        if one.elsewhere and one.elsewhere[0].launch.name == "slurm":
            cfg = one.elsewhere[0]
            arrays.setdefault(OmegaConf.to_yaml(cfg.launch, resolve=True) + cfg.runs, []).append(one)
    worst = 0
    for ones in arrays.values():
        job, cfg = Outcome([]), ones[0].elsewhere[0]
        with refusing():
            job.status = "submitted"
            job.code = launch.submit(cfg.launch, cfg.runs, [one.elsewhere[1] for one in ones])
        for one in ones:
            one.status, one.said = job.status, job.said
        worst = max(worst, job.code)
    return worst


def expand(words: list[str]) -> list[list[str]] | None:
    """The commands of a sweep's jobs, as Hydra's own sweeper makes them out; None where it is no sweep, or one of a sweeper plugin's."""
    args = get_args_parser().parse_intermixed_args(words)
    many = args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    if (args.cfg or args.info) and many:
        raise ValueError("--cfg and --info show one run's config: leave -m out, and the values of a sweep")
    if not many or any(word.lstrip("+").startswith(("hydra/sweeper", "hydra/launcher")) for word in args.overrides):
        return None
    flags = [f"--{name.replace('_', '-')}={value}" for name in ("config_path", "config_name", "config_dir")
             if (value := getattr(args, name)) is not None]  # fmt: skip
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):  # for glob(*)
        parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(args.overrides)
        swept = [override for override in parsed if not override.is_hydra_override()]
        (jobs,) = BasicSweeper.split_arguments(swept, None)
    own = [one.input_line for one in parsed if one.is_hydra_override() and not one.input_line.lstrip("+").startswith("hydra.mode=")]
    if any("hydra.sweeper.params" in word for word in own):
        raise ValueError("hydra.sweeper.params is not read: write the sweep as words, -m seed=1,2,3")
    return [[*flags, *own, *words] for words in jobs]


def meet(cfg) -> None:
    """In a sweep on several processes: they meet anew for each job, under its own prefix of one store.

    torchrun's agent keeps such a store; where there is none, process 0 does, until it ends. Without this a later job would find the
    addresses of an earlier one there. ConnectionError where they do not meet.
    """
    if _sweep is None or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    rank, count, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), datetime.timedelta(seconds=cfg.cluster.timeout)
    try:
        if _sweep.store is None:
            master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            _sweep.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=master,
                                         timeout=timeout, wait_for_workers=False)  # fmt: skip
        cuda = cfg.cluster.device.startswith("cuda")
        if cuda:
            torch.cuda.set_device(cfg.cluster.device)
        store = dist.PrefixStore(f"job {_sweep.number}", _sweep.store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=count, timeout=timeout)
    except (dist.DistError, RuntimeError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(f"process {rank} of {count} did not meet the others at {where}: {_first(error)}") from error


def leave(code: int) -> None:
    """End with this exit code. Of several processes at once: gloo's threads now and then abort a regular exit (PyTorch issue 190489)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def reason(error: BaseException) -> str:
    """What is wrong, in one line that ends in what to do."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_option(error.missing_cfg_file.split("/"), error.options or [])
    if isinstance(error, OverrideParseException):
        home = "your home folder is $HOME, " * ("=~" in error.override)
        return f"cannot read {error.override!r} ({_first(error)}): {home}write key=value, quote special characters: \"key='a b'\""
    if found := re.match(r"Could not (?:override|delete|append to config).*?'(.+?)'", str(error)):
        known = _known()
        if found[1] not in known:
            more = ", or write +" + found[1] if found[1].startswith("optimizer.") else ""  # what its class takes besides
            return f"unknown key {found[1]}{config.meant(found[1], known)}{more}"
        why = f" ({_first(error.__cause__)})" if error.__cause__ else ""
        return f"{found[1]} does not fit the options that are chosen{why}: leave it out, or choose another option"
    if found := re.match(r"Ambiguous value for argument '(.+?)'", str(error)):
        key = found[1].partition("=")[0]
        return f"{found[1]}: several values are a sweep, python run.py -m ...; a list is written {key}=[a,b]"
    if str(error).startswith("Config group override must"):
        groups = [word for word in job.words if (CONFIGS / word.partition("=")[0]).is_dir()]
        return f"an option of a group is given by its name, as base=sgp, and none as outer=none: see {' '.join(groups)}"
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key + ': ' if error.full_key else ''}{_first(error)}"
    if isinstance(error, HydraException):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if isinstance(error.__cause__, OmegaConfBaseException):
            lines[1:] = [f"({_first(error.__cause__)})"]
        return " ".join(lines[:2])
    if isinstance(error, OSError) and error.filename and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room there" if full else "data.root and runs are folders that can be written"
        return f"{error.filename}: {error.strerror}; {remedy}"
    return " ".join(str(error).split("\n")) or type(error).__name__


def _no_option(path: list[str], options: list[str]) -> str:
    depth = 0
    while depth < len(path) - 1 and path[depth] != ".." and CONFIGS.joinpath(*path[: depth + 1]).is_dir():
        depth += 1
    group, option = "/".join(path[:depth]), "/".join(path[depth:])
    close = config.meant(option, options)
    if now := _renamed(group, option):
        return f"no {group}={option}: since version 0.2 it is {group}={now}"
    if group == "experiment":
        return f"no experiment={option}{close or ': python run.py --help lists what there is'}"
    if not options:
        return f"no config {'/'.join(filter(None, (group, option)))}"
    return f"no {group}={option}: choose one of {', '.join(options)}" + close.replace(": ", "; ", 1)


def _renamed(group: str, option: str) -> str | None:
    """What version 0.1 called `option`, by its present name."""
    if group != "experiment":
        return {("launch", "here"): "inprocess", ("schedule", "paper"): "cifar10", ("data", "scripts"): "glyphs"}.get((group, option))
    for old, new in (("photos_", "cifar10_small_"), ("scripts_", "imagenet_small_"), ("ende_", "wmt16_small_")):
        if option.startswith(old):
            return new + option.removeprefix(old)
    return None


def _known() -> list[str]:
    """Every key and group there is by default and in any group's option."""
    found = {"experiment"}
    for path in CONFIGS.rglob("*.yaml"):
        group = path.relative_to(CONFIGS).parent
        if group.parts[:1] in (("experiment",), ("benchmark",)) or path.name == "table2.yaml":
            continue
        prefix = ".".join((*group.parts, ""))
        found |= {str(group), *(f"{prefix}{key}" for key in config.flat(OmegaConf.load(path)))}
    return sorted(found - {"."})


def _first(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")


def overview() -> str:
    """The commands to begin with and the experiments, by task and data."""
    lines = ["SlowMo: m workers take tau steps of a base algorithm, then their average takes a step of slow momentum.", "", COMMANDS,
             "experiment= one of these, by task and data:", ""]  # fmt: skip
    shapes = CONFIGS / "experiment/shape"
    shape_of = lambda name: max((path.stem for path in shapes.glob("*.yaml") if name.startswith(f"{path.stem}_")), key=len)
    for path in sorted(shapes.glob("*.yaml"), key=lambda path: (path.stem != "quickstart", _task(path))):
        names = " ".join(sorted(one.stem for one in path.parents[1].glob("*.yaml") if shape_of(one.stem) == path.stem))
        about = path.read_text().splitlines()[1].removeprefix("# ").partition(". ")[0].rstrip(".")
        lines += [f"{'{}, {}'.format(*_task(path))}: {about}", *textwrap.wrap(names, 110, initial_indent="  ", subsequent_indent="  "), ""]
    groups = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name not in ("experiment", "benchmark"))
    lines += [f"{group + '=':12}{', '.join(sorted(path.stem for path in (CONFIGS / group).glob('*.yaml')))}" for group in groups]
    lines += [
        "",
        "docs/configuration.md has the keys. A run's folder is a function of its command: runs/<experiment>[,key=value...]/seed<seed>",
    ]
    return "\n".join(lines)


def _task(shape: Path) -> tuple[str, str]:
    """The task and the data of a shape, its own or those of the one it builds on."""
    found = {}
    for entry in OmegaConf.load(shape).defaults:
        if isinstance(entry, str):
            return _task(shape.with_stem(entry))
        for name, option in entry.items():
            found[name.removeprefix("override /")] = option
    return found["task"], found["data"]
