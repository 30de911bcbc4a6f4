"""Launching without a cluster: processes on this machine, the sbatch file of a plan, and what is said where SLURM is missing."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slurm  # needs none, but a minute of whole processes
QUADRATIC = ("task=quadratic", "workers=4", "outer.tau=4", "base=sgp", "dtype=float64", "task.noise=0.3", "evaluate.every=10",
             "checkpoint_every=7", "cluster.threads=1")  # fmt: skip
LOCAL = ("launch=local", "launch.processes=2")


def start(*overrides, cwd, path=None):
    environment = os.environ | ({"PATH": path} if path else {})
    return subprocess.Popen([sys.executable, str(ROOT / "run.py"), *overrides], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def run(*overrides, **options):
    started = start(*overrides, **options)
    out, err = started.communicate(timeout=120)
    return started.returncode, out, err


def iterates(cwd, runs):
    (path,) = Path(cwd).glob(f"{runs}/*/seed1/final.npz")
    with np.load(path) as archive:
        return archive["x"]


def test_processes_on_this_machine(tmp_path):
    code, out, err = run(*QUADRATIC, "steps=30", *LOCAL, cwd=tmp_path)
    assert code == 0, err
    assert out.count("processes = 2 (2 a process)") == 1 and out.count("done: ") == 1
    assert run(*QUADRATIC, "steps=30", "runs=alone", cwd=tmp_path)[0] == 0
    np.testing.assert_allclose(iterates(tmp_path, "runs"), iterates(tmp_path, "alone"), rtol=1e-12, atol=1e-12)
    code, out, err = run(*QUADRATIC, "steps=30", *LOCAL, cwd=tmp_path)
    assert code == 0 and "already done" in out


def ranks(started) -> dict[int, int]:
    """{rank: pid} of the processes that a command has started and that train."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            parent = re.search(r"PPid:\s+(\d+)", (path.parent / "status").read_text())[1]
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", path.read_bytes())
        except OSError:
            continue
        if int(parent) == started.pid and rank:
            found[int(rank[1])] = int(path.parent.name)
    return found


def at_work(started) -> str:
    """Read until the first metric row."""
    said = ""
    while not re.search(r"^step ", said, re.M):
        line = started.stdout.readline()
        assert line, started.stderr.read()
        said += line
    return said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_goes_to_all(number, tmp_path):
    started = start(*QUADRATIC, "steps=100000", *LOCAL, cwd=tmp_path)
    at_work(started)
    started.send_signal(number)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 128 + number and "saved at step" in out, err


@pytest.mark.parametrize("early", [False, True])
def test_when_a_process_is_killed_the_others_end(early, tmp_path):
    """early: before they have met, where nothing tells the other that it waits for a dead process (it waited for 30 s)."""
    started = start(*QUADRATIC, "steps=100000", *LOCAL, cwd=tmp_path)
    if early:
        while len(ranks(started)) < 2:
            assert started.poll() is None
            time.sleep(0.01)
    else:
        at_work(started)
    pids, begin = ranks(started), time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGKILL and time.monotonic() - begin < 25
    assert not Path(f"/proc/{pids[0]}").exists()


def test_nonsense_is_refused_before_anything_starts(tmp_path):
    for words, expected in (
        (("launch=local", "launch.processes=3"), "4 workers do not fold onto 3 processes"),
        (("launch=local", "launch.processes=0"), "launch.processes=0: a whole number >= 1"),
        (("launch=slurm", "launch.nodes=3"), "4 workers do not fold onto 3 processes"),
    ):
        code, out, err = run(*QUADRATIC, "steps=30", *words, cwd=tmp_path)
        assert code == 2 and expected in err and not (tmp_path / "runs").exists()


def test_without_slurm_the_error_names_what_is_missing(tmp_path):
    for words in ((), ("dry_run=true",)):
        code, out, err = run(*QUADRATIC, "steps=30", "launch=slurm", *words, cwd=tmp_path, path=str(tmp_path))
        assert code == 2 and "no SLURM here (sbatch, srun, scontrol, squeue not found)" in err and "launch=local" in err


@pytest.fixture
def pretended(tmp_path):
    """A PATH with programs of SLURM's names: enough to write a job's file, which asks none of them."""
    for name in ("sbatch", "srun", "scontrol", "squeue"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text("#!/bin/sh\necho \"no cluster answers\" >&2\nexit 1\n")
        tool.chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


def test_the_plan_of_a_job(tmp_path, pretended):
    """The paper's ImageNet run on the paper's machines."""
    words = ("experiment=imagenet_slowmo_sgp", "launch=slurm_dgx1", "launch.partition=dgx", "launch.comment=paper", "dry_run=true",
             "+launch.sbatch.reservation=ours", "+launch.sbatch.exclusive=true")  # fmt: skip
    code, out, err = run(*words, cwd=tmp_path, path=pretended)
    assert code == 0, err
    plan = dict(re.findall(r"^(\S.*?)  +(.*)$", out, re.M))
    assert "m = 32, processes = 256 (a worker is 8 processes)" in plan["title"] and plan["node-hours at most, each time"] == "768"
    for line in ("--nodes=32", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=10", "--time=1440", "--partition=dgx",
                 "--comment=paper", "--reservation=ours", "--exclusive", "--requeue", "--signal=USR2@90"):  # fmt: skip
        assert f"#SBATCH {line}\n" in out, line
    assert "NCCL_SOCKET_IFNAME=enp1s0f0" in out and "srun " in out and 'scontrol requeue "$SLURM_JOB_ID"' in out
    assert not (tmp_path / "runs").exists()
    wmt = run("experiment=cifar10_sgp", "launch=slurm_dgx1", "workers=8", "dry_run=true", cwd=tmp_path, path=pretended)[1]
    assert "#SBATCH --nodes=8\n" in wmt  # a node a worker


def test_what_sbatch_refuses_is_said(tmp_path, pretended):
    code, out, err = run(*QUADRATIC, "steps=30", "launch=slurm", cwd=tmp_path, path=pretended)
    assert code == 2 and "error: sbatch refused the job: " in err and "no cluster answers" in err


def test_a_rendezvous_that_fails_names_host_and_port(tmp_path):
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "LOCAL_RANK": "1"}
    started = subprocess.run([sys.executable, str(ROOT / "run.py"), *QUADRATIC, "steps=30", "cluster.timeout=2"], cwd=tmp_path,
                             env=os.environ | environment, capture_output=True, text=True, timeout=100)  # fmt: skip
    assert started.returncode == 2
    assert re.search(r"error: process 1 of 2 on \S+ did not meet the others at 127.0.0.1:9 ", started.stderr), started.stderr
