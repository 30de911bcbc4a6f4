"""From words to a config: how files and the command line come together, and what no run can have, refused with its remedy."""

import copy
import dataclasses
import difflib
import inspect
import math
import re
from collections import defaultdict
from typing import ClassVar

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import _locate
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.runner import launch, loggers
from slowmo.cluster import layout
from slowmo.evaluate import BATCHNORM
from slowmo.vectorize import MODES

NUMBER = (int, float)


@dataclasses.dataclass
class Composed:
    """A config and where it comes from. choices: {group: option}, the experiment's own included, the experiment itself left out.

    dropped: what an experiment says about options that were replaced, an entry a group: outer.beta=0.4 (outer=lookahead, not slowmo).
    """

    cfg: DictConfig
    choices: dict[str, str]
    experiment: str | None
    dropped: list[str]


def compose(words: list[str]) -> Composed:
    """The config of these words. HydraException, OmegaConfBaseException or ValueError for words that make none.

    What Hydra composes, with one rule more: what an experiment file says about a group (outer: {beta: 0.4}) goes with the option that the
    file itself has there (outer=slowmo). Where another one is chosen, its own defaults stand. Within @hydra.main the words and folders
    that only Hydra reads (hydra.searchpath, --config-dir) count too.
    """
    running = HydraConfig.get() if HydraConfig.initialized() else None
    name = running.job.config_name if running else "config"
    to_hydra = re.compile(r"[+~]*hydra[./]").match
    own = [*(launch.typed("hydra") if running else []), *filter(to_hydra, words)]
    words = [word for word in words if not to_hydra(word)]
    loader = _Loader(GlobalHydra.instance().config_loader().get_search_path(), name, own, words)
    cfg = loader.load_configuration(name, loader.words + words, RunMode.RUN)
    picked = cfg.hydra.runtime.choices
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    OmegaConf.set_struct(cfg, True)
    typed = {word.lstrip("+~").partition("=")[0] for word in words}
    lost = [key for key in loader.dropped if key.partition("=")[0] not in typed and not key.startswith("launch.")]
    by_group = defaultdict(list)
    for key in lost:
        by_group[loader.dropped[key]].append(key)
    dropped = [f"{', '.join(keys)} ({group})" for group, keys in by_group.items()]
    return Composed(cfg, _groups(picked), picked.get("experiment"), dropped)


class _Loader(ConfigLoaderImpl):
    """Hydra's, but for an experiment's values about options that have been replaced."""

    _seen: ClassVar[dict] = {}  # the options that these files and words choose: tens of milliseconds each

    def __init__(self, search_path, name: str, hydra_words: list[str], words: list[str]):
        super().__init__(search_path)
        self.name, self.words, self.task_words = name, hydra_words, words
        self.dropped = {}  # {key=value: the option that stands, and the file's}

    def _choices(self, words: list[str]) -> dict[str, str]:
        key = str(self.config_search_path), self.name, *self.words, *words
        if key not in self._seen:
            self._seen[key] = dict(self.compute_defaults_list(self.name, self.words + words, RunMode.RUN).overrides.known_choices)
        return self._seen[key]

    def _load_single_config(self, default, repo):
        result = super()._load_single_config(default, repo)
        if not default.config_path.startswith("experiment/") or default.package:
            return result
        group, _, option = default.config_path.rpartition("/")
        own, final = self._choices([f"{'+' * (group != 'experiment')}{group}={option}"]), self._choices(self.task_words)
        result = copy.copy(result)
        result.config = copy.deepcopy(result.config)
        for group, before in _groups(own).items():
            now = final.get(group)
            *parents, last = group.split("/")
            parent = OmegaConf.select(result.config, ".".join(parents)) if parents else result.config
            if before == now or not OmegaConf.is_dict(parent) or last not in parent:
                continue
            node = parent.pop(last)
            for key, value in flat(node).items() if OmegaConf.is_dict(node) else [("", node)]:
                self.dropped[f"{group.replace('/', '.')}.{key}".rstrip(".") + f"={value}"] = f"{group}={now}, not {before}"
        return result


