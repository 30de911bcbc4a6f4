"""One run, from the command line: `python run.py experiment=photos_slowmo_sgp`, or under torchrun for several processes.

The only door for Hydra. A run's folder is a function of its config: asking again resumes it or says that it is done.
"""

import fcntl
import math
import os
import signal
import sys
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments import folder, launch, plan
from experiments.progress import Progress
from slowmo import checkpoint
from slowmo.cluster import Cluster, fold
from slowmo.replicas import Replicas
from slowmo.train import Tally, evaluate, train

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
AGREE_EVERY = 8  # steps between the tiny all-reduces by which processes agree to stop
DIVERGED = 1000  # above every signal's number
stopped_by = [0]
elsewhere = []  # what is to be launched elsewhere, of a sweep all of it


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    leading, stopped_by[0] = int(os.environ.get("RANK", 0)) == 0, 0
    if cfg.launch.name != "here" and HydraConfig.get().mode == RunMode.MULTIRUN:  # each is checked where it runs
        elsewhere.append((cfg, launch.command()))
        return
    try:
        plan.check(cfg)
        if cfg.cluster.threads:
            torch.set_num_threads(cfg.cluster.threads)
        # a login node need not have the job's GPUs
        cfg.cluster.device = plan.device(cfg.cluster.device) if cfg.launch.name == "here" else "cpu"
        task = plan.build(cfg.task)
        steps = plan.steps(cfg, task)
        schedule = plan.build(cfg.schedule, lr=cfg.optimizer.lr, steps=steps)
        summary = plan.rehearse(cfg, task, schedule, steps)
        path = folder.of(cfg, task)
        if not cfg.dry_run and not (path / "result.json").exists():
            # a first batch: data that are missing, or do not divide, are found before anything is written
            next(iter(task.batches(0, range(1), (0, fold(cfg.workers, launch.processes(cfg))[1]))))
        if leading and (cfg.dry_run or cfg.launch.name == "here"):
            print(plan.show(summary, path) if cfg.dry_run else f"{path}: {summary['title']}", flush=True)
        if cfg.dry_run and cfg.launch.name == "slurm":
            print(launch.script(cfg))
        if not cfg.dry_run and cfg.launch.name == "here":
            execute(cfg, task, schedule, steps, path)
        elif not cfg.dry_run:
            elsewhere.append((cfg, launch.command()))
    except (ValueError, OSError) as error:
        # what is wrong with the config all processes find, and one says; what is wrong on a machine may be its own
        if leading or isinstance(error, OSError) or torch.distributed.is_initialized():
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(2)
    _leave(128 + stopped_by[0] if stopped_by[0] else 0)


