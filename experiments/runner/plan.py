"""What a run is going to do and what it takes, found out before any work starts."""

import torch
from omegaconf import OmegaConf

from experiments.runner import launch
from experiments.runner.build import algorithm as algorithm_of
from experiments.runner.build import build, overlaps, steps
from experiments.runner.config import Composed
from slowmo.base import OSGP, AllReduce
from slowmo.cluster import Cluster, layout
from slowmo.outer import SlowMo

LOOKS = 100_000  # at the most, of the schedule


def make(composed: Composed, task) -> tuple[dict, object, int]:
    """(what the run will do and take, its schedule, its inner steps). ValueError where things do not fit together.

    The real algorithm is built over rows that take no memory, and the plan is read off it.
    """
    cfg = composed.cfg
    length = steps(cfg, task)
    schedule = build(cfg.schedule, lr=cfg.optimizer.lr, steps=length)
    return rehearse(composed, task, schedule, length), schedule, length


def rehearse(composed: Composed, task, schedule, steps: int) -> dict:
    cfg = composed.cfg
    if cfg.cluster.graph and not task.same_shapes:
        raise ValueError("cluster.graph captures batches of one shape, and this task's have many: set cluster.graph=false")
    processes = launch.processes(cfg)
    rows, ranks = layout(cfg.workers, processes)
    parameters = sum(p.numel() for p in task.model().parameters() if p.requires_grad)
    model = torch.nn.Module()
    model.x = torch.nn.Parameter(torch.empty(parameters, device="meta", dtype=getattr(torch, cfg.dtype)))
    tiny = torch.nn.Parameter(torch.zeros(2, 3, dtype=getattr(torch, cfg.dtype)))
    tiny.grad = torch.ones_like(tiny)
    probe = build(cfg.optimizer, [tiny])
    try:
        probe.step()
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # what it was given fits only other machines, or nothing
        raise ValueError(f"{cfg.optimizer._target_}: {str(error).splitlines()[0]}") from None
    # not fused: some versions of torch refuse fused kernels for rows that take no memory
    unfused = OmegaConf.merge(cfg, {"optimizer": {"fused": False}} if "fused" in cfg.optimizer else {})
    replicas, algorithm = algorithm_of(unfused, model, _MetaCluster(cfg.workers, rows))
    names = [name for name, value in probe.state[tiny].items() if isinstance(value, torch.Tensor) and value.shape == tiny.shape]
    base, tau = algorithm.base, algorithm.tau
    for segment in replicas.segments:
        states, key = (base.optimizer.state, segment.members[0][0]) if base.inner.whole else (base.inner.state, segment.x)
        states[key] = {name: torch.empty_like(key) for name in names}
    slow = range(tau - 1, steps, tau) if tau else range(0)
    divides = isinstance(algorithm, SlowMo) and algorithm.divides_by_lr
    for step in _some(slow) if divides else ():
        if schedule(step) == 0:
            raise ValueError(f"the learning rate is 0 at slow step {step + 1}, and line 7 divides by it: end the schedule above 0")
    drop = _drop(schedule, slow, tau) if divides and algorithm.beta > 0 else None
    messages, lengths = algorithm.comm_volume()
    size, d = replicas.dtype.itemsize, sum(segment.x.shape[1] for segment in replicas.segments)
    slow_rows = len(algorithm.slow_names) * (1 if algorithm.exact else rows)
    where = f"{rows} per process" if ranks == 1 else f"a worker is {ranks} processes"
    # compiled code gives gradients at its end, a graph's are handed on when all replicas are through
    during = "as compiled pieces of backward end" if cfg.cluster.compile else "during backward"
    early = isinstance(base, OSGP) and "before forward"
    hooked = overlaps(cfg, processes) or isinstance(base, AllReduce)  # whose gradients are averaged in backward, as with DDP
    early = early or (during if hooked and not cfg.cluster.graph else "after backward")
    return {
        "title": f"m = {cfg.workers}, processes = {processes} ({where}), steps = {steps}, slow steps = {len(slow)}, seed = {cfg.seed}, "
                 + _algorithm(composed),
        "dropped": composed.dropped,
        "experiment": composed.experiment,
        "iterations": steps,
        "slow steps": len(slow),
        "parameters": parameters,
        "messages": messages,
        "sent": lengths * d * size,
        "when": early if processes > 1 else "within this process",
        "memory": round(d * size * (rows * (2 + len(names) + base.recv_buffers()) + slow_rows)),
        "rates": (schedule(0), max(schedule(s) for s in _some(range(steps))), schedule(steps - 1)),
        "warning": drop and "the learning rate drops in the round that ends at step {}: line 7 divides by the last rate, u becomes {:.3g} "
                   "times as large; let it drop just after a slow step, each multiple of {}".format(*drop, tau),
        "device": ", ".join([cfg.cluster.device, *_kernels(cfg.cluster)]),
        "data": task.found(),
        "target": cfg.target,
        "hours": cfg.launch.nodes * cfg.launch.minutes / 60 if cfg.launch.name == "slurm" else None,
    }  # fmt: skip


