"""A run from wherever its folder stands to its end, or to a signal, or to a NaN."""

import contextlib
import math
import os
import signal
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig

from experiments import files
from experiments.runner import launch, run_dir
from experiments.runner.build import algorithm as algorithm_of
from experiments.runner.loggers import Loggers
from experiments.runner.progress import Progress
from experiments.runner.recorder import RunRecorder
from slowmo import checkpoint
from slowmo.checkpoint import everywhere
from slowmo.cluster import Cluster
from slowmo.evaluate import evaluate, evaluate_workers
from slowmo.state import load_state_dict, state_dict
from slowmo.train import TrainingMeter, train

AGREE_EVERY = 8  # steps between the tiny all-reduces by which processes agree to stop
DIVERGED = 1000  # above every signal's number
# exit codes, besides 128 + a signal's number: see launch.py
ALONE, NAN = 1, 3
stopped_by = [0]


def execute(cfg: DictConfig, task, schedule, steps: int, path: Path) -> int:
    """Train from wherever the run's folder stands to its end, or to a signal, or to a NaN; the exit code.

    OSError or ValueError, on every rank, for a folder or a machine on which the run cannot go on.
    """
    cluster = Cluster(cfg.workers, cfg.cluster.device, cfg.cluster.timeout)
    try:
        with contextlib.ExitStack() as held:
            held.callback(task.close)
            code = _execute(cfg, task, schedule, steps, path, cluster, held)
    except OSError as error:
        if error.errno is None:  # its words name the remedy
            raise
        kind = checkpoint.PeerError if isinstance(error, checkpoint.PeerError) else OSError
        raise kind(f"{error}: when that is mended, {_again(cfg)} goes on from where it can; or set runs=ANOTHER_FOLDER") from None
    except RuntimeError as error:
        if cluster.world_size == 1 or not _lost(error):
            raise
        reason = f"another process of this run has ended, or does not answer ({str(error).splitlines()[0]})"
        print(f"error: {reason}; {_again(cfg)} goes on from the last checkpoint", file=sys.stderr, flush=True)
        return ALONE
    cluster.close()
    return code