def execute(cfg: DictConfig, task, schedule, steps: int, path: Path) -> None:
    """Train from wherever the run's folder stands to its end, or to a signal, or to a NaN."""
    cluster = Cluster(cfg.workers, cfg.cluster.device, cfg.cluster.timeout)
    lock = _lock(path, cluster)
    if result := folder.earlier(path, cfg, cluster):
        if cluster.leader:
            print(f"already {result['status']} at step {result['step']}, see {path / 'result.json'}; delete the folder to run it again")
        return
    replicas = Replicas(task.model(), cluster, accumulate=max(1, task.pieces // cluster.node), loss_scale=task.loss_scale)
    optimizer = plan.build(cfg.optimizer, [replicas.rows])
    algorithm = plan.build(cfg.base, replicas, optimizer)
    if cfg.outer.get("_target_"):
        algorithm = plan.build(cfg.outer, algorithm)
    tally = Tally(len(cluster.ranks), cluster.device)
    book = folder.Book(path, cfg, cluster)
    progress = Progress(steps, cluster.leader)

    def save() -> None:
        tally.settle()
        rows, shared = algorithm.state()
        own = {"buffers": replicas.buffers(), "losses": tally.losses.unsqueeze(1)}
        state = {"step": algorithm.steps, "seconds": tally.seconds, "count": tally.count}
        checkpoint.save(path / "checkpoints", algorithm.steps, cluster, rows, own, shared, state)

    loaded, complaints = checkpoint.load(path / "checkpoints", cluster)
    for complaint in complaints:
        progress.say(complaint)
    if loaded:
        rows, own, shared, state = loaded
        algorithm.load(rows, shared)
        replicas.load_buffers(own["buffers"])
        tally.losses.copy_(own["losses"][:, 0])
        tally.seconds, tally.count = state["seconds"], state["count"]
        progress.say(f"resumed at step {algorithm.steps}")
    book.open(algorithm.steps)

    def note(step: int) -> bool:
        """Evaluate and write the row down; False, and no row, when the model is NaN already though no loss has shown it."""
        row, model = evaluate(task, replicas, algorithm, tally, cfg.evaluate.batchnorm, cfg.evaluate.worker_samples)
        if not (math.isfinite(row["validation_loss"]) and math.isfinite(row["spread"])):
            return False
        book.keep(step, model)
        book.add({"step": step, "epoch": step / task.steps_per_epoch, "lr": schedule(step - 1), **row})
        progress.row(book.rows[-1])
        return True

    status = "done"
    with _signals(), progress:
        for step in train(task, replicas, algorithm, schedule, steps, cfg.seed, tally):
            progress.step(step, schedule(step - 1), tally)
            last = step == steps
            due, save_due = last or step % cfg.evaluate.every == 0, last or step % cfg.checkpoint_every == 0
            meet = due or save_due or step % AGREE_EVERY == 0
            if not meet and cluster.processes > 1:
                continue
            # the largest code of any process is everybody's, at the same step
            code = cluster.max_flag(DIVERGED if meet and tally.diverged() else stopped_by[0])
            if code == DIVERGED or due and not note(step):
                status = "diverged"
                book.add({"step": step, "epoch": step / task.steps_per_epoch, "seconds": tally.seconds, "diverged": True})
                break
            if save_due or code:
                save()
            if code and not last:
                stopped_by[0], status = code, "stopped"
                break
    if status == "stopped":
        progress.say(f"{signal.Signals(stopped_by[0]).name}: saved at step {algorithm.steps}; the same command goes on from there")
    else:
        stopped_by[0] = 0
        if task.final and status == "done":
            book.final(algorithm)
        book.close(status, algorithm.steps, tally.seconds, task.finish(folder.kept(path), cluster) if status == "done" else {})
        progress.say(f"{status}: {path / 'result.json'}")
    if lock:
        lock.close()
    cluster.close()


def send() -> int:
    """Launch what is to run elsewhere; the exit code."""
    cfg, commands = elsewhere[0][0], [command for _, command in elsewhere]
    try:
        if cfg.launch.name == "slurm":
            return launch.submit(cfg.launch, cfg.runs, commands)
        return max(launch.local(cfg.launch.processes, command.overrides) for command in commands)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _leave(code: int) -> None:
    """Give back the exit code. With gloo that means at once: its threads now and then abort a regular exit (PyTorch issue 190489)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


class _signals:
    """While training, SIGTERM, SIGUSR1 and Ctrl-C are noted for the loop; a second one acts as usual."""

    def __enter__(self):
        self.before = {}
        for number in SIGNALS:
            self.before[number] = signal.signal(number, self._note)

    def _note(self, number, frame):
        stopped_by[0] = number
        signal.signal(number, self.before[number])

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _lock(path: Path, cluster: Cluster):
    """One run a folder at a time: process 0 holds a lock that the kernel drops when it ends, however it ends. BlockingIOError for all."""
    file, free = None, True
    if cluster.leader:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / ".lock", "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loaders, forked later, would hold that on
        except BlockingIOError:
            free = False
    if not cluster.broadcast_object(free):
        raise BlockingIOError(f"{path} is being written by another run: wait for it, or end it")
    return file


if __name__ == "__main__":
    main()
    if elsewhere:
        sys.exit(send())
