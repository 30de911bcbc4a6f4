"""A run's folder under faults: what is damaged is made anew, what cannot be read or written is said on every rank, nothing is lost."""

import errno
import fcntl
import gc
import json
import os
import re
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from commands import Command, at_call, command, finished, signal_at_step
from omegaconf import OmegaConf
from test_run import SGP, assert_same_run, checkpoints, flip, halve, rows, strict

from experiments import files
from experiments.runner import run_dir
from slowmo.train import TrainingMeter

WORDS = (*SGP, "evaluate.keep=2")
CANARY = "nobody's business"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that nothing happened to."""
    return finished(*WORDS, cwd=tmp_path_factory.mktemp("straight"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The runs/ of a run stopped at step 23, with checkpoints of 21 and 23."""
    cwd = tmp_path_factory.mktemp("stopped")
    assert command(*WORDS, cwd=cwd, before=signal_at_step(23, signal.SIGTERM)).code == 128 + signal.SIGTERM
    return cwd / "runs"


@pytest.fixture
def half(stopped, tmp_path):
    """The folder of a copy of it."""
    shutil.copytree(stopped, tmp_path / "runs")
    return next(tmp_path.glob("runs/*/seed1"))


@pytest.fixture
def ended(straight, tmp_path):
    """The folder of a copy of the finished run."""
    folder = tmp_path / "runs" / straight.parent.name / "seed1"
    shutil.copytree(straight, folder)
    return folder


def refused(done, *words) -> None:
    """Exit code 2 on every rank, one error line, no traceback."""
    assert set(done.codes) == {2} and "Traceback" not in done.text, done.text
    assert all(word in done.err for word in words), done.err
    assert len({re.sub(r"^error: rank \d+: ", "error: ", line) for line in done.err.splitlines() if line.startswith("error: ")}) == 1, (
        done.err
    )


def assert_whole(folder, straight) -> None:
    """As if nothing had happened: iterates, rows, checkpoints, and the averaged models bit by bit."""
    for left in folder.rglob("*.damaged"):
        shutil.rmtree(left)
    assert_same_run(folder, straight)
    left, right = ({path.name: path.read_bytes() for path in (each / "models").iterdir()} for each in (folder, straight))
    assert left == right and len(right) == 2
    assert files.damaged(folder) == [] and "lost" not in strict(folder / "result.json")


# ---- errors of the machine


def failing(where, name, number, only=0, count=1, match=lambda *_: True):
    """A `before`: on rank `only` the calls of where.name that match fail with an errno, from the count-th on."""

    def before(rank):
        real, seen = getattr(where, name), [0]

        def call(*arguments, **options):
            if rank == only and match(*arguments):
                seen[0] += 1
                if seen[0] >= count:
                    raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        setattr(where, name, call)

    return before


def opening(word):
    return lambda path, *_: word in str(path)


def named(word):
    return lambda old, new, *_: word in str(new)


FAULTS = {
    "a metric row": lambda: failing(os, "open", errno.ENOSPC, match=opening("metrics.jsonl"), count=3),
    "a model": lambda: failing(os, "replace", errno.ENOSPC, match=named("models/"), count=3),
    "a checkpoint": lambda: failing(os, "fsync", errno.EIO, count=8),
    "a checkpoint of the other rank": lambda: failing(os, "fsync", errno.ENOSPC, only=1, count=3),
    "the name of a checkpoint": lambda: failing(os, "rename", errno.ESTALE, count=2),
    "final.npz": lambda: failing(os, "replace", errno.EDQUOT, match=named("final.npz")),
    "result.json": lambda: failing(os, "replace", errno.ENOSPC, match=named("result.json")),
    "config.yaml": lambda: failing(os, "replace", errno.EROFS, match=named("config.yaml")),
    "the folder": lambda: failing(os, "mkdir", errno.EACCES, match=lambda path, *_: "seed1" in str(path) or "sgp" in str(path)),
    "the lock": lambda: failing(fcntl, "lockf", errno.EIO),
    "the list of models": lambda: failing(os, "scandir", errno.EACCES, match=opening("models"), count=3),
}


OFTEN = ("a checkpoint of the other rank",)  # the others are behind the marker


@pytest.mark.parametrize("fault", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in FAULTS])
def test_what_one_rank_cannot_do_ends_all_at_once(fault, tmp_path):
    """And when it can again, the same command goes on to the same end."""
    words, begin = (*WORDS, "cluster.timeout=60"), time.monotonic()
    refused(command(*words, cwd=tmp_path, processes=2, before=FAULTS[fault]()), "[Errno ", "the same command goes on")
    assert time.monotonic() - begin < 20
    folder = finished(*words, cwd=tmp_path, processes=2)
    two = finished(*words, "runs=alone", cwd=tmp_path, processes=2)
    assert rows(folder) == rows(two) and not list(folder.rglob("*.partial")) and not list(folder.rglob("*.damaged"))
    assert {*os.listdir(folder / "models")} == {*os.listdir(two / "models")}