def _execute(cfg: DictConfig, task, schedule, steps: int, path: Path, cluster: Cluster, held: contextlib.ExitStack) -> int:
    result, complaints = _open(cfg, path, cluster, held)
    if result:
        if cluster.is_main:
            if "diverged" in result:
                print(f"diverged {result['diverged']}")
            print(f"already {result['status']} at step {result['step']}, see {path / 'result.json'}; delete the folder to run it again")
        return NAN if result["status"] == "diverged" else 0
    saved, damages = checkpoint.load(path / "checkpoints", cluster)
    with everywhere(cluster):
        if not saved and cluster.is_main and (reached := run_dir.trained_to(path)):
            reason = f"{path} shows training up to step {reached} and has no whole checkpoint to go on from"
            remedy = "put one back, or start anew with resume=never (nothing is deleted)"
            raise ValueError("; ".join([*complaints, *damages, f"{reason}: {remedy}"]))
    replicas, algorithm = algorithm_of(cfg, task.model(), cluster, max(1, task.pieces // cluster.worker_size), task.loss_scale)
    meter = TrainingMeter(len(cluster.local_workers), cluster.device)
    recorder = RunRecorder(path, cfg, cluster)
    progress = Progress(steps, cluster.is_main, path / "log.txt")

    def save() -> None:
        meter.synchronize()
        found = state_dict(algorithm)
        workers = [worker | {"own.loss": meter.losses[row]} for row, worker in enumerate(found["workers"])]
        state = {key: found[key] for key in ("steps", "groups")}
        state |= {"seconds": meter.seconds, "count": meter.count, "record": recorder.state()}
        checkpoint.save(path / "checkpoints", algorithm.steps, cluster, workers, found["shared"], state)
        recorder.saved()

    for complaint in (*(f"{text}: made anew" for text in complaints), *damages):
        progress.say(complaint)
    if saved:
        _restore(saved, cluster, algorithm, meter)
        progress.say(f"resumed at step {algorithm.steps}")
    elif damages or complaints:
        progress.say("no whole checkpoint is left: starting afresh")
    for complaint in recorder.resume(saved.state["record"] if saved else None):
        progress.say(complaint)
    del saved  # nothing of it lives on
    if recorder.lacks_model(algorithm.steps):
        losses, count = meter.losses.clone(), meter.count  # an evaluation starts a new row, and this one is none
        recorder.save_model(algorithm.steps, evaluate(task, replicas, algorithm, meter, cfg.evaluate.batchnorm)[1])
        meter.losses.copy_(losses)
        meter.count = count

    loggers = Loggers(cfg, path, cluster, progress, meter, algorithm.steps)
    apart = {}  # what workers were just before the exact average that an evaluation falls behind

    def due_at(step: int) -> bool:
        return step == steps or step % cfg.evaluate.every == 0

    def before_average(step: int) -> None:
        apart.clear()
        if due_at(step):
            apart.update(evaluate_workers(task, replicas, algorithm, cfg.evaluate.band))

    def note(step: int) -> str:
        """Evaluate and write the row down; what is NaN, and no row, when the model is NaN already though no loss has shown it."""
        row, model = evaluate(task, replicas, algorithm, meter, cfg.evaluate.batchnorm)
        row |= apart or evaluate_workers(task, replicas, algorithm, cfg.evaluate.band)
        apart.clear()
        for name, what in (("validation_loss", "the validation loss of the averaged model"), ("consensus_distance", "the parameters")):
            if not math.isfinite(row[name]):
                return f"{what} ({name}) became {row[name]}"
        recorder.save_model(step, model)
        recorder.log({"step": step, "epoch": step / task.steps_per_epoch, "lr": schedule(step - 1), **row})
        progress.row(recorder.rows[-1])
        loggers.row(recorder.rows[-1])
        return ""

    status, reason = "done", ""
    with _signals(), progress, loggers:
        chosen = {key: cfg.cluster[key] for key in ("vectorize", "compile", "graph")}
        for step in train(task, replicas, algorithm, schedule, steps, cfg.seed, meter, before_average=before_average, **chosen):
            progress.step(step, schedule(step - 1), meter)
            loggers.step(step, schedule(step - 1), meter)
            last = step == steps
            due, save_due = due_at(step), last or step % cfg.checkpoint_every == 0
            meet = due or save_due or step % AGREE_EVERY == 0
            if not meet and cluster.world_size > 1:
                continue
            # the largest code of any process is everybody's, at the same step
            code = cluster.all_reduce_max(DIVERGED if meet and meter.diverged() else stopped_by[0])
            if code == DIVERGED:
                reason = min(found for found in cluster.all_gather_object(_losses(meter, cluster)) if found[1])
            elif due and (found := note(step)):
                reason = (step, found)
            if reason:
                status = "diverged"
                recorder.log({"step": step, "epoch": step / task.steps_per_epoch, "seconds": meter.seconds, "diverged": True})
                break
            if save_due or code:
                save()
            if code and not last:
                stopped_by[0], status = code, "stopped"
                break
    if status == "stopped":
        progress.say(f"{signal.Signals(stopped_by[0]).name}: saved at step {algorithm.steps}; {_again(cfg)} goes on from there")
        return 128 + stopped_by[0]
    stopped_by[0], facts = 0, {}
    if status == "diverged":
        first, what = reason
        rate = f"optimizer.lr={cfg.optimizer.lr:g} (the schedule's rate there: {schedule(first - 1):g})"
        facts["diverged"] = f"at step {first}: {what}; lower {rate}"
    else:
        if task.final:
            recorder.save_iterates(algorithm)
        facts = task.finish(run_dir.saved_models(path), cluster)
    recorder.finish(status, algorithm.steps, meter.seconds, facts)
    if status == "diverged":
        progress.say(f"diverged {facts['diverged']}")
    progress.say(f"{status}: {path / 'result.json'}")
    return NAN if status == "diverged" else 0


def _again(cfg: DictConfig) -> str:
    return "the same command" + ", without resume=never," * (cfg.resume == "never")


def _open(cfg: DictConfig, path: Path, cluster: Cluster, held: contextlib.ExitStack) -> tuple[dict | None, list[str]]:
    """Take the folder for this run alone: the result that it holds, if any, and what is damaged. Rank 0 looks, all get its answer."""
    found = None
    with everywhere(cluster):
        if cluster.is_main:
            if files.kind(path) not in (None, "a folder") and not path.is_dir():
                raise OSError(f"{path} is {files.kind(path)}, not a folder: move it away")
            path.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(files.lock(path / ".lock", wait=False, say=lambda text: print(text, flush=True)))
            except BlockingIOError:
                raise BlockingIOError(f"{path} is being written by another run: wait for it, or end it") from None
            # a job that was put back into the queue goes on, whatever its first start was told
            again = any(os.environ.get(name, "0") != "0" for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
            if cfg.resume == "never" and not again and (said := run_dir.start_anew(path)):
                print(said, flush=True)
            run_dir.check(path)
            found = run_dir.existing_result(path, cfg)
    return cluster.broadcast_object(found)


class _Workers:
    """The workers of a checkpoint that are hosted here, each read when it is asked for."""

    def __init__(self, saved: checkpoint.Checkpoint, cluster: Cluster, losses: torch.Tensor):
        self.saved, self.cluster, self.losses = saved, cluster, losses

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        found = self.saved.worker(self.cluster.local_workers[row])
        self.losses[row] = found.pop("own.loss")
        return found


def _restore(saved: checkpoint.Checkpoint, cluster: Cluster, algorithm, meter: TrainingMeter) -> None:
    with everywhere(cluster):
        workers = _Workers(saved, cluster, meter.losses)
        load_state_dict(algorithm, {"workers": workers, "shared": saved.shared, **{key: saved.state[key] for key in ("steps", "groups")}})
    meter.seconds, meter.count = saved.state["seconds"], saved.state["count"]


def _losses(meter: TrainingMeter, cluster: Cluster) -> tuple[int, str]:
    """Since which step the training loss of which worker is not finite, on this rank; an empty text where all are."""
    bad = [row for row, loss in enumerate(meter.losses.tolist()) if not math.isfinite(loss)]
    text = f"the training loss of worker {cluster.local_workers[bad[0]]} became {meter.losses[bad[0]].item()}" if bad else ""
    return int(meter.first_bad), text


def _lost(error: RuntimeError) -> bool:
    """Whether a collective failed because a peer is gone."""
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "lost a peer"))


class _signals:
    """While training, SIGTERM, SIGUSR1, Ctrl-C and a terminal that closes are noted for the loop; a second one acts as usual."""

    def __enter__(self):
        self.before = {}
        for number in launch.stopping():
            self.before[number] = signal.signal(number, self._note)

    def _note(self, number, frame):
        stopped_by[0] = number
        signal.signal(number, self.before[number])

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
