"""Where a run's processes start: here, on this machine, or in a SLURM job by way of submitit. Every one of them is `run.py` itself.

A task of a job turns into run.py by exec, so SLURM's signals and its exit code (cli.py) are the run's own; of a job whose process was
killed the others' is 1. Every command ends in launch=inprocess: what an experiment file says of launching is for the first process alone.

After srun the batch script asks for the job again when the largest code is above 128, up to `launch.max_requeues` times; the run goes on
from its last checkpoint. SLURM itself does so when a node fails. What is cancelled stays cancelled: SLURM ends the script too.
"""

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import submitit
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

RUN = Path(__file__).parents[2] / "run.py"
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "FORGOTTEN", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")


@dataclasses.dataclass
class Command:
    """run.py with these words, as one process of a job."""

    words: list[str]

    def __call__(self) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        # run.py takes the GPU of its local rank; all stay visible, so that they can talk to each other
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, "-u", str(RUN), *self.words])


def processes(cfg: DictConfig) -> int:
    """How many processes the run will have. ValueError for nonsense."""
    given = cfg.launch
    least = {"local": {"processes": 1}, "slurm": {"nodes": 1, "tasks": 1, "gpus": 0, "minutes": 1, "signal_seconds": 0, "max_requeues": 0,
             "parallel": 1, "cpus": 1}}.get(given.name, {})  # fmt: skip
    for name, low in least.items():
        value = given[name]
        if not (name == "cpus" and value is None) and (not isinstance(value, int) or isinstance(value, bool) or value < low):
            raise ValueError(f"launch.{name}={value}: a whole number >= {low}")
    for name in ("setup", "srun") if given.name == "slurm" else ():
        if not all(isinstance(word, str) for word in given[name]):
            raise ValueError(f"launch.{name}={list(given[name])}: a list of words")
    if given.name == "local":
        return given.processes
    return given.nodes * given.tasks if given.name == "slurm" else int(os.environ.get("WORLD_SIZE", 1))


def typed(whom: str) -> list[str]:
    """The words of this job as they were typed, ${...} and all: those for the `task`, or those for `hydra`, without how it is to run."""
    words = OmegaConf.to_container(HydraConfig.get().overrides, resolve=False)[whom]
    return [word for word in words if not word.lstrip("+").startswith("hydra.mode=")]


def command() -> Command:
    """This job of Hydra's, to be run elsewhere: with the config folders it was given and the words that Hydra reads."""
    running = HydraConfig.get()
    words = []
    for source in running.runtime.config_sources:
        flag = {"main": "--config-path", "command-line": "--config-dir"}.get(source.provider)
        if flag and not (flag == "--config-path" and Path(source.path) == RUN.parent / "configs"):
            words.append(f"{flag}={Path(source.path).absolute()}")
    if running.job.config_name != "config":
        words.append(f"--config-name={running.job.config_name}")
    words += typed("hydra")
    words += [word for word in typed("task") if not re.match(r"[+~]*launch([.=/@]|$)", word)]
    return Command([*words, "launch=inprocess"])


def stopping() -> list[signal.Signals]:
    """The signals on which a run saves and stops; a terminal that closes is none under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, *hangup]


def threads(count: int) -> int:
    """Of each of `count` processes on this machine: the cores that we may use, shared out."""
    return max(1, len(os.sched_getaffinity(0)) // count)


def local(cfg: DictConfig, words: list[str]) -> tuple[int, int]:
    """run.py in `launch.processes` processes of this machine; the exit code of the run, and the signal that ended it, or 0.

    Signals go on to all; when one process dies the others are ended. OSError where none can be started.
    """
    count = cfg.launch.processes
    if cfg.cluster.threads is None:
        words = [*words, f"cluster.threads={threads(count)}"]
        cores = len(os.sched_getaffinity(0))
        said = f"processes = {count}, threads of each = {threads(count)}, cores = {cores}; cluster.threads=N for others"
        print(f"launch=local: {said}", flush=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children, given, late = [], [0], []

    def forward(number, frame):
        given[0] = given[0] or number * (frame is not None)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in stopping()}
    try:
        for rank in range(count):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": port}  # fmt: skip
            environment = os.environ | {name: str(value) for name, value in ranks.items()}
            # in a session of its own: Ctrl-C comes once, from here
            try:
                children.append(subprocess.Popen([sys.executable, str(RUN), *words], env=environment, start_new_session=True))
            except OSError as error:
                raise OSError(f"process {rank} of {count} does not start ({error.strerror}): lower launch.processes") from None
        deadline = None
        while any(child.poll() is None for child in children):
            if deadline is None and any(child.poll() for child in children):
                deadline = time.monotonic() + 5  # the others notice by themselves, unless they hang or have not met yet
            if deadline and time.monotonic() > deadline:
                late = late or [child for child in children if child.poll() is None]
                forward(signal.SIGKILL, None)
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for child in children:
            if child.poll() is None:
                child.kill()
    # how the others ended is what happened
    codes = [child.returncode if child.returncode >= 0 else 128 - child.returncode for child in children if child not in late]
    return max(codes), given[0]


class _Executor(submitit.SlurmExecutor):
    """submitit's, which would not even write a job's file where SLURM is not installed."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def executor(launch: DictConfig, runs: str):
    """submitit's executor with everything that the launch says."""
    given = _Executor(Path(runs).absolute() / "slurm" / "%j")
    requeue = [
        "code=$?",
        f'if [ $code -gt 128 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {launch.max_requeues} ]; then',
        '    echo "run ended with $code: back into the queue"',
        '    scontrol requeue "$SLURM_JOB_ID" && sleep 60',
        "fi",
        "exit $code",
    ]
    options = {
        "nodes": launch.nodes, "ntasks_per_node": launch.tasks, "time": launch.minutes, "cpus_per_task": launch.cpus,
        "mem": launch.memory, "partition": launch.partition, "account": launch.account, "qos": launch.qos,
        "constraint": launch.constraint, "comment": launch.comment,
    }  # fmt: skip
    additional = {"requeue": True, **OmegaConf.to_container(launch.sbatch)}
    if launch.gpus:
        additional["gpus-per-node"] = launch.gpus
    here = f"export PYTHONPATH={shlex.quote(str(RUN.parent))}${{PYTHONPATH:+:$PYTHONPATH}}"  # a task's first Python must find this file
    given.update_parameters(
        job_name="slowmo", setup=[here, *launch.setup], teardown=requeue, signal_delay_s=launch.signal_seconds,
        array_parallelism=launch.parallel, additional_parameters=additional,
        # a task that hangs after another has died is killed; some versions of srun (22.05 to 23.02) do not inherit the job's CPUs
        srun_args=["--wait=30", "--open-mode=append", *([f"--cpus-per-task={launch.cpus}"] if launch.cpus else []), *launch.srun],
        **{key: value for key, value in options.items() if value is not None},
    )  # fmt: skip
    return given


