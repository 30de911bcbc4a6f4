"""Runs in jobs of a real SLURM on this machine: submitted, preempted, killed, out of time, swept. pytest -m slurm

Each ends as the run in one process does. What needs no SLURM is in test_launch.py.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
# some seconds of work; neither evaluations nor checkpoints fall on slow steps
QUADRATIC = ("task=quadratic", "workers=4", "outer.tau=4", "base=sgp", "dtype=float64", "task.noise=0.3", "optimizer.momentum=0.9",
             "checkpoint_every=30", "evaluate.every=50", "cluster.threads=1", "steps=700")  # fmt: skip
TWO_BY_TWO = ("launch=slurm", "launch.nodes=2", "launch.tasks=2")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster of two nodes."""
    if os.getuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        pytest.skip("SLURM cannot be started here: root, and Debian's slurm-wlm and munge, are needed")
    folder, script = tmp_path_factory.mktemp("slurm") / "s", ROOT / "scripts/local_slurm.sh"
    started = subprocess.run([script, "start", "2", folder], capture_output=True, text=True, env={**os.environ, "PORT": "18817"})
    assert started.returncode == 0, started.stderr
    os.environ["SLURM_CONF"] = started.stdout.partition("=")[2].strip()
    yield
    del os.environ["SLURM_CONF"]
    subprocess.run([script, "stop", folder], check=True)


def run(*overrides, cwd):
    return subprocess.run([sys.executable, str(ROOT / "run.py"), *overrides], cwd=cwd, capture_output=True, text=True, timeout=300)


def submit(*overrides, cwd) -> str:
    """A job's number."""
    done = run(*overrides, cwd=cwd)
    assert done.returncode == 0, done.stderr
    number = re.search(r"^job (\d+)", done.stdout, re.M)[1]
    assert f"watch:  squeue -j {number}; tail -F " in done.stdout and f"cancel: scancel {number}" in done.stdout
    assert re.search(rf"log of process 0: \S+/{number}\S*_0_log.out", done.stdout)
    return number


def facts(job) -> dict[str, str]:
    done = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True)
    return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)


def until(true, seconds, what):
    end = time.monotonic() + seconds
    while not (answer := true()):
        assert time.monotonic() < end, f"{what()} after {seconds} s"
        time.sleep(0.2)
    return answer


def log(cwd, job, rank=0, kind="out") -> str:
    return "".join(path.read_text() for path in Path(cwd).rglob(f"{job}_{rank}_log.{kind}"))


def ended(cwd, job, seconds=240) -> dict[str, str]:
    final = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
    return until(lambda: (now := facts(job))["JobState"] in final and now, seconds, lambda: log(cwd, job) + log(cwd, job, 0, "err"))


def reached(cwd, job, step) -> None:
    """Wait for a metric row of this step or a later one."""
    def there():
        return any(int(found) >= step for found in re.findall(r"^ *(?:step )?(\d+)/", log(cwd, job), re.M))

    until(there, 120, lambda: log(cwd, job) + log(cwd, job, 0, "err"))


