"""Checkpoints by themselves: any folding loads what any other saved, each process of a node its own; damage is found."""

import json
import os

import pytest
import torch
from processes import spawn

from slowmo import checkpoint
from slowmo.cluster import Cluster

M, FOLDINGS = 4, (1, 2, 4, 8)  # four, two and one worker a process; a worker of two processes


def state(cluster):
    """(rows, own, shared, state) that name their worker and, in `own`, their process; several types and strides."""
    workers = torch.tensor([float(i) for i in cluster.ranks], dtype=torch.float64)[:, None]
    z = (workers + torch.arange(6) / 7).float()
    rows = {
        "z": z,
        "turned": z.reshape(-1, 2, 3).transpose(1, 2).double(),
        "half": z.bfloat16(),
        "w": workers + 1 / 3,
        "count": torch.arange(len(workers)) * 0 + 2**40 + 1,
    }
    own = {"buffers": workers + cluster.lane / 4 + torch.tensor([[0.0, 10.0]]), "none": torch.zeros(len(workers), 0)}
    shared = {"steps": torch.tensor(12), "x0": torch.tensor([[1 / 3, -0.0, 1e-310]], dtype=torch.float64)}
    return rows, own, shared, {"step": 12, "seconds": 0.1 + 0.2, "count": 3}


def save(folder, steps=(12,)):
    cluster = Cluster(M)
    for step in steps:
        checkpoint.save(folder, step, cluster, *state(cluster))


def load(folder):
    return checkpoint.load(folder, Cluster(M))


def same_bits(left, right):
    raw = [t.contiguous().view(torch.uint8) if t.numel() and t.ndim else t for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*raw)


def check(folders):
    """Load what each folding saved; runs in every process."""
    cluster = Cluster(M)
    rows, own, shared, numbers = state(cluster)
    for processes, folder in folders.items():
        (got_rows, got_own, got_shared, got_numbers), complaints = checkpoint.load(folder, cluster)
        assert not complaints and got_numbers == numbers
        for got, expected in ((got_rows, rows), (got_shared, shared)):
            assert got.keys() == expected.keys()
            assert all(same_bits(got[key], expected[key]) for key in expected), (processes, got)
        saved_with = max(processes // M, 1)  # processes a worker had
        if saved_with == cluster.node:
            expected = own["buffers"]
        else:  # the mean over them
            lanes = sum(lane / 4 for lane in range(saved_with)) / saved_with
            expected = own["buffers"] - cluster.lane / 4 + lanes
        assert torch.equal(got_own["buffers"], expected) and got_own["none"].shape == (len(cluster.ranks), 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of checkpoints by each folding."""
    folders = {processes: tmp_path_factory.mktemp(f"by{processes}") for processes in FOLDINGS}
    for processes, folder in folders.items():
        save(folder) if processes == 1 else spawn(save, processes, folder)
    return folders


@pytest.mark.parametrize("processes", FOLDINGS)
def test_every_folding_loads_every_other(processes, saved):
    check(saved) if processes == 1 else spawn(check, processes, saved)


def test_foldings_write_the_same_workers(saved):
    """Byte by byte where a worker is one process: the files do not know where they came from."""
    paths = [saved[processes] / "step-000000012" for processes in (1, 2, 4)]
    for name in [f"worker-{worker:05d}.safetensors" for worker in range(M)] + ["global.safetensors"]:
        assert len({(path / name).read_bytes() for path in paths}) == 1, name
    manifests = [json.loads((path / "manifest.json").read_text()) for path in paths]
    assert manifests[0] == manifests[1] == manifests[2]


def test_only_the_newest_are_kept_and_an_old_name_is_not_written_again(tmp_path):
    save(tmp_path, steps=(2, 10, 1_000))
    assert sorted(os.listdir(tmp_path)) == ["step-000000010", "step-000001000"]
    manifest = tmp_path / "step-000001000" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    save(tmp_path, steps=(1_000,))
    assert manifest.stat().st_mtime_ns == before


def test_nothing_there(tmp_path):
    assert load(tmp_path / "never") == (None, []) and load(tmp_path) == (None, [])


def test_what_was_not_finished_does_not_count(tmp_path):
    save(tmp_path, steps=(5, 6))
    os.rename(tmp_path / "step-000000006", tmp_path / "step-000000006.partial")
    loaded, complaints = load(tmp_path)
    assert loaded and not complaints and os.listdir(tmp_path) == ["step-000000005"]


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_damage_that_one_process_sees_is_seen_by_all(processes, tmp_path):
    save(tmp_path, steps=(5, 6)) if processes == 1 else spawn(save, processes, tmp_path, (5, 6))
    path = tmp_path / "step-000000006" / "worker-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 128
    path.write_bytes(content)
    for loaded, complaints in [load(tmp_path)] if processes == 1 else spawn(load, processes, tmp_path):
        assert loaded[3]["step"] == 12 and len(complaints) == 1
        assert "step-000000006 is damaged (worker-00003.safetensors does not match its checksum)" in complaints[0]
    assert sorted(os.listdir(tmp_path)) == ["step-000000005", "step-000000006.damaged"]


def rewrite(folder, change):
    """A manifest that says something else, with the right checksum of its own."""
    path = folder / "step-000000012" / "manifest.json"
    body = json.loads(path.read_text())["body"]
    change(body)
    path.write_text(json.dumps({"sha256": checkpoint._digest_of(body), "body": body}))


@pytest.mark.parametrize("changed", [{"format": 2}, {"workers": 8}])
def test_another_format_or_another_size_is_not_loaded(changed, tmp_path):
    save(tmp_path)
    rewrite(tmp_path, lambda body: body.update(changed))
    loaded, (complaint, last) = load(tmp_path)
    assert loaded is None and "not 1 with 4" in complaint and "starting afresh" in last


def test_a_file_without_a_sum_is_damage(tmp_path):
    """A pickle, or anything else that was put there, is never read."""
    save(tmp_path)
    rewrite(tmp_path, lambda body: body["sha256"].pop("worker-00001.safetensors"))
    loaded, (complaint, _) = load(tmp_path)
    assert loaded is None and "worker-00001.safetensors" in complaint


def test_a_changed_number_in_the_manifest_is_damage(tmp_path):
    save(tmp_path)
    path = tmp_path / "step-000000012" / "manifest.json"
    text = path.read_text()
    assert '"count": 3' in text
    path.write_text(text.replace('"count": 3', '"count": 7'))
    assert load(tmp_path)[0] is None
