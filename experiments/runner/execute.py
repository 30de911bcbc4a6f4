"""A run from wherever its folder stands to its end, or to a signal, or to a NaN."""

import fcntl
import math
import signal
from pathlib import Path

from omegaconf import DictConfig

from experiments.runner import folder, plan
from experiments.runner.loggers import Loggers
from experiments.runner.progress import Progress
from slowmo import checkpoint
from slowmo.cluster import Cluster
from slowmo.replicas import Replicas
from slowmo.train import Tally, evaluate, train

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
AGREE_EVERY = 8  # steps between the tiny all-reduces by which processes agree to stop
DIVERGED = 1000  # above every signal's number
stopped_by = [0]


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
    progress = Progress(steps, cluster.leader, path / "log.txt")

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
    loggers = Loggers(cfg, path, cluster, progress, tally, algorithm.steps)

    def note(step: int) -> bool:
        """Evaluate and write the row down; False, and no row, when the model is NaN already though no loss has shown it."""
        row, model = evaluate(task, replicas, algorithm, tally, cfg.evaluate.batchnorm, cfg.evaluate.worker_samples)
        if not (math.isfinite(row["validation_loss"]) and math.isfinite(row["spread"])):
            return False
        book.keep(step, model)
        book.add({"step": step, "epoch": step / task.steps_per_epoch, "lr": schedule(step - 1), **row})
        progress.row(book.rows[-1])
        loggers.row(book.rows[-1])
        return True

    status = "done"
    with _signals(), progress, loggers:
        for step in train(task, replicas, algorithm, schedule, steps, cfg.seed, tally):
            progress.step(step, schedule(step - 1), tally)
            loggers.step(step, schedule(step - 1), tally)
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
