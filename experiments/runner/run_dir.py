"""A run's folder: a function of its config.

runs/<experiment>[,<key>=<value>...]/seed<seed>/
    config.yaml      the resolved config
    metrics.jsonl    one row an evaluation
    log.txt          what the screen showed, and the training loss every `log_every` steps
    result.json      best and last, seconds per iteration, where and with what, checksums: written when the run has ended
    final.npz        all iterates, for tasks whose iterates are small
    checkpoints/     the last two, with the metric rows up to each; see slowmo/checkpoint.py
    models/          the averaged model at the last `evaluate.keep` evaluations: safetensors, the model's own names
    .old-1/ ...      what lay there before resume=never
"""

import hashlib
import os
import re
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from experiments import files
from experiments.runner.config import Composed, compose, flat

# keys that do not change what a run computes; the seed has a level of its own, the problem file goes by its content
IGNORED_KEYS = (
    "seed", "dry_run", "resume", "checkpoint_every", "log_every", "logger", "runs", "target.", "cluster.", "launch.", "data.root",
    "data.download", "data.cache", "task.device", "task.problem", "task.num_loader_workers",
    "task.data.root", "task.data.download", "task.data.cache",
)  # fmt: skip
FILES, FOLDERS = ("config.yaml", "metrics.jsonl", "result.json", "final.npz", ".lock"), ("checkpoints", "models")


def run_dir(composed: Composed, task) -> Path:
    """Where this config's run lives: named after its experiment (or task), each group chosen otherwise and each key that differs."""
    cfg, name = composed.cfg, composed.experiment
    start = f"experiment={name}" if name else f"task={composed.choices['task']}"
    groups, plain = {}, compose([start])
    for nested in (False, True):  # base before base/graph: choosing a base brings its own graph
        more = {
            group: choice
            for group, choice in composed.choices.items()
            if ("/" in group) == nested and plain.choices.get(group) != choice and group not in ("cluster", "launch", "logger")
        }
        if more:
            groups |= more
            plain = compose([start, *(f"{group}={choice}" for group, choice in groups.items())])
    plain = flat(plain.cfg)
    name = name or composed.choices["task"]
    changed = {k: v for k, v in flat(cfg).items() if not k.startswith(IGNORED_KEYS) and plain.get(k) != v}
    # a chosen group comes before its keys, so that names read like the command
    words = {None: "null", True: "true", False: "false"}  # as they are typed; 1.0 is 1
    parts = [f"{k}={words[v] if v is None or isinstance(v, bool) else v}".removesuffix(".0")
             for k, v in [*sorted(groups.items()), *sorted(changed.items())]]  # fmt: skip
    if task.fingerprint:
        parts.append(f"problem={task.fingerprint}")
    text = re.sub(r"[^\w.,=+-]", "_", "".join(f",{part}" for part in parts))
    if len(text) > 150:
        text = f"{text[:130]},{hashlib.sha256(','.join(parts).encode()).hexdigest()[:12]}"
    return Path(cfg.runs) / f"{name}{text}" / f"seed{cfg.seed}"


def check(path: Path) -> None:
    """OSError, naming the remedy, where a link, a folder, a pipe has the name of a run's file."""
    files.check_kinds(path, FILES, FOLDERS)
    for folder in FOLDERS[1:]:
        files.check_kinds(path / folder, [file.name for file in files.entries(path / folder, "*.safetensors")])


def existing_result(path: Path, cfg: DictConfig) -> tuple[dict | None, list[str]]:
    """The result that the folder holds, None where the run has not ended or its files are damaged; and what is damaged.

    ValueError where the folder is another config's: a name tells how a config differs from its experiment's file, and the file may
    have been edited since.
    """
    try:
        then = flat(OmegaConf.create(files.read(path / "config.yaml").decode()))
    except FileNotFoundError:
        then = None
    except OSError:
        raise
    except Exception as error:  # a damaged YAML file can raise almost anything
        raise ValueError(f"{path / 'config.yaml'} is damaged ({type(error).__name__}): delete it if this run is yours") from None
    if then is not None:
        now = flat(OmegaConf.create(OmegaConf.to_yaml(cfg, resolve=True)))
        changed = [k for k in sorted(then.keys() | now.keys()) if then.get(k) != now.get(k) and not k.startswith(IGNORED_KEYS)]
        if changed:
            raise ValueError(f"{path} holds a run whose {', '.join(changed)} differ: move or delete it, or set runs=ANOTHER_FOLDER")
    problems = files.damaged(path)
    return (None if problems else files.result(path)), problems


def trained_to(path: Path) -> int:
    """A step that the folder shows the run to have reached beyond its first checkpoint; 0 where it may start from the beginning.

    For a folder without a whole checkpoint: a run that was killed before its first one lost nothing but time.
    """
    try:
        first = int(OmegaConf.create(files.read(path / "config.yaml").decode()).checkpoint_every)
    except OSError:
        first = 0
    metrics = files.read(path / "metrics.jsonl") if files.kind(path / "metrics.jsonl") else b""
    seen = [int(text) for text in re.findall(rb'"step": (\d+)', metrics)]
    seen += [int(model.stem.removeprefix("step-")) for model in saved_models(path)]
    damaged = [int(found.name[5:14]) for found in files.entries(path / "checkpoints", "step-?????????.damaged")]
    ended = 1 if files.kind(path / "result.json") else 0
    return max([ended, *damaged, *(step for step in seen if step > first)])


def start_anew(path: Path) -> str:
    """Move what lies in the folder to a folder in it, and nothing away; a line that says so."""
    found = [entry for entry in files.entries(path) if entry.name != ".lock" and not entry.name.startswith(".old-")]
    if not found:
        return ""
    n = 1
    while files.kind(path / f".old-{n}"):
        n += 1
    (path / f".old-{n}").mkdir()
    for entry in found:
        os.rename(entry, path / f".old-{n}" / entry.name)
    return f"resume=never: what was there is in {path / f'.old-{n}'}"


def saved_models(path: Path) -> list[Path]:
    """The files of a run's averaged models, in order of their steps."""
    return files.entries(path / "models", "step-?????????.safetensors")


def load_model(path: Path, model: torch.nn.Module) -> None:
    """Fill `model` from a file of models/, where tied weights stand once. RuntimeError for another network's file."""
    state, names = load_file(path), {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    for tied in names.values():
        state |= {name: state[other] for other in tied if other in state for name in tied}
    model.load_state_dict(state)
