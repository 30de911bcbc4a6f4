"""What a run needs to go on, by worker and parameter name: independent of buckets, padding and layout.

    {"workers": [{"model.NAME", "optimizer.STATE.NAME", "slow.x0.NAME", ...}, one dict for each worker hosted here],
     "shared": {...}, the same for all workers
     "steps": k, "groups": [the optimizer's hyperparameters]}     JSON values

x0 and u are shared with exact averages, else each worker's own. Buffers of models (BatchNorm statistics) are `model.NAME` too; where a
worker is several ranks, each has its own and they are `own.NAME`.
"""

from collections.abc import Iterable
from typing import Any

import torch

from slowmo.inner import WholeOptimizer
from slowmo.outer import Algorithm, SlowMo


def state_dict(algorithm: Algorithm) -> dict[str, Any]:
    """The state of a base or an outer algorithm. Tensors are views: save or clone them before the next step."""
    base, replicas = algorithm.base, algorithm.replicas
    x = [segment.x.detach() for segment in replicas.segments]
    workers: list[dict[str, torch.Tensor]] = []
    shared: dict[str, torch.Tensor] = {}
    kind = "model" if base.cluster.worker_size == 1 else "own"
    for row in range(len(replicas.models)):
        own, same = base.inner.named(row)
        worker = {f"model.{name}": view for name, view in replicas.named(x, row).items()}
        worker |= {f"{kind}.{name}": buffer for name, buffer in replicas.buffers()[row].items()}
        worker |= {f"optimizer.{name}": view for name, view in own.items()}
        shared |= {f"optimizer.{name}": value for name, value in same.items()}
        if hasattr(base, "w"):
            worker["push_sum_weight"] = base.w[row]
        if not algorithm.exact:
            worker |= _slow(algorithm, row)
        workers.append(worker)
    if algorithm.exact:
        shared |= _slow(algorithm, 0)
    groups = [{k: _plain(v) for k, v in group.items() if k != "params"} for group in base.optimizer.param_groups]
    return {"workers": workers, "shared": shared, "steps": base.steps, "groups": groups}


@torch.no_grad()
def load_state_dict(algorithm: Algorithm, state: dict[str, Any]) -> None:
    """The inverse of `state_dict`. state["workers"] may be anything that gives a worker's dict by its row, read one after another.

    ValueError, before anything is written, where names or shapes are not this model's or this algorithm's.
    """
    base, replicas, shared = algorithm.base, algorithm.replicas, state["shared"]
    if base.started:
        base.drop()
    rows = range(len(replicas.models))
    begun = state["steps"] > 0 or any(key.startswith("slow.") for key in (*shared, *state["workers"][0]))
    slow_names = algorithm.slow_names if begun else ()  # saved before the first step: x0 is not taken yet
    for row in rows:
        _check(algorithm, state["workers"][row], shared, slow_names)
    if len(state["groups"]) != len(base.optimizer.param_groups):
        raise ValueError(f"the state has {len(state['groups'])} parameter groups, the optimizer {len(base.optimizer.param_groups)}")
    x = [segment.x.detach() for segment in replicas.segments]
    blank = algorithm.blank() if isinstance(algorithm, SlowMo) and slow_names else {}
    slow = [[values[k] for values in blank.values()] for k in range(len(slow_names))]
    for row in rows:
        worker = state["workers"][row]
        values = worker | shared
        for name, buffer in replicas.buffers()[row].items():
            buffer.copy_(worker[f"model.{name}"] if f"model.{name}" in worker else worker[f"own.{name}"])
        for name, view in replicas.named(x, row).items():
            view.copy_(worker[f"model.{name}"])
        for key, blocks in zip(slow_names, slow):
            if row == 0 or not algorithm.exact:
                for name, view in replicas.named(blocks, row).items():
                    view.copy_(values[f"slow.{key}.{name}"])
        own, same = ({k.removeprefix("optimizer."): v for k, v in part.items() if k.startswith("optimizer.")} for part in (worker, shared))
        base.inner.load(row, own, same)
        if hasattr(base, "w"):
            base.w[row] = worker["push_sum_weight"]
    for segment in replicas.segments:
        segment.zero_grads()
        segment.written()
    for group, saved in zip(base.optimizer.param_groups, state["groups"]):
        group.update({k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items()})
    base.steps = state["steps"]
    if algorithm.slow_names and not slow_names:
        algorithm.slow = None
    replicas.forget()


def _slow(algorithm: Algorithm, row: int) -> dict[str, torch.Tensor]:
    if not algorithm.slow_names or algorithm.slow is None:
        return {}
    out: dict[str, torch.Tensor] = {}
    for k, key in enumerate(algorithm.slow_names):
        blocks = [values[k] for values in algorithm.slow.values()]
        out |= {f"slow.{key}.{name}": view for name, view in algorithm.replicas.named(blocks, row).items()}
    return out


def _check(algorithm: Algorithm, worker: dict[str, torch.Tensor], shared: dict[str, torch.Tensor], slow_names: Iterable[str]) -> None:
    places = {place.name: place.shape for segment in algorithm.replicas.segments for place in segment.places}
    buffers = {name: buffer.shape for name, buffer in algorithm.replicas.buffers()[0].items()}
    needed = {f"model.{name}" for name in places}
    needed |= {f"slow.{key}.{name}" for key in slow_names for name in places}
    needed |= {"push_sum_weight"} if hasattr(algorithm.base, "w") else set()
    values = worker | shared
    needed |= {f"model.{name}" for name in buffers if f"own.{name}" not in values}
    if missing := sorted(needed - values.keys()):
        raise ValueError(f"the state lacks {missing[0]} and {len(missing) - 1} more: it is another model's or another algorithm's")
    for key, value in values.items():
        kind, _, rest = key.partition(".")
        if kind not in ("model", "own", "slow", "optimizer"):
            continue
        name = rest if kind in ("model", "own") else rest.partition(".")[2]
        shape = (places | buffers if kind in ("model", "own") else places).get(name)
        if shape is None:
            raise ValueError(f"the state has {key}, and the model no {name}: it is another model's")
        own_shapes = kind == "optimizer" and (value.numel() == 1 or isinstance(algorithm.base.inner, WholeOptimizer))
        if value.shape != shape and not own_shapes:
            raise ValueError(f"{key} has shape {list(value.shape)} in the state, and {list(shape)} in the model: it is another model's")


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return list(value) if isinstance(value, tuple) else value
