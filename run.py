"""One run, from the command line: `python run.py experiment=cifar10_small_slowmo_sgp`, or under torchrun for several processes.

The only door for Hydra. A run's folder is a function of its config: asking again resumes it or says that it is done.
"""

import hydra
from omegaconf import DictConfig

from experiments.runner import build, cli, config, launch, plan, run_dir
from experiments.runner.execute import execute
from slowmo.cluster import layout


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(_: DictConfig) -> None:
    """One job: checked, planned, and trained here or handed to whoever launches it."""
    with cli.refusing():
        composed = config.compose(launch.typed("task"))
        config.check(composed)
        cfg, here = composed.cfg, composed.cfg.launch.name == "inprocess"
        # a login node need not have the job's GPUs
        cfg.cluster.device = build.device(cfg.cluster.device, cfg.cluster.graph) if here else "cpu"
        build.arithmetic(cfg.cluster)
        task = build.build(cfg.task)
        summary, schedule, steps = plan.make(composed, task)
        path = run_dir.run_dir(composed, task)
        if cfg.outer.get("tau") and not summary["slow steps"]:
            cli.say(f"no slow step: {steps} steps end before outer.tau={cfg.outer.tau}")
        if cfg.dry_run:
            cli.say(plan.show(summary, path))
            if cfg.launch.name == "slurm":
                cli.say(launch.script(cfg))
            return
        if not (path / "result.json").exists():
            published = not task.there()
            # a first batch: data that are missing, or do not divide, are found before anything is written
            next(iter(task.batches(0, range(1), (0, layout(cfg.workers, launch.processes(cfg))[1]))))
            if published:  # they have been made just now
                summary, schedule, steps = plan.make(composed, task)
        if not here:
            cli.later(cfg, launch.command())
            return
        cli.say(f"{path}: {summary['title']}")
        for one in composed.dropped:
            cli.say(f"left out of {composed.experiment}: {one}")
        cli.meet(cfg)
        cli.ended(execute(cfg, task, schedule, steps, path))


if __name__ == "__main__":
    cli.enter(main)
