"""Checkpoints by themselves: any layout loads what any other saved, each rank of a worker its own; damage is found, an error is none."""

import errno
import json
import os
import shutil
import stat
import threading
import weakref
from pathlib import Path

import pytest
import torch
from processes import spawn
from safetensors.torch import load_file

from slowmo import checkpoint
from slowmo.cluster import Cluster

M, LAYOUTS = 4, (1, 2, 4, 8)  # four, two and one worker a rank; a worker of two ranks
NEWEST = "step-000000006"


def state(cluster):
    """(workers, shared, state) that name their worker and, in `own.`, their rank; several types and strides."""
    workers = []
    for i in cluster.local_workers:
        z = (i + torch.arange(6) / 7).float()
        workers.append({
            "z": z,
            "turned": z.reshape(2, 3).transpose(0, 1).double(),
            "half": z.bfloat16()[:5],
            "w": torch.tensor([i + 1 / 3], dtype=torch.float64),
            "flags": z > 3,
            "count": torch.tensor(2**40 + i),
            "own.buffers": torch.tensor([i + cluster.worker_rank / 4, i + cluster.worker_rank / 4 + 10.0], dtype=torch.float64),
            "own.batches": torch.tensor(4 * i + 2 * cluster.worker_rank),
            "own.none": torch.zeros(0),
        })  # fmt: skip
    shared = {"steps": torch.tensor(12), "x0": torch.tensor([[1 / 3, -0.0, 1e-310]], dtype=torch.float64)}
    return workers, shared, {"step": 12, "seconds": 0.1 + 0.2, "count": 3, "rows": [{"step": 5, "loss": 1e-300, "u_norm": None}]}


def save(folder, steps=(12,)):
    cluster = Cluster(M)
    for step in steps:
        checkpoint.save(folder, step, cluster, *state(cluster))


def load(folder):
    """What this rank would go on with: (step of the checkpoint or None, complaints)."""
    found, complaints = checkpoint.load(folder, Cluster(M))
    return found and found.step, complaints


def attempt(folder, function=load, before=None):
    """The kind of error and its message, or what `function` gives."""
    if before:
        before(Cluster(M).rank)
    try:
        return function(folder)
    except (OSError, ValueError) as error:
        return type(error).__name__, str(error)


def on(processes, function, *arguments):
    """Each rank's result."""
    return [function(*arguments)] if processes == 1 else spawn(function, processes, *arguments)


def same_bits(left, right):
    raw = [t.contiguous().view(torch.uint8) if t.numel() and t.ndim else t for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*raw)