def script(cfg: DictConfig) -> str:
    """The sbatch file that would be submitted."""
    given = executor(cfg.launch, cfg.runs)
    return given._make_submission_file_text(given._submitit_command_str, "")


def submit(launch: DictConfig, runs: str, commands: list[Command]) -> int:
    """Submit the runs, several as one job array; print how to watch and to cancel them. The exit code: with launch.wait the jobs' own."""
    missing = [tool for tool in ("sbatch", "srun", "scontrol", "squeue") if shutil.which(tool) is None]
    if missing:
        raise FileNotFoundError(f"no SLURM here ({', '.join(missing)} not found): submit from a login node, or choose launch=local")
    given = executor(launch, runs)
    try:
        with given.batch():
            jobs = [given.submit(command) for command in commands]
    except OSError as error:
        raise OSError(f"{Path(runs).absolute() / 'slurm'} cannot be written ({error.strerror or error}): set runs=ANOTHER_FOLDER") from None
    except Exception as error:  # submitit hands sbatch's own words on
        raise ValueError(f"sbatch refused the job: {error}") from None
    number = jobs[0].job_id.partition("_")[0]
    for job, one in zip(jobs, commands):
        print(f"job {job.job_id}: {' '.join(one.words)}\n  log of process 0: {job.paths.stdout}", flush=True)
    print(f"watch:  squeue -j {number}; tail -F {jobs[0].paths.stdout}\ncancel: scancel {number}", flush=True)
    return follow(jobs) if launch.wait else 0


def follow(jobs) -> int:
    """Print what process 0 of each job prints until all have ended; the largest of their exit codes.

    Ctrl-C leaves the jobs alone. SIGTERM, by which a script that waits for this ends it, cancels them: a run that is cancelled saves.
    """
    read, ended, pause, cancelled = dict.fromkeys(range(len(jobs)), 0), {}, 0.5, []

    def cancel(number, frame):
        cancelled.append(number)
        subprocess.run(["scancel", *{job.job_id.partition("_")[0] for job in jobs}])

    before = signal.signal(signal.SIGTERM, cancel)
    try:
        while len(ended) < len(jobs):
            time.sleep(pause)
            pause = min(5.0, 1.05 * pause)  # a column of the paper's is 35 of us asking
            for k, job in enumerate(jobs):
                if k in ended:
                    continue
                state, code = state_of(job.job_id)
                with contextlib.suppress(FileNotFoundError), open(job.paths.stdout) as file:
                    file.seek(read[k])
                    for line in file:
                        print(f"{job.job_id}: {line}" if len(jobs) > 1 else line, end="", flush=True)
                    read[k] = file.tell()
                if state in ENDED:
                    ended[k] = code or int(state != "COMPLETED")
                    print(f"job {job.job_id}: {state}", flush=True)
    except KeyboardInterrupt:
        print("the jobs go on without being followed", flush=True)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
    return 128 + cancelled[0] if cancelled else max(ended.values())


def state_of(job: str) -> tuple[str, int]:
    """SLURM's word for a job's state, and its exit code. UNKNOWN where SLURM does not answer, FORGOTTEN where it answers so."""
    done = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
    found = dict(word.partition("=")[::2] for word in done.stdout.split())
    forgotten = "Invalid job id" in done.stderr  # some minutes after its end
    return found.get("JobState", "FORGOTTEN" if forgotten else "UNKNOWN"), int(found.get("ExitCode", "0:0").partition(":")[0])
