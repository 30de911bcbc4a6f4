"""One run, from the command line: `python run.py experiment=photos_slowmo_sgp`, or under torchrun for several processes.

The only door for Hydra. A run's folder is a function of its config: asking again resumes it or says that it is done.
"""

import os
import sys

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.runner import launch, plan, run_dir
from experiments.runner.execute import execute, stopped_by
from slowmo.checkpoint import PeerError
from slowmo.cluster import fold

elsewhere = []  # what is to be launched elsewhere, of a sweep all of it


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    leading, stopped_by[0], code = int(os.environ.get("RANK", 0)) == 0, 0, 0
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
        path = run_dir.run_dir(cfg, task)
        if not cfg.dry_run and not (path / "result.json").exists():
            # a first batch: data that are missing, or do not divide, are found before anything is written
            next(iter(task.batches(0, range(1), (0, fold(cfg.workers, launch.processes(cfg))[1]))))
        if leading and (cfg.dry_run or cfg.launch.name == "here"):
            print(plan.show(summary, path) if cfg.dry_run else f"{path}: {summary['title']}", flush=True)
        if cfg.dry_run and cfg.launch.name == "slurm":
            print(launch.script(cfg))
        if not cfg.dry_run and cfg.launch.name == "here":
            code = execute(cfg, task, schedule, steps, path)
        elif not cfg.dry_run:
            elsewhere.append((cfg, launch.command()))
    except (ValueError, OSError) as error:
        # what is wrong with the config all processes find, and one says; what is wrong on a machine may be its own
        if leading or isinstance(error, OSError) and not isinstance(error, PeerError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(2)
    _leave(code)


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


if __name__ == "__main__":
    main()
    if elsewhere:
        sys.exit(send())
