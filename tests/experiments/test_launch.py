"""Launching without a cluster: processes on this machine, the sbatch file of a plan, and what is said where SLURM is missing."""

import json
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

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slurm  # needs none, but a minute of whole processes
QUADRATIC = ("task=quadratic", "workers=4", "outer.tau=4", "base=sgp", "dtype=float64", "task.noise=0.3", "evaluate.every=10",
             "checkpoint_every=7", "cluster.threads=1")  # fmt: skip
LOCAL = ("launch=local", "launch.processes=2")


def start(*overrides, cwd, path=None):
    environment = os.environ | ({"PATH": path} if path else {})
    return subprocess.Popen([sys.executable, str(ROOT / "run.py"), *overrides], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip


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
    assert out.count("processes = 2 (2 per process)") == 1 and out.count("done: ") == 1
    assert run(*QUADRATIC, "steps=30", "runs=alone", cwd=tmp_path)[0] == 0
    np.testing.assert_allclose(iterates(tmp_path, "runs"), iterates(tmp_path, "alone"), rtol=1e-12, atol=1e-12)
    code, out, err = run(*QUADRATIC, "steps=30", *LOCAL, cwd=tmp_path)
    assert code == 0 and "already done" in out


def test_threads_are_the_cores_shared_out(tmp_path):
    words = [word for word in QUADRATIC if not word.startswith("cluster.threads")]
    cores = len(os.sched_getaffinity(0))
    share = max(1, cores // 2)
    code, out, err = run(*words, "steps=30", *LOCAL, cwd=tmp_path)
    assert (
        code == 0 and f"launch=local: processes = 2, threads of each = {share}, cores = {cores}; cluster.threads=N for others\n" in out
    ), err
    (result,) = tmp_path.glob("runs/*/seed1/result.json")
    assert json.loads(result.read_text())["hardware"]["threads"] == share


def test_a_signal_ends_a_sweep(tmp_path):
    """The first run is saved; the second never starts."""
    started = start("-m", *QUADRATIC, "steps=100000", "seed=1,2", *LOCAL, cwd=tmp_path)
    at_work(started)
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGTERM and "saved at step" in out, err
    assert re.search(r"2 jobs: 1 stopped, 1 not started\n  stopped +seed=1\n  not started +seed=2\n", out), out
    assert [path.name for path in tmp_path.glob("runs/*/*")] == ["seed1"]


def test_each_job_of_a_sweep_has_its_own_launch(tmp_path):
    code, out, err = run("-m", *QUADRATIC, "steps=30", "launch=inprocess,local", "outer.beta=0.3,0.4", "launch.processes=2", cwd=tmp_path)
    assert code == 2 and out.count("does not fit the options that are chosen") == 2 and out.count("processes = 2 (2 per process)") == 2, out
    code, out, err = run("-m", *QUADRATIC, "steps=30", "launch=local", "launch.processes=1,3,2", "runs=other", cwd=tmp_path)
    assert code == 2 and "processes = 1 (4 per process)" in out and "already done" in out and "3 jobs: 2 done, 1 refused" in out, out + err


# ---- a user's own configs, for each launcher


MINE = (
    "# @package _global_\ndefaults:\n  - override /base: sgp\n  - override /launch: %s\nworkers: 4\nsteps: 6\nouter: {tau: 3, beta: 0.25}\n"
)


@pytest.fixture
def mine(tmp_path):
    """A folder of experiments of one's own that choose a launcher themselves."""
    (tmp_path / "my configs/experiment").mkdir(parents=True)
    for launcher in ("inprocess", "local", "slurm"):
        (tmp_path / f"my configs/experiment/on_{launcher}.yaml").write_text(MINE % launcher)
    return tmp_path / "my configs"


@pytest.mark.parametrize("flag", ["--config-dir=my configs", "hydra.searchpath=['file://my configs']"])
def test_experiments_of_ones_own(flag, mine, tmp_path):
    """In this process and in children of it, which must not launch again."""
    for launcher, processes in (("inprocess", "1 (4"), ("local", "2 (2")):
        code, out, err = run(flag, f"experiment=on_{launcher}", "evaluate.every=${steps}", "outer.alpha=0.5", cwd=tmp_path)
        assert code == 0 and out.count(f"processes = {processes} per process)") == 1 and out.count("done: ") == 1, out + err
        (path,) = tmp_path.glob("runs/*/seed1")
        assert path.parent.name == f"on_{launcher},evaluate.every=__steps_,outer.alpha=0.5"
        assert "beta: 0.25" in (path / "config.yaml").read_text()
        shutil.rmtree(tmp_path / "runs")


@pytest.mark.parametrize("flag", ["--config-dir=my configs", "hydra.searchpath=['file://my configs']"])
def test_a_job_of_ones_own(flag, mine, tmp_path, pretended):
    """What a task of a SLURM job would run, from the file that submitit pickled it into."""
    sbatch = tmp_path / "bin/sbatch"
    sbatch.write_text('#!/bin/sh\necho "Submitted batch job 77"\n')
    words = [flag, "experiment=on_slurm", "launch.minutes=5", "evaluate.every=${steps}"]
    code, out, err = run(*words, cwd=tmp_path, path=pretended)
    assert code == 0, err
    (file,) = tmp_path.glob("runs/slurm/77/77_submitted.pkl")
    code = f"import pickle; print(*pickle.load(open({str(file)!r}, 'rb')).function.words, sep='\\n')"
    held = subprocess.run([sys.executable, "-c", code],
                          cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()  # fmt: skip
    kept = f"--config-dir={mine}" if flag.startswith("--") else flag
    assert held == [kept, "experiment=on_slurm", "evaluate.every=${steps}", "launch=inprocess"]
    code, out, err = run(*held, cwd=tmp_path)
    assert code == 0 and "processes = 1 (4 per process)" in out and "done: " in out, err


def test_jobs_that_ask_for_other_things_are_other_arrays(tmp_path, pretended):
    """A refused one is not submitted, and the others are."""
    (tmp_path / "bin/sbatch").write_text('#!/bin/sh\ngrep "^#SBATCH --\\(array\\|time\\)" "$1" >> asked\necho "Submitted batch job $$"\n')
    words = ("-m", *QUADRATIC, "steps=30", "launch=slurm", "launch.minutes=5,7", "outer.beta=0.1,2.0,0.2")
    code, out, err = run(*words, cwd=tmp_path, path=pretended)
    assert code == 2 and "6 jobs: 4 submitted, 2 refused" in out, out + err
    assert (tmp_path / "asked").read_text().split("\n")[:-1] == [
        "#SBATCH --array=0-1%2", "#SBATCH --time=5", "#SBATCH --array=0-1%2", "#SBATCH --time=7"]  # fmt: skip


def test_a_folder_that_cannot_be_written_is_named(tmp_path, pretended):
    (tmp_path / "file").touch()
    code, out, err = run(*QUADRATIC, "steps=30", "launch=slurm", "runs=file/runs", cwd=tmp_path, path=pretended)
    assert code == 2 and re.fullmatch("error: .*file/runs/slurm cannot be written .*: set runs=ANOTHER_FOLDER\n", err), err


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
        (("launch=local", "launch.processes=3"), "4 workers do not fit on 3 ranks"),
        (("launch=local", "launch.processes=0"), "launch.processes=0: a whole number >= 1"),
        (("launch=slurm", "launch.nodes=3"), "4 workers do not fit on 3 ranks"),
    ):
        code, out, err = run(*QUADRATIC, "steps=30", *words, cwd=tmp_path)
        assert code == 2 and expected in err and not (tmp_path / "runs").exists()


def test_without_slurm_the_error_names_what_is_missing(tmp_path):
    code, out, err = run(*QUADRATIC, "steps=30", "launch=slurm", cwd=tmp_path, path=str(tmp_path))
    assert code == 2 and "no SLURM here (sbatch, srun, scontrol, squeue not found)" in err and "launch=local" in err


@pytest.fixture
def pretended(tmp_path):
    """A PATH with programs of SLURM's names: enough to write a job's file, which asks none of them."""
    for name in ("sbatch", "srun", "scontrol", "squeue"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text('#!/bin/sh\necho "no cluster answers" >&2\nexit 1\n')
        tool.chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"


def test_the_plan_of_a_job(tmp_path):
    """The paper's ImageNet run on the paper's machines; the file is written where there is no SLURM."""
    words = ("experiment=imagenet_slowmo_sgp", "launch=slurm_dgx1", "launch.partition=dgx", "launch.comment=paper", "dry_run=true",
             "+launch.sbatch.reservation=ours", "+launch.sbatch.exclusive=true")  # fmt: skip
    code, out, err = run(*words, cwd=tmp_path, path=str(tmp_path))
    assert code == 0, err
    plan = dict(re.findall(r"^(\S.*?)  +(.*)$", out, re.M))
    assert "m = 32, processes = 256 (a worker is 8 processes)" in plan["title"] and plan["node-hours"] == "768 at most, each time"
    for line in ("--nodes=32", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=10", "--time=1440", "--partition=dgx",
                 "--comment=paper", "--reservation=ours", "--exclusive", "--requeue", "--signal=USR2@90"):  # fmt: skip
        assert f"#SBATCH {line}\n" in out, line
    assert (
        "NCCL_SOCKET_IFNAME=enp1s0f0" in out and re.search("srun .* --cpus-per-task=10 ", out) and 'scontrol requeue "$SLURM_JOB_ID"' in out
    )
    assert not (tmp_path / "runs").exists()
    cifar10 = run("experiment=cifar10_sgp", "launch=slurm_dgx1", "workers=8", "dry_run=true", cwd=tmp_path, path=str(tmp_path))[1]
    for line in ("--nodes=8", "--ntasks-per-node=1", "--gpus-per-node=1"):  # a node a worker, of which the paper's takes one GPU
        assert f"#SBATCH {line}\n" in cifar10, line


def test_what_sbatch_refuses_is_said(tmp_path, pretended):
    code, out, err = run(*QUADRATIC, "steps=30", "launch=slurm", cwd=tmp_path, path=pretended)
    assert code == 2 and "error: sbatch refused the job: " in err and "no cluster answers" in err


@pytest.fixture
def forgetful(tmp_path, pretended):
    """A cluster that takes jobs and writes down what is cancelled; `answer` is what it knows of them: nothing any more."""
    (tmp_path / "bin/sbatch").write_text('#!/bin/sh\necho "Submitted batch job 7"\n')
    (tmp_path / "bin/scancel").write_text('#!/bin/sh\necho "$@" >> cancelled\necho "JobState=CANCELLED ExitCode=0:15" > answer\n')
    (tmp_path / "bin/scancel").chmod(0o755)
    (tmp_path / "bin/scontrol").write_text('#!/bin/sh\n[ -e answer ] && exec cat answer\necho "Invalid job id specified" >&2\nexit 1\n')
    return pretended


def test_a_job_that_slurm_has_forgotten_is_not_waited_for(tmp_path, forgetful):
    code, out, err = run(*QUADRATIC, "steps=30", "launch=slurm", "launch.wait=true", cwd=tmp_path, path=forgetful)
    assert code == 1 and "job 7: FORGOTTEN\n" in out, out + err


@pytest.mark.parametrize("number, said", [(signal.SIGTERM, "job 7: CANCELLED\n"), (signal.SIGINT, "jobs go on without being followed\n")])
def test_who_waits_for_jobs_and_is_ended_cancels_them_and_ctrl_c_does_not(number, said, tmp_path, forgetful):
    (tmp_path / "answer").write_text("JobState=RUNNING ExitCode=0:0\n")
    started = start(*QUADRATIC, "steps=30", "launch=slurm", "launch.wait=true", cwd=tmp_path, path=forgetful)
    while "watch: " not in (line := started.stdout.readline()):
        assert line, started.stderr.read()
    time.sleep(1.0)
    started.send_signal(number)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 128 + number and out.endswith(said) and not err, out + err
    assert (tmp_path / "cancelled").exists() == (number == signal.SIGTERM)


def test_a_sweep_that_is_interrupted_submits_nothing(tmp_path, forgetful):
    (tmp_path / "bin/sbatch").write_text("#!/bin/sh\ntouch submitted\n")
    started = start("-m", *QUADRATIC, "steps=30", "seed=range(1,200)", "launch=slurm", cwd=tmp_path, path=forgetful)
    time.sleep(8)  # among the first of them
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGINT and "1 stopped" in out and "198 not started" in out, out + err
    assert not (tmp_path / "submitted").exists()


def test_a_rendezvous_that_fails_names_host_and_port(tmp_path):
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "LOCAL_RANK": "1"}
    started = subprocess.run([sys.executable, str(ROOT / "run.py"), *QUADRATIC, "steps=30", "cluster.timeout=2"], cwd=tmp_path,
                             env=os.environ | environment, capture_output=True, text=True, timeout=100)  # fmt: skip
    assert started.returncode == 2
    assert re.search(r"error: rank 1 of 2 on \S+ did not meet the others at 127.0.0.1:9 ", started.stderr), started.stderr