def _groups(picked) -> dict[str, str]:
    return {group: name for group, name in picked.items() if not group.startswith("hydra/") and group != "experiment" and name}


def choices() -> dict[str, str]:
    """The chosen option of each config group, the experiment's choices included, without the experiment itself."""
    return _groups(HydraConfig.get().runtime.choices)


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


def check(composed: Composed) -> None:
    """ValueError, with the remedy, for unknown keys and values that no run can have."""
    cfg = composed.cfg
    known = flat(compose([*(f"{group}={choice}" for group, choice in composed.choices.items()), loggers.chosen(cfg)]).cfg)
    parameters = _parameters(cfg)
    values = flat(cfg)
    for key in values:
        if key.startswith("launch.sbatch."):  # whatever this cluster knows
            continue
        if key not in known and key not in parameters:
            raise ValueError(f"unknown key {key}{meant(key, [*known, *parameters])}")
        value = _resolved(cfg, key, values[key])
        if isinstance(value, str) and re.match(r"~\w*(/|$)", value):
            raise ValueError(f"{key}={value}: no shell has put a folder in place of ~, write {key}=$HOME{value[1:]}")
        if key == "optimizer.lr" and isinstance(value, NUMBER) and not 0 < value < math.inf:
            raise ValueError(f"optimizer.lr={value}: a learning rate is a positive number")
        if key not in ("cluster.vectorize", "cluster.graph"):  # a truth value or something else
            _like(key, value, known.get(key, parameters.get(key)))
    for key in known:
        if key not in values and not key.startswith("launch.sbatch"):
            raise ValueError(f"no value for {key}: it was deleted, leave it as it is")
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        raise ValueError(f"no value for {', '.join(sorted(missing))}: give it on the command line")
    for key in ("launch.name", "data.name"):
        if values[key] != known[key]:
            raise ValueError(f"{key}={values[key]}: choose {key.removesuffix('.name')}={values[key]}")
    for name, least in (("workers", 1), ("checkpoint_every", 1), ("evaluate.every", 1), ("evaluate.keep", 0)):
        _whole(name, OmegaConf.select(cfg, name), least)
    _whole("seed", cfg.seed, -1, 2**31 - 1)  # fairseq's have 31 bits: beyond, two seeds would be one
    if cfg.cluster.threads is not None:
        _whole("cluster.threads", cfg.cluster.threads, most=1024)
    if "unreadable" in cfg.get("data", {}):
        _whole("data.unreadable", cfg.data.unreadable, 0)
    loggers.check(cfg)
    if (cfg.steps is None) == (cfg.epochs is None):
        raise ValueError("how long? give one of steps=K (inner steps) and epochs=E (passes over the training set), the other null")
    whole_steps(cfg)
    if cfg.resume not in ("auto", "never"):
        raise ValueError(f"resume={cfg.resume}: auto goes on from the last checkpoint, never starts anew and moves the old files aside")
    if cfg.cluster.vectorize not in MODES:
        raise ValueError(f"cluster.vectorize={cfg.cluster.vectorize}: choose auto, true or false")
    if not isinstance(cfg.cluster.graph, bool):
        _whole("cluster.graph (false, true, or how many replicas run at a time)", cfg.cluster.graph)
    if cfg.cluster.vectorize is True and (cfg.cluster.compile or cfg.cluster.graph):
        raise ValueError(
            "cluster.vectorize=true computes all replicas at once, cluster.compile and cluster.graph one after another: set it to auto"
        )
    if cfg.cluster.graph and cfg.cluster.device == "cpu":
        raise ValueError("cluster.graph captures a GPU's kernels, and cluster.device=cpu: set cluster.graph=false or cluster.device=cuda")
    if not 0 < cfg.cluster.bucket_cap_mb < 1e9:
        raise ValueError(f"cluster.bucket_cap_mb={cfg.cluster.bucket_cap_mb}: a positive number of MiB")
    if cfg.dtype not in ("float32", "float64"):
        raise ValueError(f"dtype={cfg.dtype}: rows are float32 or float64")
    if cfg.evaluate.batchnorm not in BATCHNORM:
        raise ValueError(f"evaluate.batchnorm={cfg.evaluate.batchnorm}: choose one of {', '.join(BATCHNORM)}")
    if not 0 < cfg.cluster.timeout < 1e9:
        raise ValueError(f"cluster.timeout={cfg.cluster.timeout}: a positive number of seconds")
    if "bleu" in cfg.task and cfg.task.bleu.subsets and cfg.evaluate.keep < cfg.task.bleu.average:
        given = f"task.bleu.average={cfg.task.bleu.average} models, evaluate.keep={cfg.evaluate.keep}"
        raise ValueError(f"{given}: BLEU averages models that are kept, raise evaluate.keep")
    if not cfg.runs or "\0" in cfg.runs:
        raise ValueError("runs is empty: give the folder of all runs")
    layout(cfg.workers, launch.processes(cfg))
    meets = cfg.outer.get("_target_") is not None and cfg.outer.get("exact", True)
    if cfg.base._target_ == "slowmo.base.LocalSGD" and not meets and cfg.workers > 1:
        raise ValueError("Local SGD that never averages: choose outer=average or outer=slowmo with outer.exact=true, or another base")