def check(folders):
    """Load what each layout saved; runs in every rank."""
    cluster = Cluster(M)
    workers, shared, numbers = state(cluster)
    for processes, folder in folders.items():
        found, complaints = checkpoint.load(folder, cluster)
        assert not complaints and found.state == numbers and found.step == 12
        assert found.shared.keys() == shared.keys() and all(same_bits(found.shared[key], shared[key]) for key in shared)
        saved_with = max(processes // M, 1)  # ranks a worker had
        for i, expected in zip(cluster.local_workers, workers):
            got = found.worker(i)
            assert got.keys() == expected.keys()
            if saved_with != cluster.worker_size:  # the mean over them
                lanes = sum(range(saved_with)) / saved_with
                expected = expected | {
                    "own.buffers": expected["own.buffers"] + (lanes - cluster.worker_rank) / 4,
                    "own.batches": torch.tensor(int(4 * i + 2 * lanes)),
                }
            assert all(same_bits(got[key], expected[key]) for key in expected), (processes, i, got)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of checkpoints by each layout."""
    folders = {processes: tmp_path_factory.mktemp(f"by{processes}") for processes in LAYOUTS}
    for processes, folder in folders.items():
        on(processes, save, folder)
    return folders


@pytest.mark.parametrize("processes", LAYOUTS)
def test_every_layout_loads_every_other(processes, saved):
    on(processes, check, saved)


def test_one_file_a_rank_that_writes(saved):
    for processes, count in ((1, 1), (2, 2), (4, 4), (8, 4)):
        names = sorted(os.listdir(saved[processes] / "step-000000012"))
        assert names == ["global.safetensors", "manifest.json", *(f"rank-{k:05d}.safetensors" for k in range(count))]
        files = json.loads((saved[processes] / "step-000000012" / "manifest.json").read_text())["body"]["files"]
        assert sorted(i for facts in files.values() for i in facts["workers"]) == list(range(M))


def test_the_files_are_safetensors(saved):
    tensors = load_file(saved[1] / "step-000000012" / "rank-00000.safetensors")
    assert {key.partition("/")[0] for key in tensors} == {"0", "1", "2", "3"}
    assert tensors["3/own.buffers"].tolist() == [[3.0, 13.0]] and tensors["2/turned"].shape == (3, 2)


def test_only_the_newest_are_kept_and_an_old_name_is_not_written_again(tmp_path):
    save(tmp_path, steps=(2, 10, 1_000))
    assert sorted(os.listdir(tmp_path)) == ["step-000000010", "step-000001000"]
    manifest = tmp_path / "step-000001000" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    save(tmp_path, steps=(1_000,))
    assert manifest.stat().st_mtime_ns == before


def test_files_honour_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()} == {0o640}


def test_workers_pass_through_the_host_one_after_another(tmp_path):
    """A GPU's workers, say: when a tensor is copied to the host, the copies of others have gone."""
    copies, alive = [], []

    class OnDevice(torch.Tensor):
        def cpu(self):
            copies.append(weakref.ref(copy := self.as_subclass(torch.Tensor).clone()))
            alive.append(sum(other() is not None for other in copies))
            return copy

    workers = [{"z": torch.rand(1000).as_subclass(OnDevice), "m": torch.rand(1000).as_subclass(OnDevice)} for _ in range(M)]
    checkpoint.save(tmp_path, 1, Cluster(M), workers, {}, {})
    assert len(alive) == 2 * M and max(alive) <= 2


def test_nothing_there(tmp_path):
    assert load(tmp_path / "never") == (None, []) and load(tmp_path) == (None, [])


def test_what_was_not_finished_does_not_count(tmp_path):
    save(tmp_path, steps=(5, 6))
    os.rename(tmp_path / NEWEST, tmp_path / f"{NEWEST}.partial")
    assert load(tmp_path) == (5, []) and os.listdir(tmp_path) == ["step-000000005"]


def test_what_could_not_be_written_leaves_room(tmp_path, monkeypatch):
    save(tmp_path, steps=(5,))

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*step-000000006.partial"):
        save(tmp_path, steps=(6,))
    assert os.listdir(tmp_path) == ["step-000000005"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 128
    path.write_bytes(content)


def replace_by(make):
    def change(path):
        path.unlink()
        make(path)

    return change


DAMAGES = {
    "flip": flip,
    "gone": os.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "folder": replace_by(os.mkdir),
    "pipe": replace_by(os.mkfifo),
    "dangling": replace_by(lambda path: path.symlink_to("nowhere")),
    "loop": replace_by(lambda path: path.symlink_to(path.name)),
    "link": lambda path: (path.rename(path.parents[2] / path.name), path.symlink_to(path.parents[2] / path.name)),
}


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "global.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen_and_kept(damage, name, tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, steps=(5, 6))
    DAMAGES[damage](folder / NEWEST / name)
    step, (complaint,) = load(folder)
    assert step == 5 and f"{NEWEST} is damaged ({name}" in complaint
    assert sorted(os.listdir(folder)) == ["step-000000005", f"{NEWEST}.damaged"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nowhere"), lambda path: path.write_text("no folder"),
                                  lambda path: path.symlink_to("step-000000005")])  # fmt: skip
def test_no_folder_is_no_checkpoint(make, tmp_path):
    save(tmp_path, steps=(5,))
    make(tmp_path / NEWEST)
    step, (complaint,) = load(tmp_path)
    assert step == 5 and "it is no folder" in complaint


@pytest.mark.parametrize("processes", [2, 8])
def test_damage_that_one_rank_sees_is_seen_by_all(processes, tmp_path):
    spawn(save, processes, tmp_path, (5, 6))
    flip(tmp_path / NEWEST / f"rank-{processes // 2 if processes == 2 else 3:05d}.safetensors")
    for step, complaints in spawn(load, processes, tmp_path):
        assert step == 5 and len(complaints) == 1 and "does not match its checksum" in complaints[0]
    assert sorted(os.listdir(tmp_path)) == ["step-000000005", f"{NEWEST}.damaged"]


def failing(number, only, call="open"):
    """A rank whose reads, or writes, of tensor files give an errno of a file server or a disk."""

    def before(rank):
        real = getattr(os, call)

        def fails(path, *arguments):
            if rank == only and (call == "fsync" or str(path).endswith(".safetensors")):
                raise OSError(number, os.strerror(number))
            return real(path, *arguments)

        setattr(os, call, fails)

    return before


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("only", [0, 1])
def test_an_error_of_reading_is_no_damage(number, only, tmp_path):
    """Said on every rank; both checkpoints stay as they are."""
    spawn(save, 2, tmp_path, (5, 6))
    said = spawn(attempt, 2, tmp_path, load, failing(number, only))
    kinds = {rank: kind for rank, (kind, _) in enumerate(said)}
    assert kinds[1 - only] == "PeerError" and kinds[only] != "PeerError"
    assert all(os.strerror(number) in text for _, text in said) and said[1 - only][1].startswith(f"rank {only}: ")
    assert sorted(os.listdir(tmp_path)) == ["step-000000005", NEWEST]
    assert {step for step, _ in spawn(load, 2, tmp_path)} == {6}


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path, monkeypatch):
    """Path.glob finds nothing without permission, and newer Pythons' Path.exists and Path.is_dir deny whatever they cannot ask for."""

    def fails(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    save(tmp_path)
    for name in ("exists", "is_dir", "is_file"):
        monkeypatch.setattr(Path, name, lambda *_: False)
    assert load(tmp_path) == (12, [])
    for name in ("scandir", "lstat"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            with pytest.raises(PermissionError):
                load(tmp_path)
    assert os.listdir(tmp_path) == ["step-000000012"]


@pytest.mark.parametrize("only", [0, 1])
def test_a_full_disk_of_one_rank_ends_all_and_leaves_what_was_there(only, tmp_path):
    spawn(save, 2, tmp_path, (5,))
    said = spawn(attempt, 2, tmp_path, save, failing(errno.ENOSPC, only, "fsync"))
    assert all(os.strerror(errno.ENOSPC) in text for _, text in said) and {kind for kind, _ in said} == {"OSError", "PeerError"}
    assert load(tmp_path) == (5, [])


def rewrite(folder, change):
    """A manifest that says something else, with the right checksum of its own."""
    path = folder / "step-000000012" / "manifest.json"
    body = json.loads(path.read_text())["body"]
    change(body)
    path.write_text(json.dumps({"sha256": checkpoint._digest_of(body), "body": body}))


@pytest.mark.parametrize("changed, words", [
    ({"format": 1}, "finish this run with version 0.1, or start anew with resume=never"),
    ({"format": 3}, "format 3, this version reads 2: go on with the version that wrote it"),
    ({"workers": 8}, "has 8 workers, this run 4: set workers=8"),
])  # fmt: skip
def test_another_version_or_another_size_is_refused_and_stays(changed, words, tmp_path):
    save(tmp_path)
    rewrite(tmp_path, lambda body: body.update(changed))
    kind, text = attempt(tmp_path)
    assert kind == "ValueError" and words in text and "\n" not in text and os.listdir(tmp_path) == ["step-000000012"]


def test_a_checkpoint_of_version_0_1(tmp_path):
    """As that version wrote it: its manifest has sums of files, and no list of workers."""
    body = {"format": 1, "step": 12, "workers": M, "state": {"step": 12}, "sha256": {"global.safetensors": "0"}}
    (tmp_path / "step-000000012").mkdir()
    (tmp_path / "step-000000012" / "manifest.json").write_text(json.dumps({"sha256": checkpoint._digest_of(body), "body": body}))
    assert "finish this run with version 0.1" in attempt(tmp_path)[1] and os.listdir(tmp_path) == ["step-000000012"]


@pytest.mark.parametrize("change", [
    lambda body: body["files"].pop("rank-00000.safetensors"),
    lambda body: body["files"].pop("global.safetensors"),
    lambda body: body["files"].update({"../../outside": {"sha256": "0", "workers": [0]}}),
    lambda body: body.update(files=None),
    lambda body: body.pop("state"),
    lambda body: body.update(step="twelve"),
])  # fmt: skip
def test_a_manifest_of_a_stranger_is_damage(change, tmp_path):
    """Files without a sum, or elsewhere, are never read."""
    save(tmp_path)
    rewrite(tmp_path, change)
    assert load(tmp_path)[0] is None and os.listdir(tmp_path) == ["step-000000012.damaged"]


@pytest.mark.parametrize("text", ["", "[]", "{}", "{" * 100_000, '{"body": {}, "sha256": ""}', "\0\ud800"])
def test_what_is_no_manifest_is_damage(text, tmp_path):
    save(tmp_path)
    (tmp_path / "step-000000012" / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert load(tmp_path)[0] is None


def test_a_changed_number_in_the_manifest_is_damage(tmp_path):
    save(tmp_path)
    path = tmp_path / "step-000000012" / "manifest.json"
    text = path.read_text()
    assert '"count": 3' in text
    path.write_text(text.replace('"count": 3', '"count": 7'))
    assert load(tmp_path)[0] is None


def test_nothing_is_written_through_a_link(tmp_path):
    """A link under the name that a checkpoint is written to at first."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-000000012.partial").symlink_to(elsewhere)
    save(folder)
    assert load(folder) == (12, []) and os.listdir(elsewhere) == ["precious"]


def test_a_worker_is_read_when_it_is_asked_for(tmp_path):
    """Not before: a rank holds its blocks and one worker at a time."""
    save(tmp_path)
    found, _ = checkpoint.load(tmp_path, Cluster(M))
    shutil.rmtree(tmp_path / "step-000000012")
    with pytest.raises(OSError):
        found.worker(2)


def test_the_state_of_a_model(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model(torch.rand(5, 3))
    keys = {name: f"own.model.{name}" if name.startswith("1.running") or "num" in name else f"model.{name}" for name in model.state_dict()}
    worker = {keys[name]: value for name, value in model.state_dict().items()} | {"optimizer.momentum": torch.rand(3)}
    checkpoint.save(tmp_path, 3, Cluster(1), [worker], {}, {})
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    other.load_state_dict(checkpoint.load_model_state(tmp_path, 0))
    assert all(same_bits(other.state_dict()[name], value) for name, value in model.state_dict().items())
    flip(tmp_path / "step-000000003" / "rank-00000.safetensors")
    with pytest.raises(ValueError, match="does not match its checksum"):
        checkpoint.load_model_state(tmp_path, 0)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.load_model_state(tmp_path / "nowhere", 0)


def test_a_pipe_does_not_hang(tmp_path):
    save(tmp_path)
    path = tmp_path / "step-000000012" / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    thread = threading.Thread(target=load, args=(tmp_path,), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
