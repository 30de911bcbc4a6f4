"""Where a run's numbers go besides its own folder's files: `logger=tensorboard`, `logger=wandb`, `logger=[tensorboard,wandb]`.

The training loss and the learning rate every `log_every` steps, each metric row when it is evaluated. A resumed run goes on in the same
place. A logger has `log(step, values)` and `close(failed)`; process 0 alone has loggers, the calls are for all.
"""

import importlib.util
import math
import uuid
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

PACKAGES = ("tensorboard", "wandb")


def chosen(cfg: DictConfig) -> str:
    """The override that chooses these loggers: of a list of choices Hydra tells nobody."""
    return f"logger=[{','.join(name for name in PACKAGES if name in cfg.logger)}]"


def check(cfg: DictConfig) -> None:
    """ValueError, with the remedy, where a logger's package is missing or `log_every` is no number of steps."""
    for name in cfg.logger:
        if name in PACKAGES and importlib.util.find_spec(name) is None:
            raise ValueError(f'logger={name} wants the package {name}: pip install -e ".[logging]"')
    if not isinstance(cfg.log_every, int) or isinstance(cfg.log_every, bool) or cfg.log_every < 1:
        raise ValueError(f"log_every={cfg.log_every}: a whole number >= 1")


class Loggers:
    """The chosen loggers of a run that stands at `step`, open within `with`. Collective."""

    def __init__(self, cfg: DictConfig, path: Path, cluster, progress, meter, step: int):
        self.cluster, self.progress, self.every = cluster, progress, cfg.log_every
        self.before, self.loggers, error = (meter.losses.sum(), meter.count), [], None
        if cluster.is_main:
            settings = OmegaConf.to_container(cfg, resolve=True)
            try:
                for node in cfg.logger.values():
                    self.loggers.append(instantiate(node)(path, settings, step))
            except Exception as failure:  # whatever a foreign library raises: all processes must end, and say why
                error = f"a logger cannot start: {str(failure.__cause__ or failure).splitlines()[0]}"
        if error := cluster.broadcast_object(error):
            raise ValueError(error)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for logger in self.loggers:
            logger.close(failed=kind is not None)

    def step(self, step: int, lr: float, meter) -> None:
        """After each step, before its evaluation: every `log_every` steps the mean loss of all workers.

        Since the last time, an evaluation, or a resume.
        """
        if step % self.every:
            return
        meter.synchronize()  # reading a loss waits for a GPU; that is training time
        total, count = self.before
        loss = (meter.losses.sum() - total) / max(meter.count - count, 1) / len(meter.losses)
        self.before = meter.losses.sum(), meter.count
        self.cluster.all_reduce(loss := loss.reshape(1))
        loss = loss.item() / self.cluster.world_size
        self.progress.write(f"step {step}  loss {loss:.6g}  lr {lr:.6g}")
        for logger in self.loggers:
            logger.log(step, {"loss": loss, "lr": lr})

    def row(self, row: dict) -> None:
        """A metric row; the losses are counted anew from here."""
        self.before = torch.zeros_like(self.before[0]), 0
        values = {name: value for name, value in row.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        for logger in self.loggers:
            logger.log(row["step"], values)


class TensorBoard:
    """Event files in the run's folder tensorboard/. What a killed run wrote beyond `step`, where it goes on, is hidden."""

    def __init__(self, path: Path, settings: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter  # half a second

        self.writer = SummaryWriter(str(path / "tensorboard"), purge_step=step + 1)
        self.writer.add_text("config", f"```yaml\n{OmegaConf.to_yaml(settings)}```", step)

    def log(self, step: int, values: dict) -> None:
        for name, value in values.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, named after the folder. Its id lies there too: a resumed run is the same run."""

    def __init__(self, path: Path, settings: dict, step: int, project: str, entity: str | None):
        import wandb

        saved = path / "wandb-id"
        if not saved.is_file():
            saved.write_text(uuid.uuid4().hex[:12])
        self.run = wandb.init(project=project, entity=entity, dir=str(path), id=saved.read_text(), resume="allow", config=settings,
                              name=f"{path.parent.name}/{path.name}")  # fmt: skip
        # wandb's own counter refuses a step twice, which a resumed run brings
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict) -> None:
        self.run.log(values | {"step": step})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
