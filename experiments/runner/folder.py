"""A run's folder: a function of its config.

    runs/<experiment>[,<key>=<value>...]/seed<seed>/
        config.yaml      the resolved config
        metrics.jsonl    one row an evaluation
        result.json      best and last, seconds an iteration, where and with what: written when the run has ended
        final.npz        all iterates, for tasks whose iterates are small
        checkpoints/     the last two; see slowmo/checkpoint.py
    models/          the averaged model at the last `evaluate.keep` evaluations: safetensors, the model's own names
"""

import hashlib
import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_model

from experiments.runner.plan import choices, flat

# keys that do not change what a run computes; the seed has a level of its own, the problem file goes by its content
NEUTRAL = ("seed", "dry_run", "checkpoint_every", "log_every", "logger", "runs", "promise.", "cluster.", "launch.", "data.root",
           "data.download", "data.cache", "task.problem", "task.loaders")  # fmt: skip


def of(cfg: DictConfig, task) -> Path:
    """Where this config's run lives: named after its experiment (or task), each group chosen otherwise and each key that differs."""
    experiment = HydraConfig.get().runtime.choices.get("experiment")
    name, start = (experiment, f"experiment={experiment}") if experiment else (cfg_task := choices()["task"], f"task={cfg_task}")
    groups = {}
    for nested in (False, True):  # base before base/graph: choosing a base brings its own graph
        start_with = [start, *(f"{group}={choice}" for group, choice in groups.items())]
        before = hydra.compose("config", overrides=start_with, return_hydra_config=True).hydra.runtime.choices
        for group, choice in choices().items():
            if ("/" in group) == nested and before.get(group) != choice and group not in ("cluster", "launch", "logger", "task"):
                groups[group] = choice
    plain = flat(hydra.compose("config", overrides=[start, *(f"{group}={choice}" for group, choice in groups.items())]))
    changed = {k: v for k, v in flat(cfg).items() if not k.startswith(NEUTRAL) and plain.get(k) != v}
    # a chosen group comes before its keys, so that names read like the command
    parts = [f"{k}={v}".removesuffix(".0") for k, v in [*sorted(groups.items()), *sorted(changed.items())]]  # 1.0 is 1
    if task.fingerprint:
        parts.append(f"problem={task.fingerprint}")
    text = re.sub(r"[^\w.,=+-]", "_", "".join(f",{part}" for part in parts))
    if len(text) > 150:
        text = f"{text[:130]},{hashlib.sha256(','.join(parts).encode()).hexdigest()[:12]}"
    return Path(cfg.runs) / f"{name}{text}" / f"seed{cfg.seed}"


def earlier(path: Path, cfg: DictConfig, cluster) -> dict | None:
    """The result that the folder holds, None where the run has not ended; process 0 looks, everybody gets its answer.

    ValueError where the folder is another config's: a name tells how a config differs from its experiment's file, and the file may
    have been edited since.
    """
    result, complaint = cluster.broadcast_object(_earlier(path, cfg) if cluster.leader else None)
    if complaint:
        raise ValueError(complaint)
    return result


def _earlier(path: Path, cfg: DictConfig) -> tuple[dict | None, str | None]:
    saved = path / "config.yaml"
    if saved.exists():
        then, now = (flat(OmegaConf.create(OmegaConf.to_yaml(c, resolve=True))) for c in (OmegaConf.load(saved), cfg))
        neutral = (*NEUTRAL, "task.device", "task.data.root", "task.data.download")
        changed = [k for k in sorted(then.keys() | now.keys()) if then.get(k) != now.get(k) and not k.startswith(neutral)]
        if changed:
            return None, f"{path} holds a run whose {', '.join(changed)} differ: move or delete it, or set runs=ANOTHER_FOLDER"
    result = path / "result.json"
    return (json.loads(result.read_text()) if result.exists() else None), None


def kept(path: Path) -> list[Path]:
    """The files of a run's averaged models, in order of their steps."""
    return sorted((path / "models").glob("step-*.safetensors"))