@pytest.mark.parametrize("number, only", [(errno.ESTALE, 0), *(pytest.param(*p, marks=pytest.mark.slow) for p in (
    (errno.ESTALE, 1), (errno.EIO, 0), (errno.EIO, 1)))])  # fmt: skip
def test_a_file_server_that_is_gone_damages_nothing(number, only, half, tmp_path, straight):
    before = failing(os, "open", number, only=only, match=opening("checkpoints/step"))
    refused(command(*WORDS, cwd=tmp_path, processes=2, before=before), os.strerror(number))
    assert checkpoints(half) == ["step-000000021", "step-000000023"]
    done = command(*WORDS, cwd=tmp_path)
    assert done.code == 0 and "resumed at step 23" in done.out
    assert_whole(half, straight)


def test_a_file_system_without_locks_is_said(straight, tmp_path):
    done = command(*WORDS, cwd=tmp_path, before=failing(fcntl, "lockf", errno.ENOLCK))
    assert done.code == 0 and "no locks on this file system" in done.out, done.text
    assert_whole(next(tmp_path.glob("runs/*/seed1")), straight)


def test_the_end_of_another_process_is_one_line(tmp_path):
    kill = lambda rank: rank and at_call(TrainingMeter, "start", 30, lambda: os.kill(os.getpid(), signal.SIGKILL))
    done = command(*WORDS, cwd=tmp_path, processes=2, before=kill)
    assert done.codes == [1, -signal.SIGKILL] and "Traceback" not in done.err
    assert "error: another process of this run has ended" in done.err and "goes on from the last checkpoint" in done.err


# ---- what lies in the folder instead of a file


def dangling(path):
    path.symlink_to("nowhere")


def looping(path):
    path.symlink_to(path.name)


def elsewhere(path):
    """A link to somebody else's file, or folder."""
    target = next(parent for parent in path.parents if parent.name == "runs") / "outside"
    if path.name in ("checkpoints", "models"):
        target.mkdir()
        (target / "precious").write_text(CANARY)
    else:
        target.write_text(CANARY)
    path.symlink_to(target)


def as_folder(path):
    path.mkdir()
    (path / "in it").write_text("x")


def as_file(path):
    path.write_text("x")


PLACES = [*run_dir.FILES, *run_dir.FOLDERS, "models/step-000000020.safetensors"]
OTHER = [(name, make, 1) for name in PLACES for make in (dangling, looping, elsewhere, os.mkfifo,
         as_file if name in run_dir.FOLDERS else as_folder)]  # fmt: skip
OTHER += [(name, make, 2) for name in (".lock", "metrics.jsonl", "checkpoints") for make in (elsewhere, os.mkfifo)]


# each place once, the others are behind the marker
@pytest.mark.parametrize("name, make, processes", [pytest.param(*case, marks=[] if k % 5 == 0 else pytest.mark.slow)
                                                   for k, case in enumerate(OTHER)])  # fmt: skip
def test_something_else_in_the_place_of_a_file(name, make, processes, half, straight, tmp_path):
    path, kept = half / name, tmp_path / "kept"
    if path.exists():
        path.rename(kept)
    make(path)
    refused(command(*WORDS, cwd=tmp_path, processes=processes, timeout=30), str(path.relative_to(tmp_path)), "move it away")
    if make is elsewhere:
        target = tmp_path / "runs" / "outside"
        assert (target / "precious" if target.is_dir() else target).read_text() == CANARY
        assert not target.is_dir() or os.listdir(target) == ["precious"]
        files.remove(path)
        if kept.exists():
            kept.rename(path)
        assert command(*WORDS, cwd=tmp_path).code == 0
        assert_whole(half, straight)


@pytest.mark.parametrize("make", [as_file, *(pytest.param(make, marks=pytest.mark.slow) for make in (os.mkfifo, dangling, looping))])
@pytest.mark.parametrize("processes", [1, 2])
def test_something_else_in_the_place_of_the_folder(make, processes, half, tmp_path):
    shutil.rmtree(half)
    make(half)
    refused(command(*WORDS, cwd=tmp_path, processes=processes, timeout=30), "seed1")


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"- 1", *(pytest.param(c, marks=pytest.mark.slow) for c in (b"{", b"a: [", b"seed: 1\n\tx: ${", b"&a [*a]"))],
)
def test_a_config_that_is_none(content, half, straight, tmp_path):
    (half / "config.yaml").write_bytes(content)
    refused(command(*WORDS, cwd=tmp_path, processes=2), "config.yaml")
    (half / "config.yaml").unlink()  # the remedy
    assert command(*WORDS, cwd=tmp_path).code == 0
    assert_whole(half, straight)