def whole_steps(cfg: DictConfig) -> int | None:
    """`steps`, None where `epochs` stands. ValueError for what is no length."""
    if cfg.steps is not None:
        _whole("steps", cfg.steps)
    elif not (isinstance(cfg.epochs, NUMBER) and not isinstance(cfg.epochs, bool) and 0 < cfg.epochs < 1e9):
        raise ValueError(f"epochs={cfg.epochs}: a positive number of passes over the training set")
    return cfg.steps


def _resolved(cfg: DictConfig, key: str, value):
    """What a key's interpolation stands for; other values as they are."""
    if not (isinstance(value, str) and "${" in value):
        return value
    try:
        value = OmegaConf.select(cfg, key, throw_on_resolution_failure=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"{key}={value}: {str(error).splitlines()[0]}") from None
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _parameters(cfg: DictConfig) -> dict:
    """{optimizer.KEY: default} of what the optimizer's own signature takes besides what its config has."""
    try:
        signature = inspect.signature(_locate(cfg.optimizer._target_))
    except (ImportError, TypeError, ValueError, OmegaConfBaseException):  # told when it is built
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = {name: p.default for name, p in signature.parameters.items() if p.kind in named and p.default is not p.empty}
    return {f"optimizer.{name}": float(default) if type(default) is int else default for name, default in found.items()}


def meant(word: str, known) -> str:
    """`: did you mean ...?`, or nothing."""
    close = difflib.get_close_matches(word, known, 1)
    return f": did you mean {close[0]}?" if close else ""


def _like(key: str, value, default) -> None:
    """ValueError where a number, truth value or list stands by default and something else is given."""
    number = isinstance(value, NUMBER) and not isinstance(value, bool)
    if value is None and default is None or isinstance(default, str) and (default == "???" or default.startswith("${")):
        return
    for kind, fits, like in (
        (bool, isinstance(value, bool), "true or false"),
        (int, number and isinstance(value, int), f"a whole number, like {default}"),
        (float, number and math.isfinite(value), f"a number, like {default}"),
        (list, isinstance(value, list), f"a list, like {default}"),
        (dict, isinstance(value, dict), "keys with values"),
        (str, isinstance(value, str), "a word"),
    ):
        if isinstance(default, kind):
            if not fits:
                raise ValueError(f"{key}={value}: give {like}")
            for part in value if isinstance(value, list) and default else ():
                _like(key, part, default[0])
            return


def _whole(name: str, value, least: int = 1, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or most is not None and value > most:
        said = f"from {least} to {most}" if most else f">= {least}"
        dotted = ", written without a point or an exponent" * (isinstance(value, float) and value.is_integer())
        raise ValueError(f"{name}={value}: a whole number {said}{dotted}")
