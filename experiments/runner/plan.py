"""What a run is going to do, and whether it makes sense, found out before any work starts."""

import difflib
import math
import os

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.runner import launch, loggers
from slowmo.cluster import Cluster, fold
from slowmo.outer import SlowMo
from slowmo.replicas import Replicas
from slowmo.train import BATCHNORM


def check(cfg: DictConfig) -> None:
    """ValueError, with the remedy, for unknown keys and values that no run can have."""
    bare = hydra.compose("config", overrides=[*(f"{group}={choice}" for group, choice in choices().items()), loggers.chosen(cfg)])
    known = flat(bare)
    for key, value in flat(cfg).items():
        if key.startswith("launch.sbatch."):  # whatever this cluster knows
            continue
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            raise ValueError(f"unknown key {key}" + (f": did you mean {close[0]}?" if close else ""))
        _like(key, value, known[key])
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        raise ValueError(f"no value for {', '.join(sorted(missing))}: give it on the command line")
    for name in ("workers", "checkpoint_every"):
        _whole(name, cfg[name])
    _whole("evaluate.every", cfg.evaluate.every)
    _whole("seed", cfg.seed, 0)
    _whole("evaluate.keep", cfg.evaluate.keep, 0)
    for name in ("evaluate.worker_samples", "cluster.threads"):
        if OmegaConf.select(cfg, name) is not None:
            _whole(name, OmegaConf.select(cfg, name))
    loggers.check(cfg)
    if (cfg.steps is None) == (cfg.epochs is None):
        raise ValueError("how long? give one of steps=K (inner steps) and epochs=E (passes over the training set), the other null")
    if cfg.dtype not in ("float32", "float64"):
        raise ValueError(f"dtype={cfg.dtype}: rows are float32 or float64")
    if cfg.evaluate.batchnorm not in BATCHNORM:
        raise ValueError(f"evaluate.batchnorm={cfg.evaluate.batchnorm}: choose one of {', '.join(BATCHNORM)}")
    if not 0 < cfg.optimizer.lr < math.inf:
        raise ValueError(f"optimizer.lr={cfg.optimizer.lr}: a learning rate is a positive number")
    fold(cfg.workers, launch.processes(cfg))
    meets = cfg.outer.get("_target_") is not None and cfg.outer.get("exact", True)
    if cfg.base._target_ == "slowmo.base.LocalSGD" and not meets and cfg.workers > 1:
        raise ValueError("Local SGD that never averages: choose outer=average or outer=slowmo with outer.exact=true, or another base")


def choices() -> dict[str, str]:
    """The chosen option of each config group, the experiment's choices included, without the experiment itself."""
    picked = HydraConfig.get().runtime.choices
    return {group: name for group, name in picked.items() if not group.startswith("hydra/") and group != "experiment" and name}


def flat(cfg: DictConfig) -> dict:
    """Dotted keys and unresolved values; lists are values."""
    out = {}

    def walk(node, prefix):
        for key, value in node.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{key}.")
            else:
                out[f"{prefix}{key}"] = value

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return out