# ---- damage


def gone(path):
    path.unlink()


def binary(path):
    path.write_bytes(b"\xff\xfe" + os.urandom(100))


@pytest.mark.parametrize("damage", [flip, halve, gone, binary])
def test_rows_belong_to_the_checkpoint(damage, half, straight, tmp_path):
    damage(half / "metrics.jsonl")
    done = command(*WORDS, cwd=tmp_path)
    assert done.code == 0, done.text
    assert "metrics.jsonl was damaged: " in done.out and "of 4 rows are taken from the checkpoint" in done.out
    assert_whole(half, straight)


SEALED = ("result.json", "final.npz", "metrics.jsonl", "models/step-000000046.safetensors")


@pytest.mark.parametrize("name, damage", [pytest.param(name, damage, marks=[] if damage is once else pytest.mark.slow)
                                          for name, once in zip(SEALED, (flip, gone, halve, binary))
                                          for damage in (flip, halve, gone, binary)])  # fmt: skip
def test_a_done_run_is_checked_when_asked_again(name, damage, ended, straight, tmp_path):
    damage(ended / name)
    done = command(*WORDS, cwd=tmp_path)
    assert done.code == 0 and "already" not in done.out and "resumed at step 46" in done.out, done.text
    assert name == damage.__name__ or name in done.out or (name, damage) == ("result.json", gone)
    assert_whole(ended, straight)
    assert "already done at step 46" in command(*WORDS, cwd=tmp_path).out


def test_a_number_in_the_result_is_damage(ended, straight, tmp_path):
    path = ended / "result.json"
    path.write_text(path.read_text().replace('"step": 46,', '"step": 45,', 1))
    assert "result.json is damaged (its checksum does not match): made anew" in command(*WORDS, cwd=tmp_path).out
    assert_whole(ended, straight)


def test_a_done_run_of_version_0_1_stays_done(ended, tmp_path):
    """It has no checksums, and its checkpoints are of format 1."""
    path = ended / "result.json"
    result = json.loads(path.read_text())
    del result["sha256"]
    path.write_text(json.dumps(result))
    assert "already done at step 46" in command(*WORDS, cwd=tmp_path).out


def test_damage_that_nothing_can_mend_is_refused(ended, tmp_path):
    """The checkpoints are gone, and a row is: better no answer than a wrong one."""
    shutil.rmtree(ended / "checkpoints")
    flip(ended / "metrics.jsonl")
    refused(command(*WORDS, cwd=tmp_path, processes=2), "metrics.jsonl is damaged", "resume=never")
    assert (ended / "result.json").exists()
    assert command(*WORDS, "resume=never", cwd=tmp_path).code == 0


def test_an_older_model_that_is_gone_is_marked(ended, tmp_path):
    """No checkpoint has it: the run says so, now and in its result."""
    gone(ended / "models" / "step-000000045.safetensors")
    done = command(*WORDS, cwd=tmp_path)
    assert done.code == 0 and "models/step-000000045.safetensors is gone or damaged" in done.out
    assert strict(ended / "result.json")["lost"] == ["models/step-000000045.safetensors"]
    assert files.damaged(ended) == [] and "already done" in command(*WORDS, cwd=tmp_path).out


def test_a_fallback_makes_newer_models_anew(half, straight, tmp_path):
    """Older than the checkpoint they stay, newer they go: a stale one would stand where a new one belongs."""
    (half / "models" / "step-000000022.safetensors").write_bytes(b"of another life")
    flip(half / "checkpoints" / "step-000000023" / "rank-00000.safetensors")
    done = command(*WORDS, cwd=tmp_path, before=signal_at_step(1, signal.SIGTERM))
    assert "resumed at step 21" in done.out
    assert sorted(os.listdir(half / "models")) == ["step-000000015.safetensors", "step-000000020.safetensors"]
    assert command(*WORDS, cwd=tmp_path).code == 0
    assert_whole(half, straight)


# ---- starting anew


def test_never_resuming_moves_aside_and_deletes_nothing(ended, straight, tmp_path):
    before = {path.relative_to(ended): path.read_bytes() for path in ended.rglob("*") if path.is_file() and path.name != ".lock"}
    done = command(*WORDS, "resume=never", cwd=tmp_path)
    assert done.code == 0 and "resumed" not in done.out
    old = ended / ".old-1"
    assert before == {path.relative_to(old): path.read_bytes() for path in old.rglob("*") if path.is_file()}
    assert command(*WORDS, "resume=never", cwd=tmp_path).code == 0
    assert (ended / ".old-2" / "result.json").exists() and not (ended / ".old-2" / ".old-1").exists()
    for path in ended.glob(".old-*"):
        shutil.rmtree(path)
    assert_whole(ended, straight)