def _algorithm(composed: Composed) -> str:
    """base, graph, outer and what they are set to."""
    cfg, chosen = composed.cfg, composed.choices
    graph = f" ({chosen['base/graph']})" if "base/graph" in chosen else ""
    keys = ("tau", "alpha", "beta", "buffers", "exact", "num_fragments")
    kept = [f"{key} = {str(cfg.outer[key]).lower()}" for key in keys if key in cfg.outer]
    return f"base = {chosen['base']}{graph}, outer = {chosen['outer']}" + (f" ({', '.join(kept)})" if kept else "")


def _kernels(cluster) -> list[str]:
    """How forward and backward reach the device, where that is chosen."""
    graphs = f"a CUDA graph per replica, {int(cluster.graph)} at a time"
    return ["compiled"] * bool(cluster.compile) + [graphs] * bool(cluster.graph)


def _drop(schedule, slow: range, tau: int) -> tuple[int, float] | None:
    """(the slow step, counted in inner steps, before which the learning rate drops most; the mean rate of its round over its last), where
    that is more than 2. The last slow step's u is not used again."""
    worst = (0, 2.0)
    for step in _some(slow[:-1], LOOKS // tau):
        mean = sum(schedule(s) for s in range(step - tau + 1, step + 1)) / tau
        if schedule(step) and mean / schedule(step) > worst[1]:
            worst = (step + 1, mean / schedule(step))
    return worst if worst[0] else None


def _some(numbers: range, looks: int = LOOKS):
    """All of them, or as many of a very long run's, evenly spread, as can be looked at; the last one is among them."""
    return numbers[:: -max(1, len(numbers) // max(1, looks))]


def show(summary: dict, path) -> str:
    """The plan as text, a line a fact."""
    s, target = summary, summary["target"]
    facts = {
        "title": s["title"],
        "dropped": "; ".join(s["dropped"]),
        "experiment": s["experiment"] or "-",
        "table cell": target.table_cell or "none of the paper's",
        "paper": target.paper or "-",
        "cost": target.cost or "-",
        "iterations": f"{s['iterations']:,}",
        "slow steps": f"{s['slow steps']:,}",
        "parameters": f"{s['parameters']:,}",
        "messages": f"{amount(s['sent'])} sent per worker and iteration, in {s['messages']:.4g} messages, {s['when']}"
                    if s["sent"] else "nothing is sent",
        "memory": f"{amount(s['memory'])} per process: rows, gradients, optimizer, messages; activations and data come on top",
        "device": s["device"],
        "data": s["data"],
        "learning rate": "first {:.4g}, largest {:.4g}, last {:.4g}".format(*s["rates"]),
        "warning": s["warning"],
        "node-hours": s["hours"] is not None and f"{s['hours']:,.10g} at most, each time",
        "folder": str(path),
    }  # fmt: skip
    return "\n".join(f"{name:16}{text}" for name, text in facts.items() if text)


def amount(bytes_: float) -> str:
    """106 MB, in powers of ten as networks count."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes_ >= size:
            return f"{bytes_ / size:.3g} {unit}" if bytes_ < 999.5 * size else f"{bytes_ / size:,.0f} {unit}"
    return f"{bytes_:.4g} bytes"


class _MetaCluster(Cluster):
    """The rows of one process of a cluster that does not exist."""

    def __init__(self, num_workers: int, rows: int):
        self.num_workers, self.local_workers, self.worker_size, self.worker_rank = num_workers, range(rows), 1, 0
        self.rank, self.world_size, self.is_main, self.device, self.timeout = 0, 1, True, torch.device("meta"), 0.0
        self._started_here, self._group = False, None