def iterates(cwd) -> dict[str, np.ndarray]:
    (path,) = (path for path in Path(cwd).glob("runs/*/seed1/final.npz"))
    with np.load(path) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run in one process."""
    cwd = tmp_path_factory.mktemp("straight")
    done = run(*QUADRATIC, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return iterates(cwd)


def assert_equal(cwd, straight):
    ours = iterates(cwd)
    for name in straight:
        np.testing.assert_allclose(ours[name], straight[name], rtol=1e-12, atol=1e-12)
    assert not list(Path(cwd).rglob("*partial*"))


def test_submit_pictures_on_two_nodes(slurm, tmp_path):
    words = ("experiment=cifar10_small_slowmo_sgp", "workers=4", "steps=26", "task.batch_size=16", "task.width=4", "data.train=200",
             "dtype=float64", "data.validation=30", f"data.root={tmp_path}", "evaluate.every=10", "outer.tau=4",
             "cluster.vectorize=false")  # fmt: skip
    alone = run(*words, "runs=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    job = submit(*words, *TWO_BY_TWO, cwd=tmp_path)
    assert ended(tmp_path, job)["JobState"] == "COMPLETED", log(tmp_path, job, 0, "err")
    model = "cifar10_small*/seed1/models/step-000000026.safetensors"
    left, right = (load_file(next(tmp_path.glob(f"{runs}/{model}"))) for runs in ("runs", "alone"))
    for name in right:
        np.testing.assert_allclose(left[name].numpy(), right[name].numpy(), rtol=1e-12, atol=1e-12)
    assert all("Starting with JobEnvironment" in log(tmp_path, job, rank) for rank in range(4))  # each its own log
    assert log(tmp_path, job).count("done: ") == 1 and not any("done: " in log(tmp_path, job, rank) for rank in (1, 2, 3))


@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_preempted(name, slurm, straight, tmp_path):
    job = submit(*QUADRATIC, *TWO_BY_TWO, cwd=tmp_path)
    reached(tmp_path, job, 100)
    subprocess.run(["scancel", f"--signal={name}", job], check=True)
    final = ended(tmp_path, job)
    assert (final["JobState"], final["Restarts"]) == ("COMPLETED", "1")
    said = log(tmp_path, job)
    assert re.search(rf"SIG{name}: saved at step (\d+)", said)[1] == re.search(r"resumed at step (\d+)", said)[1]
    assert_equal(tmp_path, straight)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_task_is_killed(rank, slurm, straight, tmp_path):
    job = submit(*QUADRATIC, *TWO_BY_TWO, cwd=tmp_path)
    reached(tmp_path, job, 100)
    (pid,) = (path.parent.name for path in Path("/proc").glob("[0-9]*/environ") if of_job(path, job, rank))
    os.kill(int(pid), signal.SIGKILL)
    until(lambda: facts(job)["Restarts"] == "1", 60, lambda: facts(job))
    final = ended(tmp_path, job)
    assert (final["JobState"], final["Restarts"]) == ("COMPLETED", "1")
    assert "run ended with 137: back into the queue" in log(tmp_path, job) and "resumed at step" in log(tmp_path, job)
    assert_equal(tmp_path, straight)


def of_job(path, job, rank) -> bool:
    try:
        words = set(path.read_bytes().split(b"\0"))
        ours = {f"SLURM_JOB_ID={job}".encode(), f"RANK={rank}".encode()} <= words
        return ours and b"run.py" in (path.parent / "cmdline").read_bytes()
    except OSError:
        return False


def test_requeued_by_hand(slurm, straight, tmp_path):
    job = submit(*QUADRATIC, *TWO_BY_TWO, cwd=tmp_path)
    reached(tmp_path, job, 100)
    subprocess.run(["scontrol", "requeue", job], check=True)
    final = ended(tmp_path, job)
    assert (final["JobState"], final["Restarts"]) == ("COMPLETED", "1") and "resumed at step" in log(tmp_path, job)
    assert_equal(tmp_path, straight)


def test_out_of_time(slurm, tmp_path):
    """A minute is SLURM's shortest limit, and its signals come up to half a minute early."""
    longer = tuple(word for word in QUADRATIC if not word.startswith("steps=")) + ("steps=2500",)
    alone = tmp_path / "alone"
    alone.mkdir()
    assert run(*longer, cwd=alone).returncode == 0
    job = submit(*longer, *TWO_BY_TWO, "launch.minutes=1", "launch.signal_seconds=15", "launch.max_requeues=100", cwd=tmp_path)
    final = ended(tmp_path, job, 500)
    assert final["JobState"] == "COMPLETED" and int(final["Restarts"]) >= 1
    assert "SIGUSR2: saved at step" in log(tmp_path, job)
    shutil.move(alone, alone := tmp_path.parent / f"{tmp_path.name}-alone")
    assert_equal(tmp_path, iterates(alone))


def test_not_more_often_than_asked(slurm, tmp_path):
    job = submit(*QUADRATIC, *TWO_BY_TWO, "launch.max_requeues=0", cwd=tmp_path)
    reached(tmp_path, job, 50)
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    final = ended(tmp_path, job)
    assert (final["JobState"], final["Restarts"]) == ("FAILED", "0") and "back into the queue" not in log(tmp_path, job)


