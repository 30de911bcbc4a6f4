"""Table 2 over real sockets: `python -m benchmarks.table2 [benchmark=wmt16] [benchmark.hosts=8 ...]`; to results/mine/data/links.csv.

Every row is an experiment's own base and outer (`slowmo_sgp,outer.tau=12`: with another τ) over rows of the emulated size, one worker a
process, over gloo; `local_sgd,outer=streaming`: with another outer. Buckets are sent during backward, or after it (`slowmo_sgp_after`).
What a step computes is the experiment's model, or a wait as long: then forward takes a third of it, and backward gives gradients, last
layer first, evenly over the rest, so that whatever overlaps can. A round times `iterations` in a row, each process by its own clock,
and nothing but the algorithm synchronises them; rows take turns. `compute` is a step that sends nothing. Hosts that wait may be
unequally fast: `straggler`, `jitter`.
"""

import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import hydra
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import slowmo
from benchmarks import iteration, ranks
from experiments.files import commit
from experiments.runner import build
from results import cost_model, straggling, timing
from results.store import COLUMNS, NETWORK, read, write


class Waiting(torch.nn.Module):
    """`parameters` numbers in equal layers; a forward pass waits for a third of `seconds`, its backward pass for the rest."""

    def __init__(self, parameters: int, seconds: float, layers: int = cost_model.LAYERS):
        super().__init__()
        sizes = [parameters // layers] * (layers - 1)
        sizes.append(parameters - sum(sizes))
        self.layers = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(size)) for size in sizes)
        self.seconds, self.backward_since = seconds, 0.0

    def forward(self) -> torch.Tensor:
        until = time.perf_counter() + self.seconds / 3
        x = torch.zeros(1)
        for k, layer in enumerate(self.layers):
            x = _Wait.apply(x, layer, self, k)
        sleep(until)
        self.backward_since = until
        return x.sum()


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(context, x, layer, model, k):
        context.model, context.k, context.size = model, k, layer.numel()
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        model = context.model
        done = 1 - context.k / len(model.layers)
        sleep(model.backward_since + done * 2 / 3 * model.seconds)
        return gradient, torch.zeros(1).expand(context.size), None, None


def sleep(until: float) -> None:
    """To a moment, not for a time: what a loaded machine loses in one wait it makes good in the next."""
    time.sleep(max(0.0, until - time.perf_counter()))


@hydra.main(version_base="1.3", config_path="../configs", config_name="table2")
def main(cfg: DictConfig) -> None:
    try:
        out = Path(cfg.out)
        before = read(out, "links") if out.exists() else pd.DataFrame(columns=COLUMNS["links"])
        experiments = check(cfg.benchmark)
        if cfg.benchmark.network == "emulated":
            command = [sys.executable, "-m", "benchmarks.table2", *HydraConfig.get().overrides.task, "benchmark.network=up"]
            code = ranks.inside(cfg.benchmark.hosts, cfg.benchmark.rate, cfg.benchmark.delay, command)
            if code:
                sys.exit(code)
            return
        lines = ranks.spawn(
            lambda: measure(cfg.benchmark, experiments), cfg.benchmark.hosts * cfg.benchmark.node, cfg.benchmark.network, cfg.benchmark.node
        )
        lines = pd.DataFrame(lines).assign(commit=commit(), machine=machine())
        keep = before[~before[NETWORK].eq(lines[NETWORK].iloc[0]).all(axis=1)]
        write(out, "links", pd.concat([part for part in (keep, lines) if len(part)], ignore_index=True))
        print(timing.beside(lines))
        print(f"wrote {out}; python -m results runtime puts it beside the paper and the model")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def machine() -> str:
    """Where a number comes from."""
    return f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"


def check(given: DictConfig) -> dict[str, DictConfig]:
    """The config of each row's experiment. ValueError, with the remedy, for what cannot be measured."""
    number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not isinstance(given.warmup, int) or given.warmup < 0 or not given.rows:
        raise ValueError(f"benchmark.warmup={given.warmup}, benchmark.rows={given.rows}: a whole number >= 0, and at least one row")
    for name in ("hosts", "node", "iterations", "rounds"):
        if not isinstance(given[name], int) or given[name] < 1:
            raise ValueError(f"benchmark.{name}={given[name]}: a whole number >= 1")
    if given.network not in ranks.NETWORKS:
        raise ValueError(f"benchmark.network={given.network}: choose one of {', '.join(ranks.NETWORKS)}")
    if given.compute != "task" and not (number(given.compute) and given.compute > 0):
        raise ValueError(f"benchmark.compute={given.compute}: seconds, or `task` for the experiment's own model")
    if given.compute != "task" and not (number(given.scale) and given.scale > 0 and given.data in cost_model.TASKS):
        words = f"benchmark.data={given.data} benchmark.scale={given.scale}: waiting stands for {', '.join(cost_model.TASKS)}"
        raise ValueError(f"{words} over a positive scale; for others take benchmark.compute=task")
    if not (number(given.straggler) and given.straggler >= 1 and number(given.jitter) and 0 <= given.jitter <= 1):
        words = f"benchmark.straggler={given.straggler} benchmark.jitter={given.jitter}"
        raise ValueError(f"{words}: how many times slower a host is, at least 1, and a share of steps, from 0 to 1")
    if given.compute == "task" and (given.straggler, given.jitter) != (1, 0):
        raise ValueError("benchmark.straggler and benchmark.jitter stretch a wait: choose seconds for benchmark.compute")
    if given.random and (given.compute != "task" or not given.data.startswith("cifar10")):
        raise ValueError("benchmark.random=true makes pictures in CIFAR-10's shape: choose benchmark.compute=task, and its data")
    found = {row: experiment(given, row) for row in given.rows}
    for row, cfg in found.items():
        tau = cfg.outer.get("tau")
        if tau and given.iterations % tau:
            raise ValueError(f"benchmark.iterations={given.iterations}: {row} averages every {tau}, choose a multiple")
    return found