def load_model(path: Path, model: torch.nn.Module) -> None:
    """Fill `model` from a file of models/, where tied weights stand once. RuntimeError for another network's file."""
    state, names = load_file(path), {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    for tied in names.values():
        state |= {name: state[other] for other in tied if other in state for name in tied}
    model.load_state_dict(state)


class Book:
    """Writes a run's files; process 0 alone holds the pen, the calls are for all. Everything is written aside and renamed."""

    def __init__(self, path: Path, cfg: DictConfig, cluster):
        self.path, self.cfg, self.cluster, self.rows = path, cfg, cluster, []
        self.commit = commit()  # of the code that runs, whatever is checked out by the end

    def open(self, step: int) -> None:
        """Take up the run at `step`: rows of evaluations that the checkpoint does not know are dropped, they will come again."""
        if not self.cluster.leader:
            return
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            for line in metrics.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break  # the half line of a killed process
                if row["step"] <= step:
                    self.rows.append(row)
        _write(metrics, "".join(json.dumps(row) + "\n" for row in self.rows))
        _write(self.path / "config.yaml", OmegaConf.to_yaml(self.cfg, resolve=True))

    def add(self, row: dict) -> None:
        """One more metric row; NaN and infinity become null, the status tells."""
        row = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
        self.rows.append(row)
        if self.cluster.leader:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def keep(self, step: int, model: torch.nn.Module) -> None:
        """Keep the averaged model of this step, and no more than `evaluate.keep` in all."""
        if not (self.cluster.leader and self.cfg.evaluate.keep):
            return
        path = self.path / "models" / f"step-{step:09d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        aside = path.with_suffix(".partial")
        save_model(model, str(aside))  # tied weights are written once
        os.replace(aside, path)
        for old in kept(self.path)[: -self.cfg.evaluate.keep]:
            old.unlink()

    def final(self, algorithm) -> None:
        """final.npz: x [m, d], the de-biased workers; mean [d]; u [d] ([m, d] without exact averages, zeros where there is none)."""
        cluster, d = self.cluster, algorithm.replicas.parameters
        x, mean, u = (None if t is None else t.detach()[:, :d].cpu().numpy() for t in (algorithm.rows, algorithm.average(), algorithm.u))
        parts = cluster.gather((x, u))[:: cluster.node]
        if cluster.leader:
            x = np.concatenate([part[0] for part in parts])
            if u is None:
                u = np.zeros_like(x[0])
            elif getattr(algorithm, "exact", True):
                u = parts[0][1][0]
            else:
                u = np.concatenate([part[1] for part in parts])
            aside = self.path / "final.partial.npz"
            np.savez(aside, x=x, mean=mean[0], u=u)
            os.replace(aside, self.path / "final.npz")

    def close(self, status: str, step: int, seconds: float, facts: dict) -> None:
        """result.json: what a table needs, `facts` of the task among it, and where it came from."""
        if not self.cluster.leader:
            return
        rows = [row for row in self.rows if not row.get("diverged")]
        result = {
            "status": status,
            "experiment": HydraConfig.get().runtime.choices.get("experiment"),
            "folder": str(self.path),
            "seed": self.cfg.seed,
            "step": step,
            "last": rows[-1] if rows else None,
            "best": _best(rows),
            "seconds": seconds,
            "seconds_per_iteration": seconds / max(step, 1),
            **facts,
            "promise": OmegaConf.to_container(self.cfg.promise),
            "workers": self.cluster.size,
            "processes": self.cluster.processes,
            "commit": self.commit,
            "versions": _versions(),
            "hardware": _hardware(self.cluster.device),
        }
        _write(self.path / "result.json", json.dumps(result, indent=1) + "\n")


def _best(rows: list[dict]) -> dict:
    """The best value of each metric over the run, each with its step; never mixed with the last ones."""
    best = {}
    for name, better in (("train_loss", min), ("validation_loss", min), ("nll", min), ("nll_base2", min), ("accuracy", max), ("top5", max)):
        seen = [(row[name], row["step"]) for row in rows if row.get(name) is not None]
        if seen:
            value = better(value for value, _ in seen)
            best[name] = {"value": value, "step": next(step for v, step in seen if v == value)}
    return best


def commit() -> str | None:
    """The repository's commit, with `+` when tracked files differ from it; None outside a repository."""
    root = Path(__file__).parents[2]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(dirty.strip())


def _versions() -> dict:
    out = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy", "hydra-core", "scikit-image", "scikit-learn", "pillow", "fairseq-fixed", "sacrebleu"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = None
    return out


def _hardware(device: torch.device) -> dict:
    out = {"device": str(device), "threads": torch.get_num_threads(), "cores": os.cpu_count(), "machine": platform.machine()}
    if device.type == "cuda":
        out["gpu"] = torch.cuda.get_device_name(device)
    return out


def _write(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".partial")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