def test_cancelled_stays_cancelled(slurm, tmp_path):
    job = submit(*QUADRATIC, *TWO_BY_TWO, cwd=tmp_path)
    reached(tmp_path, job, 50)
    subprocess.run(["scancel", job], check=True)
    until(lambda: facts(job)["JobState"] == "CANCELLED", 60, lambda: facts(job))
    time.sleep(8)
    assert facts(job)["JobState"] == "CANCELLED" and facts(job)["Restarts"] == "0"


def test_a_sweep_is_one_array(slurm, tmp_path):
    """Four runs, one of them nonsense: it is not submitted, and the others finish."""
    words = [word for word in QUADRATIC if not word.startswith(("outer.tau", "steps"))]
    done = run("-m", *words, "steps=40", "outer.tau=4,0,5,6", "launch=slurm", cwd=tmp_path)
    assert done.returncode == 2 and "4 jobs: 3 submitted, 1 refused" in done.stdout and "error: tau=0" in done.stderr
    job = re.search(r"^job (\d+)", done.stdout, re.M)[1]
    states = [ended(tmp_path, f"{job}_{k}") for k in range(3)]
    assert [state["JobState"] for state in states] == ["COMPLETED"] * 3
    assert {state["ArrayJobId"] for state in states} == {job} and {state["Restarts"] for state in states} == {"0"}
    assert len(list(tmp_path.glob("runs/*/seed1/result.json"))) == 3


def test_what_a_job_finds_wrong_is_collected(slurm, tmp_path):
    """Data that are there for the login node and not for the job: it fails once, in its own words."""
    np.savez(tmp_path / "problem.npz", A=np.ones((4, 1, 1)), b=np.ones((4, 1)), x0=np.ones(1))
    words = [word for word in QUADRATIC if not word.startswith("steps")]
    setup = f"launch.setup=['rm -f {tmp_path}/problem.npz']"
    job = submit(*words, "steps=40", "task.problem=problem.npz", "launch=slurm", setup, cwd=tmp_path)
    state = ended(tmp_path, job)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0")
    assert "error: task.problem=problem.npz" in log(tmp_path, job, 0, "err")
    collected = subprocess.run([sys.executable, "-m", "results", "collect", "--runs", tmp_path / "runs", "--out", tmp_path / "runs.csv"],
                               capture_output=True, text=True, cwd=ROOT)  # fmt: skip
    assert f"job {job}: task.problem=problem.npz" in collected.stdout + collected.stderr


def test_a_run_that_diverged_is_not_queued_again(slurm, tmp_path):
    job = submit(*QUADRATIC, *TWO_BY_TWO, "optimizer.lr=50", cwd=tmp_path)
    final = ended(tmp_path, job)
    assert (final["JobState"], final["ExitCode"], final["Restarts"]) == ("FAILED", "3:0", "0") and "diverged " in log(tmp_path, job)


def test_waiting_follows_the_log(slurm, tmp_path):
    words = [word for word in QUADRATIC if not word.startswith("steps")]
    done = run(*words, "steps=60", "launch=slurm", "launch.wait=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "  50/60 " in done.stdout and re.search(r"job \d+: COMPLETED", done.stdout), done.stdout
    failed = run(*words, "steps=60", "launch=slurm", "launch.wait=true", "launch.setup=['exit 3']", "runs=other", cwd=tmp_path)
    assert failed.returncode == 3 and "FAILED" in failed.stdout


def test_who_waits_and_is_ended_cancels_the_job_which_saves(slurm, tmp_path):
    words = [sys.executable, str(ROOT / "run.py"), *QUADRATIC, "steps=1000000", "launch=slurm", "launch.wait=true"]
    started = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not re.search(r"\d+/1000000 ", line := started.stdout.readline()):
        assert line
    started.terminate()
    said, _ = started.communicate(timeout=100)
    assert started.returncode == 128 + signal.SIGTERM and "saved at step" in said and "CANCELLED" in said, said
