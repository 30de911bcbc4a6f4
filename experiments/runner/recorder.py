"""What a run writes into its folder; run_dir.py has the picture."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_model

from experiments import files
from experiments.runner.build import arithmetic_now
from experiments.runner.run_dir import saved_models
from slowmo.checkpoint import everywhere


class RunRecorder:
    """Writes a run's files; rank 0 alone holds the pen, the calls are for all: what it cannot write is an OSError on every rank.

    rows: the metric rows so far. Everything is written aside and renamed, but for rows, which are appended.
    """

    def __init__(self, path: Path, cfg: DictConfig, cluster):
        self.path, self.cfg, self.cluster, self.rows = path, cfg, cluster, []
        self.digests, self.lost = {}, []  # of models/ and final.npz; models of the last `evaluate.keep` that are gone
        self.before = []  # the models of the checkpoint before: one may have to go back to it
        self.commits = [files.commit()]  # of the code that runs, whatever is checked out by the end; those it ran at before come first

    def state(self) -> dict:
        """What a checkpoint keeps of the record."""
        return {"rows": self.rows, "models": self._models(), "lost": self.lost, "before": self.before,
                "commits": self.commits}  # fmt: skip

    def saved(self) -> None:
        """A checkpoint has the record now: models that neither it nor the one before knows go."""
        with everywhere(self.cluster):
            if self.cluster.is_main:
                self._prune()
        self.before = list(self._models())

    def resume(self, state: dict | None) -> list[str]:
        """Take up the record as a checkpoint has it (None: from the beginning); what was damaged or lost since.

        Rows and models of later steps are dropped: they will come again.
        """
        complaints = []
        if state:
            self.rows, self.digests = list(state["rows"]), dict(state["models"])
            self.lost, self.before = list(state["lost"]), list(state["before"])
            earlier = [commit for commit in state.get("commits", []) if commit != self.commits[-1]]
            if earlier:
                complaints.append(f"the code is at commit {self.commits[-1]}, the run began at {earlier[0]}")
            self.commits = earlier + self.commits
        with everywhere(self.cluster):
            if self.cluster.is_main:
                for folder in (self.path, self.path / "models"):
                    files.sweep(folder)
                for left in files.entries(self.path / "models", ".tmp*"):  # safetensors' own, of a killed process
                    files.remove(left)
                if state and (missing := self._rows_missing()):
                    complaints.append(f"metrics.jsonl was damaged: {missing} of {len(self.rows)} rows are taken from the checkpoint")
                complaints += self._check_models()
                files.write(self.path / "config.yaml", OmegaConf.to_yaml(self.cfg, resolve=True))
                files.write(self.path / "metrics.jsonl", self._text())
        self.digests, self.lost = self.cluster.broadcast_object((self.digests, self.lost))
        return complaints

    def log(self, row: dict) -> None:
        """One more metric row; NaN and infinity become null, the status tells."""
        row = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}
        self.rows.append(row)
        with everywhere(self.cluster):
            if self.cluster.is_main:
                with files.open_file(self.path / "metrics.jsonl", "ab") as file:
                    file.write(json.dumps(row).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())

    def lacks_model(self, step: int) -> bool:
        """Whether the averaged model of this step was lost."""
        return _model_name(step) in self.lost

    def save_model(self, step: int, model: torch.nn.Module) -> None:
        """Keep the averaged model of this step, and no more than `evaluate.keep` in all."""
        if not self.cfg.evaluate.keep:
            return
        name = _model_name(step)
        with everywhere(self.cluster):
            if self.cluster.is_main:
                (self.path / "models").mkdir(exist_ok=True)
                with files.aside(self.path / name) as aside:
                    try:
                        save_model(model, str(aside))  # tied weights are written once
                    except SafetensorError as error:  # a full disk, say
                        raise OSError(f"{self.path / name} could not be written ({error}): make room, then ask again") from error
                    os.chmod(aside, 0o666 & ~_umask())  # safetensors' own are for the owner alone
                    self.digests[name] = files.digest(aside)
        self.lost = [other for other in self.lost if other != name]
        for old in sorted([*self._models(), *self.lost])[: -self.cfg.evaluate.keep]:
            self.digests.pop(old, None)
            self.lost = [other for other in self.lost if other != old]

    def save_iterates(self, algorithm) -> None:
        """final.npz: x [m, d], the de-biased workers; mean [d]; u [d] ([m, d] without exact averages, zeros where there is none)."""
        cluster, replicas, k = self.cluster, algorithm.replicas, algorithm.slow_names.index("u") if algorithm.slow_names else None
        slow = None if k is None else replicas.flat([values[k] for values in algorithm.slow.values()])
        tensors = (replicas.rows(), replicas.flat(algorithm.base.average()), slow)
        x, mean, u = (None if t is None else t.cpu().numpy() for t in tensors)
        parts = cluster.all_gather_object((x, u))[:: cluster.worker_size]
        with everywhere(cluster):
            if cluster.is_main:
                x = np.concatenate([part[0] for part in parts])
                if u is None:
                    u = np.zeros_like(x[0])
                elif algorithm.exact:
                    u = parts[0][1][0]
                else:
                    u = np.concatenate([part[1] for part in parts])
                with files.aside(self.path / "final.npz") as aside:
                    with open(aside, "xb") as file:
                        np.savez(file, x=x, mean=mean[0], u=u)
                    self.digests["final.npz"] = files.digest(aside)

    def finish(self, status: str, step: int, seconds: float, facts: dict) -> None:
        """result.json: what a table needs, `facts` of the task among it, where it came from, and the checksums of the other files."""
        rows = [row for row in self.rows if not row.get("diverged")]
        with everywhere(self.cluster):
            if not self.cluster.is_main:
                return
            self.before = []
            self._prune()
            self._complete()
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
                **({"lost": sorted(self.lost)} if self.lost else {}),
                "target": OmegaConf.to_container(self.cfg.target),
                "workers": self.cluster.num_workers,
                "processes": self.cluster.world_size,
                "commit": self.commits[-1],
                "commits": self.commits,
                "versions": _versions(),
                "hardware": _hardware(self.cluster.device),
                "arithmetic": arithmetic_now(),
            }
            sealed = files.sealed(files.parse(json.dumps(result)), self.digests)
            files.write(self.path / "result.json", json.dumps(sealed, indent=1) + "\n")

    def _models(self) -> dict[str, str]:
        return {name: digest for name, digest in self.digests.items() if name.startswith("models/")}

    def _prune(self) -> None:
        for path in saved_models(self.path):
            if f"models/{path.name}" not in {*self.digests, *self.before}:
                files.remove(path)

    def _text(self) -> str:
        return "".join(json.dumps(row) + "\n" for row in self.rows)

    def _rows_missing(self) -> int:
        """How many of the rows metrics.jsonl does not have as they should be."""
        try:
            lines = set(files.read(self.path / "metrics.jsonl").split(b"\n"))
        except FileNotFoundError:
            lines = set()
        return sum(json.dumps(row).encode() not in lines for row in self.rows)

    def _check_models(self) -> list[str]:
        """Delete models that the record does not know (of later steps, or stray), and write down which known ones are gone or damaged."""
        complaints = []
        self._prune()
        for name, expected in list(self.digests.items()):
            if not files.kind(self.path / name) or files.digest(self.path / name) != expected:
                complaints.append(f"{name} is gone or damaged")
                files.remove(self.path / name)
                self.lost.append(name)
                del self.digests[name]
        return complaints

    def _complete(self) -> None:
        """Rows that somebody took away from metrics.jsonl while the run was at work come back; checksums of the texts."""
        metrics = self.path / "metrics.jsonl"
        if not files.kind(metrics) or files.read(metrics) != self._text().encode():
            files.write(metrics, self._text())
        for name in ("metrics.jsonl", "config.yaml"):
            self.digests[name] = files.digest(self.path / name)


def _model_name(step: int) -> str:
    return f"models/step-{step:09d}.safetensors"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _best(rows: list[dict]) -> dict:
    """The best value of each metric over the run, each with its step; never mixed with the last ones."""
    best = {}
    for name, better in (("train_loss", min), ("validation_loss", min), ("nll", min), ("nll_base2", min), ("accuracy", max), ("top5", max)):
        seen = [(row[name], row["step"]) for row in rows if row.get(name) is not None]
        if seen:
            value = better(value for value, _ in seen)
            best[name] = {"value": value, "step": next(step for v, step in seen if v == value)}
    return best


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