def device(name: str) -> str:
    """`auto` is this process's GPU when there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("cluster.device=cuda, but torch sees no GPU: install a CUDA build of torch or set cluster.device=cpu")
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"{here} processes for {gpus} GPUs on this machine: start at most {gpus} here, or set cluster.device=cpu")
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    if name != "cpu":
        raise ValueError(f"cluster.device={name}: choose auto, cpu or cuda")
    return name


def build(node: DictConfig, *args, **kwargs):
    """Instantiate `node`, partial or not, with these arguments. What is wrong with them comes out as ValueError or FileNotFoundError."""
    try:
        built = instantiate(node)
        return built(*args, **kwargs) if node.get("_partial_") else built
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (ValueError, FileNotFoundError)):
            raise cause from None
        raise ValueError(f"{node._target_}: {cause or error}") from None
    except torch.cuda.OutOfMemoryError:
        raise
    except (TypeError, IndexError, KeyError, OverflowError, RuntimeError) as error:  # a partial's, called here
        raise ValueError(f"{node._target_}: {error}") from None


def steps(cfg: DictConfig, task) -> int:
    """Inner steps of the run."""
    if cfg.steps is not None:
        _whole("steps", cfg.steps)
        return cfg.steps
    if not (isinstance(cfg.epochs, (int, float)) and 0 < cfg.epochs < math.inf):
        raise ValueError(f"epochs={cfg.epochs}: a positive number of passes over the training set")
    return max(1, round(cfg.epochs * task.steps_per_epoch))


def rehearse(cfg: DictConfig, task, schedule, steps: int) -> dict:
    """Build the real algorithm over rows that take no memory, and read the plan off it. ValueError where they do not fit together."""
    processes = launch.processes(cfg)
    rows, node = fold(cfg.workers, processes)
    parameters = sum(p.numel() for p in task.model().parameters() if p.requires_grad)
    model = torch.nn.Module()
    model.x = torch.nn.Parameter(torch.empty(parameters, device="meta", dtype=getattr(torch, cfg.dtype)))
    replicas = Replicas(model, _Rehearsal(cfg.workers, rows))
    tiny = torch.nn.Parameter(torch.zeros(1, 1, dtype=getattr(torch, cfg.dtype)))
    tiny.grad = torch.ones_like(tiny)
    probe = build(cfg.optimizer, [tiny])
    probe.step()
    # not fused: some versions of torch refuse fused kernels for rows that take no memory
    optimizer = build(OmegaConf.merge(cfg.optimizer, {"fused": False} if "fused" in cfg.optimizer else {}), [replicas.rows])
    names = [name for name, value in probe.state[tiny].items() if isinstance(value, torch.Tensor) and value.shape == tiny.shape]
    algorithm = build(cfg.base, replicas, optimizer)
    if cfg.outer.get("_target_"):
        algorithm = build(cfg.outer, algorithm)
    optimizer.state[replicas.rows] = {name: torch.empty_like(replicas.rows) for name in names}
    tau = getattr(algorithm, "tau", None)
    slow = range(tau - 1, steps, tau) if tau else range(0)
    for step in slow if type(algorithm) is SlowMo else ():
        if schedule(step) == 0:
            raise ValueError(f"the learning rate is 0 at slow step {step + 1}, and line 7 divides by it: end the schedule above 0")
    messages, lengths = algorithm.sends()
    size, d = replicas.rows.element_size(), replicas.rows.shape[1]
    inboxes = getattr(algorithm, "base", algorithm).inboxes()
    globals_ = 0 if algorithm.u is None else 2 * len(algorithm.u)
    where = f"{rows} a process" if node == 1 else f"a worker is {node} processes"
    experiment = HydraConfig.get().runtime.choices.get("experiment")
    return {
        "title": f"m = {cfg.workers}, processes = {processes} ({where}), steps = {steps}, slow steps = {len(slow)}, seed = {cfg.seed}",
        "experiment": experiment or "-",
        "iterations": steps,
        "slow steps": len(slow),
        "parameters": parameters,
        "messages a worker sends an iteration": messages,
        "bytes a worker sends an iteration": lengths * d * size,
        "memory of rows, gradients, optimizer, messages (bytes a process)": round(
            d * size * (rows * (2 + len(names) + inboxes) + globals_)
        ),
        "learning rate first, largest, last": " ".join(
            f"{lr:.4g}" for lr in (schedule(0), max(schedule(s) for s in range(steps)), schedule(steps - 1))
        ),
        "cell": cfg.promise.cell or "none of the paper's",
        "paper": cfg.promise.paper or "-",
        "cost": cfg.promise.cost or "-",
        **({"node-hours at most, each time": cfg.launch.nodes * cfg.launch.minutes / 60} if cfg.launch.name == "slurm" else {}),
    }


def show(summary: dict, path) -> str:
    """The plan as text, a line a fact."""
    texts = {name: f"{value:,.10g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
             for name, value in (summary | {"folder": path}).items()}  # fmt: skip
    return "\n".join(f"{name:66}{text}" for name, text in texts.items())


class _Rehearsal(Cluster):
    """The rows of one process of a cluster that does not exist."""

    def __init__(self, size: int, rows: int):
        self.size, self.ranks, self.node, self.lane, self.process, self.processes = size, range(rows), 1, 0, 0, 1
        self.device, self.leader, self._started_here = torch.device("meta"), True, False


def _like(key: str, value, default) -> None:
    """ValueError where a number, truth value or list stands by default and something else is given."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    interpolated = isinstance(value, str) and value.startswith("${")
    if value is None and default is None or interpolated:
        return
    if isinstance(default, str) and (default == "???" or default.startswith("${")):
        return
    for kind, fits, like in (
        (bool, isinstance(value, bool), "true or false"),
        (int, number and isinstance(value, int), f"a whole number, like {default}"),
        (float, number, f"a number, like {default}"),
        (list, isinstance(value, list), f"a list, like {default}"),
        (str, isinstance(value, str), "a word"),
    ):
        if isinstance(default, kind):
            if not fits:
                raise ValueError(f"{key}={value}: give {like}")
            for part in value if isinstance(value, list) and default else ():
                _like(key, part, default[0])
            return


def _whole(name: str, value, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value}: a whole number >= {least}")