def experiment(given: DictConfig, row: str) -> DictConfig:
    """The config of a row. ValueError where there is none."""
    cell, *overrides = row.split(",")
    name = f"{given.data}_{cell.removesuffix('_after')}"
    siblings = [f"outer={sibling}" for sibling in timing.SIBLINGS] if cell.startswith("local_") else []
    if any(not word.startswith("outer.tau=") and word not in siblings for word in overrides):
        words = f"perhaps with another τ, local_sgd perhaps with outer={' or '.join(timing.SIBLINGS)}: sgp_after,outer.tau=12"
        raise ValueError(f"benchmark.rows: {row}: a cell's name, perhaps with _after, {words}")
    words = [f"experiment={name}", f"workers={given.hosts}", "cluster.device=cpu", *given.overrides, *overrides]
    try:
        cfg = hydra.compose("config", words)
    except hydra.errors.MissingConfigException:
        raise ValueError(f"no experiment {name}: see configs/experiment") from None
    if cell.endswith("_after") and not cost_model.two_ways(name):
        raise ValueError(f"benchmark.rows: {row}: its messages leave before backward either way, leave _after out")
    return cfg


def measure(given: DictConfig, experiments: dict[str, DictConfig]) -> list[dict]:
    """In each process: every row in turn. A line for each row and round: milliseconds per iteration, the mean over processes."""
    torch.set_num_threads(1)
    cluster = slowmo.Cluster(given.hosts, timeout=given.timeout)
    first = next(iter(experiments.values()))
    rows = {"compute": prepared(given, first, cluster, alone=True)}
    rows |= {row: prepared(given, cfg, cluster, overlap=cost_model.way(row)[1]) for row, cfg in experiments.items()}
    times, begun = {row: [] for row in rows}, time.monotonic()
    for round_ in range(given.rounds):
        slow = straggling.slowness(given.hosts, given.warmup + given.iterations, given.straggler, given.jitter, round_)
        for k, (row, (algorithm, compute)) in enumerate(rows.items()):
            # an AllReduce whose step has begun averages during backward
            early = cost_model.way(row)[1] or not row.startswith("ar_")
            mine = timed(algorithm, compute, cluster, slow[:, cluster.rank // given.node], given.warmup, early)
            times[row].append(statistics.mean(cluster.all_gather_object(mine)))
            if cluster.is_main:
                done = (round_ * len(rows) + k + 1) / (given.rounds * len(rows))
                left = (time.monotonic() - begun) * (1 / done - 1)
                print(
                    f"round {round_ + 1}/{given.rounds} {row:32}{1e3 * times[row][-1]:8.1f} ms per iteration, {left / 60:.1f} minutes left",
                    flush=True,
                )
    facts = {name: given[name] for name in ("data", "hosts", "node", "straggler", "jitter", "warmup", "iterations")}
    facts |= {"network": "loopback", "rate": "-", "delay": "-"}
    if given.network == "up":
        facts |= dict(zip(("rate", "delay"), ranks.up(given.hosts)), network="emulated")
    facts |= {"bytes": rows["compute"][0].replicas.numel * 4, "emulated": given.compute != "task"}
    return [
        facts | {"row": row, "round": k, "milliseconds": round(1e3 * value, 3)} for row, of in times.items() for k, value in enumerate(of)
    ]


def prepared(given: DictConfig, cfg: DictConfig, cluster: slowmo.Cluster, alone: bool = False, overlap: bool = True):
    """(algorithm, what a step computes) of an experiment; alone: its model and optimizer, and nothing is sent between hosts.

    What a step computes is called with how many times as long it is to take.
    """
    cfg = OmegaConf.merge(cfg, {"cluster": {"overlap": overlap}})
    if given.compute == "task":
        task = build.build(cfg.task)
        model, scale = task.model(), task.loss_scale
        if given.random:
            batches = [iteration.pictures(task, "cpu") for _ in range(task.pieces)]
        else:
            batches = list(task.batches(0, cluster.local_workers, (cluster.worker_rank, cluster.worker_size)))

        def compute(longer: float):
            for batch in batches:
                (task.loss(model, batch) * scale).backward()
    else:
        model, scale, batches = Waiting(round(cost_model.TASKS[given.data].parameters / given.scale), given.compute), 1.0, [None]
        cfg.cluster.bucket_cap_mb = cost_model.emulated_bucket(given.data, cost_model.TASKS[given.data].size / given.scale) / 2**20

        def compute(longer: float):
            model.seconds = longer * given.compute
            model().backward()

    if alone:
        cfg.base, cfg.outer = {"_target_": "slowmo.base.LocalSGD", "_partial_": True}, {"_target_": None}
    return build.algorithm(cfg, model, cluster, len(batches), scale)[1], compute


def timed(algorithm, compute, cluster, slow, warmup: int, early: bool = True) -> float:
    """Seconds per iteration on this process. slow: of each iteration, the first `warmup` of which do not count, how many times as long it
    computes; early: a step begins before its gradients are formed."""
    cluster.barrier()
    for k, longer in enumerate(slow):
        if k == warmup:
            start = time.perf_counter()
        if early:
            algorithm.start(0.1)
        compute(longer)
        algorithm.step()
    return (time.perf_counter() - start) / (len(slow) - warmup)


if __name__ == "__main__":
    main()
