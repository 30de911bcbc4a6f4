"""Checkpoints: a safetensors file a rank, one for what is global, and a manifest with their checksums.

    step-000000120/  rank-00000.safetensors ...  global.safetensors  manifest.json

Written under another name and renamed when whole, so a folder with the right name is complete. Nothing is unpickled, no link is followed.
Files speak of workers, `<worker>/<key>`: a run may go on under another layout. A worker's tensors `own.<key>` are `[g, ...]`, one for each
of its g ranks.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from slowmo.cluster import Cluster

FORMAT = 2
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class PeerError(OSError):
    """What failed on another rank."""


class Damaged(ValueError):
    """A checkpoint that was written otherwise than it is read."""


@contextlib.contextmanager
def everywhere(cluster: Cluster) -> Iterator[None]:
    """What fails inside on one rank fails on all: there as it is, on the others as PeerError that names it. Collective at its end.

    OSError and ValueError only; no collective may be called inside.
    """
    error: OSError | ValueError | None = None
    try:
        yield
    except (OSError, ValueError) as raised:
        error = raised
    if not cluster.all_reduce_max(int(error is not None)):
        return
    found = cluster.all_gather_object(None if error is None else (str(error), getattr(error, "errno", None)))
    if error is not None:
        raise error
    rank, (text, number) = next((rank, facts) for rank, facts in enumerate(found) if facts)
    error = PeerError(f"rank {rank}: {text}")
    error.errno = number
    raise error


def save(folder: Path, step: int, cluster: Cluster, workers: list[dict[str, torch.Tensor]], shared: dict[str, torch.Tensor],
         state: dict[str, Any], keep: int = 2) -> None:  # fmt: skip
    """Write `folder/step-.../` and delete all but the newest `keep`. Collective. OSError on every rank when one cannot write.

    workers: tensors of each worker hosted here, by key; what differs between the ranks of a worker has a key `own.<...>`, and all of
    it is kept. shared: tensors that are the same everywhere. state: JSON values (step, clock, ...). Tensors may be views of any
    strides on any device: they pass through the host one after another.
    """
    final = folder / f"step-{step:09d}"
    aside = folder / f"{final.name}.partial"
    saved = False
    with everywhere(cluster):  # nobody writes before the folder is there
        if cluster.is_main:
            saved = final in _found(folder)
            if not saved:
                _remove(aside)
                aside.mkdir(parents=True)
    if cluster.broadcast_object(saved):
        return
    workers = [
        {key: cluster.all_gather_in_worker(value) if key.startswith("own.") else value for key, value in worker.items()}
        for worker in workers
    ]
    try:
        _fill(aside, final, step, cluster, workers, shared, state)
    except OSError:
        if cluster.is_main:  # a disk that is full needs the room
            with contextlib.suppress(OSError):
                _remove(aside)
        raise
    with everywhere(cluster):
        for old in _found(folder)[keep:] if cluster.is_main else ():
            _remove(old)


def _fill(aside: Path, final: Path, step: int, cluster: Cluster, workers: list[dict[str, torch.Tensor]], shared: dict[str, torch.Tensor],
          state: dict[str, Any]) -> None:  # fmt: skip
    """Write a checkpoint's files into the folder `aside`, which becomes `final`."""
    files: dict[str, dict[str, Any]] = {}
    with everywhere(cluster):
        if cluster.worker_rank == 0:
            tensors = {f"{i}/{key}": value for i, worker in zip(cluster.local_workers, workers) for key, value in worker.items()}
            name = f"rank-{cluster.rank // cluster.worker_size:05d}.safetensors"
            files[name] = {"sha256": _write(aside / name, tensors), "workers": list(cluster.local_workers)}
        if cluster.is_main:
            files["global.safetensors"] = {"sha256": _write(aside / "global.safetensors", shared), "workers": []}
    files = {name: facts for part in cluster.all_gather_object(files) for name, facts in part.items()}
    with everywhere(cluster):
        if cluster.is_main:
            body = {"format": FORMAT, "step": step, "workers": cluster.num_workers, "state": state, "files": files}
            with _naming(aside / "manifest.json"), open(aside / "manifest.json", "x") as file:
                json.dump({"sha256": _digest_of(body), "body": body}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.rename(aside, final)


class Checkpoint:
    """A checkpoint whose checksums were right. step; state and shared as they were saved, tensors on the CPU."""

    def __init__(self, path: Path, cluster: Cluster | None):
        self.path = path
        self._worker_rank, self._worker_size = (cluster.worker_rank, cluster.worker_size) if cluster else (0, 0)
        manifest = _manifest(path)
        self.step, self.workers, self.state, self._files = (manifest[key] for key in ("step", "workers", "state", "files"))

    def verify(self, workers: Iterable[int]) -> None:
        """Read what these workers need and compare checksums. Damaged, or OSError where reading itself fails."""
        needed = {self._file(worker) for worker in workers} | {"global.safetensors"}
        for name in sorted(needed):
            if name not in self._files or _digest(self.path / name) != self._files[name]["sha256"]:
                raise Damaged(f"{name} does not match its checksum")
        self.shared = self._read("global.safetensors", "")

    def worker(self, i: int) -> dict[str, torch.Tensor]:
        """Worker i's tensors, read now; `own.<key>` of this rank where a worker has as many ranks as then, else the mean over them.

        They lie in the file until they are used: let them go when they are copied.
        """
        found = self._read(self._file(i), f"{i}/")
        for key, value in found.items():
            if key.startswith("own."):
                found[key] = (
                    value[self._worker_rank]
                    if len(value) == self._worker_size
                    else (value if value.is_complex() else value.double()).mean(0).to(value.dtype)
                )
        return found

    def _file(self, worker: int) -> str:
        for name, facts in self._files.items():
            if worker in facts["workers"]:
                return name
        raise Damaged(f"no file has worker {worker}")

    def _read(self, name: str, prefix: str) -> dict[str, torch.Tensor]:
        try:
            with safe_open(self.path / name, "pt") as file:
                return {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
        except SafetensorError as error:
            raise Damaged(f"{name}: {error}") from None


def load(folder: Path, cluster: Cluster) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, or None; and complaints. Collective.

    A damaged one, by its checksums, is renamed to `*.damaged` and the one before is taken; the complaints say so. What cannot be read for
    another reason (a file server that is gone, no permission), or is another version's, is renamed by nobody: OSError or ValueError,
    on every rank.
    """
    with everywhere(cluster):
        if cluster.is_main:
            for left in _entries(folder):
                if left.name.endswith(".partial"):
                    _remove(left)
    with everywhere(cluster):
        paths = [str(path) for path in _found(folder)] if cluster.is_main else []
    complaints: list[str] = []
    for path in map(Path, cluster.broadcast_object(paths)):
        problem, found = "", None
        with everywhere(cluster):
            try:
                found = Checkpoint(path, cluster)
                if found.workers != cluster.num_workers:
                    raise ValueError(f"{path} has {found.workers} workers, this run {cluster.num_workers}: set workers={found.workers}")
                found.verify(cluster.local_workers)
            except Damaged as error:
                problem = str(error)
        problems = [text for text in cluster.all_gather_object(problem) if text]
        if not problems:
            return found, complaints
        complaints.append(f"checkpoint {path.name} is damaged ({problems[0]}), kept as {path.name}.damaged")
        with everywhere(cluster):
            if cluster.is_main:
                aside = path.with_name(f"{path.name}.damaged")
                _remove(aside)
                os.rename(path, aside)
    return None, complaints


def load_model_state(folder: Path, worker: int) -> dict[str, torch.Tensor]:
    """The state dict of a worker's own model in the newest checkpoint of `folder`. FileNotFoundError where there is none, ValueError for
    a damaged one."""
    paths = _found(folder)
    if not paths:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    try:
        found = Checkpoint(paths[0], None)
        found.verify([worker])
        tensors = found.worker(worker)
    except Damaged as error:
        raise ValueError(f"{paths[0]} is damaged: {error}") from None
    return {key.removeprefix("own.").removeprefix("model."): value.clone() for key, value in tensors.items()
            if key.removeprefix("own.").startswith("model.")}  # fmt: skip


def _manifest(path: Path) -> dict[str, Any]:
    """Checked as far as anything reads it."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):  # an OSError, which Path.is_dir may keep to itself, is no damage
        raise Damaged("it is no folder")
    try:
        with _open(path / "manifest.json") as file:
            whole = json.loads(file.read())
        manifest = whole["body"]
        if whole["sha256"] != _digest_of(manifest):
            raise Damaged("manifest.json does not match its checksum")
        if manifest["format"] == FORMAT:
            names = [re.fullmatch(r"(rank-\d+|global)\.safetensors", name) for name in manifest["files"]]
            numbers = [manifest["step"], manifest["workers"], *(i for facts in manifest["files"].values() for i in facts["workers"])]
            if not all(names) or not all(isinstance(number, int) for number in numbers) or not isinstance(manifest["state"], dict):
                raise Damaged("manifest.json is none of ours")
            return manifest
        version = manifest["format"]
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"manifest.json: {type(error).__name__}: {error}") from None
    remedy = "finish this run with version 0.1" if version == 1 else "go on with the version that wrote it"
    raise ValueError(f"{path} is a checkpoint of format {version}, this version reads {FORMAT}: {remedy}, or start anew with resume=never")


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """A safetensors file, tensor after tensor (safetensors' own writer takes all of them on the host at once); its sha256."""
    # wide types first: each tensor then starts at a multiple of its element's size
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header, end = {}, 0
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()
    with _naming(path), open(path, "xb") as file:  # never through a link

        def put(part: bytes | memoryview) -> None:
            file.write(part)
            sha.update(part)

        put(len(text).to_bytes(8, "little") + text)
        for name in order:
            put(tensors[name].detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return sha.hexdigest()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A write that fails does not say where."""
    try:
        yield
    except OSError as error:
        if error.strerror and error.filename is None:
            error.filename = str(path)
        raise


def _open(path: Path) -> io.BufferedReader:
    """A file for reading. Damaged where there is none, or a link, a folder, a pipe in its place; OSError where reading fails."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            raise Damaged(f"{path.name} is missing, or no file") from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise Damaged(f"{path.name} is no file")
    return os.fdopen(number, "rb")


def _digest(path: Path) -> str:
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _found(folder: Path) -> list[Path]:
    """What is called a complete checkpoint, newest first."""
    return sorted((path for path in _entries(folder) if re.fullmatch(r"step-\d{9}", path.name)), reverse=True)


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, nothing where there is none. OSError where it cannot be read: nothing intact counts as missing then."""
    try:
        with os.scandir(folder) as found:
            return [folder / entry.name for entry in found]
    except FileNotFoundError:
        return []


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
