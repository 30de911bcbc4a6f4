"""What a run is going to do and what it takes, found out before any work starts."""

import torch
from omegaconf import OmegaConf

from experiments.runner import launch
from experiments.runner.build import build, steps
from experiments.runner.config import Composed
from slowmo.cluster import Cluster, fold
from slowmo.outer import SlowMo
from slowmo.replicas import Replicas

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
    processes = launch.processes(cfg)
    rows, node = fold(cfg.workers, processes)
    parameters = sum(p.numel() for p in task.model().parameters() if p.requires_grad)
    model = torch.nn.Module()
    model.x = torch.nn.Parameter(torch.empty(parameters, device="meta", dtype=getattr(torch, cfg.dtype)))
    replicas = Replicas(model, _Rehearsal(cfg.workers, rows))
    tiny = torch.nn.Parameter(torch.zeros(1, 1, dtype=getattr(torch, cfg.dtype)))
    tiny.grad = torch.ones_like(tiny)
    probe = build(cfg.optimizer, [tiny])
    try:
        probe.step()
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # what it was given fits only other machines, or nothing
        raise ValueError(f"{cfg.optimizer._target_}: {str(error).splitlines()[0]}") from None
    # not fused: some versions of torch refuse fused kernels for rows that take no memory
    optimizer = build(OmegaConf.merge(cfg.optimizer, {"fused": False} if "fused" in cfg.optimizer else {}), [replicas.rows])
    names = [name for name, value in probe.state[tiny].items() if isinstance(value, torch.Tensor) and value.shape == tiny.shape]
    algorithm = build(cfg.base, replicas, optimizer)
    if cfg.outer.get("_target_"):
        algorithm = build(cfg.outer, algorithm)
    optimizer.state[replicas.rows] = {name: torch.empty_like(replicas.rows) for name in names}
    tau = getattr(algorithm, "tau", None)
    slow = range(tau - 1, steps, tau) if tau else range(0)
    for step in _some(slow) if type(algorithm) is SlowMo else ():
        if schedule(step) == 0:
            raise ValueError(f"the learning rate is 0 at slow step {step + 1}, and line 7 divides by it: end the schedule above 0")
    messages, lengths = algorithm.sends()
    size, d = replicas.rows.element_size(), replicas.rows.shape[1]
    inboxes = getattr(algorithm, "base", algorithm).inboxes()
    globals_ = 0 if algorithm.u is None else 2 * len(algorithm.u)
    where = f"{rows} a process" if node == 1 else f"a worker is {node} processes"
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
        "memory": round(d * size * (rows * (2 + len(names) + inboxes) + globals_)),
        "rates": (schedule(0), max(schedule(s) for s in _some(range(steps))), schedule(steps - 1)),
        "device": cfg.cluster.device,
        "data": task.found(),
        "promise": cfg.promise,
        "hours": cfg.launch.nodes * cfg.launch.minutes / 60 if cfg.launch.name == "slurm" else None,
    }  # fmt: skip


def _algorithm(composed: Composed) -> str:
    """base, graph, outer and what they are set to."""
    cfg, chosen = composed.cfg, composed.choices
    graph = f" ({chosen['base/graph']})" if "base/graph" in chosen else ""
    kept = [f"{key} = {str(cfg.outer[key]).lower()}" for key in ("tau", "alpha", "beta", "buffers", "exact") if key in cfg.outer]
    return f"base = {chosen['base']}{graph}, outer = {chosen['outer']}" + (f" ({', '.join(kept)})" if kept else "")


def _some(numbers: range):
    """All of them, or as many of a very long run's, evenly spread, as can be looked at; the last one is among them."""
    return numbers[:: -max(1, len(numbers) // LOOKS)]


def show(summary: dict, path) -> str:
    """The plan as text, a line a fact."""
    s, promise = summary, summary["promise"]
    facts = {
        "title": s["title"],
        "dropped": "; ".join(s["dropped"]),
        "experiment": s["experiment"] or "-",
        "cell": promise.cell or "none of the paper's",
        "paper": promise.paper or "-",
        "cost": promise.cost or "-",
        "iterations": f"{s['iterations']:,}",
        "slow steps": f"{s['slow steps']:,}",
        "parameters": f"{s['parameters']:,}",
        "messages": f"{amount(s['sent'])} sent per worker and iteration, in {s['messages']:.4g} messages"
                    if s["sent"] else "nothing is sent",
        "memory": f"{amount(s['memory'])} per process: rows, gradients, optimizer, messages; activations and data come on top",
        "device": s["device"],
        "data": s["data"],
        "learning rate": "first {:.4g}, largest {:.4g}, last {:.4g}".format(*s["rates"]),
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


class _Rehearsal(Cluster):
    """The rows of one process of a cluster that does not exist."""

    def __init__(self, size: int, rows: int):
        self.size, self.ranks, self.node, self.lane, self.process, self.processes = size, range(rows), 1, 0, 0, 1
        self.device, self.leader, self._started_here = torch.device("meta"), True, False
