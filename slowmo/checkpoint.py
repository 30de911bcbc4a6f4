"""Checkpoints: one safetensors file a worker, one for what is global, and a manifest with their checksums.

    step-000000120/  worker-00000.safetensors ...  global.safetensors  manifest.json

Written under another name and renamed when whole, so a folder with the right name is complete. Nothing is unpickled. Files speak of
workers, not of processes: a run may go on under another folding.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FORMAT = 1


def save(folder: Path, step: int, cluster, rows: dict, own: dict, shared: dict, state: dict, keep: int = 2) -> None:
    """Write `folder/step-.../` and delete all but the newest `keep`. Collective.

    rows: tensors `[n, ...]` of workers. own: tensors `[n, k]` that differ between the processes of a worker (BatchNorm statistics); all
    of them are kept. shared: tensors that are the same everywhere. state: JSON values (step, clock, ...).
    """
    final = folder / f"step-{step:09d}"
    aside = folder / f"{final.name}.partial"
    if cluster.broadcast_object(final.exists()):
        return
    if cluster.leader:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    cluster.barrier()  # nobody writes before the folder is there
    sums = {}
    own = {f"own.{name}": cluster.gather_inside(value) for name, value in own.items()}
    if cluster.lane == 0:
        for row, worker in enumerate(cluster.ranks):
            name = f"worker-{worker:05d}.safetensors"
            sums[name] = _write(aside / name, {key: value[row] for key, value in (rows | own).items()})
    if cluster.leader:
        sums["global.safetensors"] = _write(aside / "global.safetensors", shared)
    sums = {name: digest for part in cluster.gather(sums) for name, digest in part.items()}
    if cluster.leader:
        body = {"format": FORMAT, "step": step, "workers": cluster.size, "state": state, "sha256": sums}
        with open(aside / "manifest.json", "w") as file:
            json.dump({"sha256": _digest_of(body), "body": body}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, final)
        for old in _found(folder)[keep:]:
            shutil.rmtree(old)
    cluster.barrier()


def load(folder: Path, cluster) -> tuple[tuple[dict, dict, dict, dict] | None, list[str]]:
    """The newest whole checkpoint as `(rows, own, shared, state)`, or None, for the workers hosted here; and complaints. Collective.

    A damaged one is renamed to `*.damaged` and the one before is taken; the complaints say so. `own` comes back `[n, k]`: each process's
    own where the folding is the saved one, else the mean over the worker's processes.
    """
    if cluster.leader and folder.exists():
        for left in folder.glob("*.partial"):
            shutil.rmtree(left)
    complaints = []
    for path in cluster.broadcast_object([str(p) for p in _found(folder)]):
        path = Path(path)
        try:
            loaded, problem = _read(path, cluster), ""
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            loaded, problem = None, f"{error}"
        problems = [text for text in cluster.gather(problem) if text]
        if not problems:
            return loaded, complaints
        complaints.append(f"checkpoint {path.name} is damaged ({problems[0]}), kept as {path.name}.damaged; going back to the one before")
        if cluster.leader:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
        cluster.barrier()
    if complaints:
        complaints.append("no whole checkpoint is left: starting afresh")
    return None, complaints


def _read(path: Path, cluster) -> tuple[dict, dict, dict, dict]:
    whole = json.loads((path / "manifest.json").read_text())
    manifest = whole["body"]
    if whole["sha256"] != _digest_of(manifest):
        raise ValueError("manifest.json does not match its checksum")
    if manifest["format"] != FORMAT or manifest["workers"] != cluster.size:
        raise ValueError(f"format {manifest['format']} with {manifest['workers']} workers, not {FORMAT} with {cluster.size}")
    for name in ["global.safetensors", *(f"worker-{worker:05d}.safetensors" for worker in cluster.ranks)]:
        if _digest(path / name) != manifest["sha256"][name]:
            raise ValueError(f"{name} does not match its checksum")
    device = str(cluster.device)
    files = [load_file(path / f"worker-{worker:05d}.safetensors", device=device) for worker in cluster.ranks]
    rows, own = {}, {}
    for key in files[0]:
        value = torch.stack([file[key] for file in files])
        if not key.startswith("own."):
            rows[key] = value
        elif value.shape[1] == cluster.node:
            own[key.removeprefix("own.")] = value[:, cluster.lane]
        else:
            own[key.removeprefix("own.")] = value.mean(1)
    return rows, own, load_file(path / "global.safetensors"), manifest["state"]


def _write(path: Path, tensors: dict) -> str:
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{path} could not be written: {error}") from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return _digest(path)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _found(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    if not folder.exists():
        return []
    return sorted((p for p in folder.iterdir() if re.fullmatch(r"step-\d{9}", p.name)), reverse=True)