def test_a_job_that_is_put_back_into_the_queue_goes_on(half, tmp_path):
    done = command(*WORDS, "resume=never", cwd=tmp_path, environment={"SLURM_RESTART_COUNT": "1"})
    assert done.code == 0 and "resumed at step 23" in done.out and not list(half.glob(".old-*"))


def test_before_its_first_checkpoint_a_run_may_begin_again(straight, tmp_path):
    """Killed at step 6 of 7: a row of step 5 is there, and lost is nothing but time."""
    kill = lambda rank: at_call(TrainingMeter, "start", 6, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert command(*WORDS, cwd=tmp_path, before=kill).code == -signal.SIGKILL
    assert_whole(finished(*WORDS, cwd=tmp_path), straight)


def test_checkpoints_that_were_deleted_are_missed(half, tmp_path):
    shutil.rmtree(half / "checkpoints")
    refused(command(*WORDS, cwd=tmp_path), "shows training up to step 20 and has no whole checkpoint", "resume=never")
    assert rows(half)[-1]["step"] == 20


def test_resume_is_one_of_two_words(tmp_path):
    refused(command(*WORDS, "resume=maybe", cwd=tmp_path), "resume=maybe: auto goes on")


# ---- the rest


def test_a_row_at_a_slow_step_measures_workers_before_the_average(tmp_path):
    """Just after it they are equal, which says nothing."""
    distances = {row["step"]: row["consensus_distance"] for row in rows(finished(*WORDS, "evaluate.every=2", cwd=tmp_path))}
    averaged = [distances[step] for step in distances if step % 4 == 0]
    assert len(averaged) == 11 and min(averaged) > 1e-3


def test_files_honour_the_umask(tmp_path):
    folder = finished(*WORDS, cwd=tmp_path, before=lambda rank: os.umask(0o002))
    modes = {path.relative_to(folder): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 6 + 2 + 6 and set(modes.values()) == {0o664}, modes


@pytest.mark.slow
def test_a_resumed_run_takes_no_more_memory(half, tmp_path):
    """Bytes of all tensors in the process as a step begins."""

    def weigh(step, name):
        def note():
            gc.collect()
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) in
                        (torch.Tensor, torch.nn.Parameter)}  # fmt: skip
            (tmp_path / f"{name}.bytes").write_text(str(sum(storages.values())))

        return lambda rank: at_call(TrainingMeter, "start", step, note)

    finished(*WORDS, "task.dimension=200", "runs=fresh", cwd=tmp_path, before=weigh(27, "fresh"))
    stop = signal_at_step(23, signal.SIGTERM)
    assert command(*WORDS, "task.dimension=200", cwd=tmp_path, before=stop).code == 128 + signal.SIGTERM
    finished(*WORDS, "task.dimension=200", cwd=tmp_path, before=weigh(4, "resumed"))
    fresh, resumed = (int((tmp_path / f"{name}.bytes").read_text()) for name in ("fresh", "resumed"))
    assert resumed <= fresh + 512  # a counter or two


def test_where_data_are_cached_is_no_part_of_the_outcome(tmp_path):
    cfg = {
        "seed": 1,
        "task": {"data": {"root": "a", "cache": "a", "train": 3}, "num_loader_workers": 2},
        "data": {"cache": "a"},
        "resume": "auto",
    }
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(cfg)))
    other = OmegaConf.create(cfg | {"task": {"data": {"root": "b", "cache": "b", "train": 3}, "num_loader_workers": 0},
                                    "data": {"cache": "b"},
                                    "resume": "never"})  # fmt: skip
    assert run_dir.existing_result(tmp_path, other) == (None, [])
    other.task.data.train = 4
    with pytest.raises(ValueError, match="whose task.data.train differ"):
        run_dir.existing_result(tmp_path, other)


def test_a_stopped_rank_ends_the_other_by_its_timeout(tmp_path):
    """And once both are gone the run goes on."""
    words = (*WORDS, "cluster.timeout=3")
    stop = lambda rank: rank and at_call(TrainingMeter, "start", 20, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    started = Command(*words, cwd=tmp_path, processes=2, before=stop)
    try:
        end = time.monotonic() + 40
        while started.pids[0] not in started.codes and time.monotonic() < end:
            started.poll()
            time.sleep(0.02)
        assert started.codes.get(started.pids[0]) == 1
    finally:
        started.kill()
    assert "Traceback" not in Path(started.logs / "0.err").read_text()
    folder = finished(*words, cwd=tmp_path, processes=2)
    assert strict(folder / "result.json")["status"] == "done"
