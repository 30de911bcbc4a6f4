"""The user's optimizer, stepped bucket by bucket over segments instead of all at once over a model's parameters.

An optimizer may do that when it is elementwise: what an element's step depends on is that element's gradient, its state and the values
of its group, nothing else. torch's own are known by class (ELEMENTWISE). Of another say `elementwise=True` if it keeps to this: state
tensors shaped as the parameter are per element, every other state is the same for all of a parameter; nothing is clipped or normed over
a tensor. Else the optimizer (Muon, LARS, Adafactor, ...) steps the model's own parameters, all at once, after backward, and every worker
needs a rank of its own.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from slowmo.buckets import Bucket, Place, Segment
from slowmo.replicas import Replicas

ELEMENTWISE = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adagrad,
    torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.ASGD,
)  # fmt: skip
Entries = list[tuple[str, Any]]  # of a parameter's state: names and values
COUNTERS = ("step", "eta", "mu", "mu_product")  # the names of torch's states that are one number per parameter
# their state before the first step is zeros, if they have one
ZERO_STATE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adadelta, torch.optim.RMSprop)


def inner_optimizer(
    optimizer: torch.optim.Optimizer, replicas: Replicas, elementwise: bool | None = None, overlap: bool = False
) -> "SegmentOptimizer | WholeOptimizer":
    """`optimizer`, built over the parameters of `replicas.models[0]`, for the algorithms of base.py.

    elementwise: default by class. Raises ValueError for something else than an optimizer over these parameters, and for one that is not
    elementwise where a rank hosts several workers.
    """
    check(optimizer)
    group_of = {p: k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for segment in replicas.segments:
        for p, _, _ in segment.members[: len(segment.places)]:
            if group_of.get(p) != segment.group:
                raise ValueError("the optimizer has other parameters or groups than Replicas was given: pass it optimizer.param_groups")
    name = type(optimizer).__name__
    if elementwise is None:
        elementwise = type(optimizer) in ELEMENTWISE
    if elementwise and hasattr(optimizer, "eval"):
        raise ValueError(f"{name} swaps weights by its own state in eval() and train(), which rows do not have: leave elementwise out")
    if elementwise:
        return SegmentOptimizer(optimizer, replicas)
    if len(replicas.models) > 1:
        raise ValueError(
            f"{name} is not known to be elementwise, it might mix workers: give each of the {replicas.cluster.num_workers} workers a rank "
            "of its own, choose SGD, Adam, AdamW, RMSprop, Adagrad, ..., or say elementwise=True (slowmo/inner.py tells what that promises)"
        )
    if overlap:
        raise ValueError(
            f"overlap=True steps bucket by bucket, and {name} is not known to be elementwise: choose overlap=False, or say "
            "elementwise=True (slowmo/inner.py tells what that promises)"
        )
    return WholeOptimizer(optimizer, replicas)


def check(optimizer: Any) -> None:
    """ValueError for what is no optimizer, or one whose step needs several evaluations."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"the optimizer is a {name}: build a torch.optim optimizer over model.parameters()")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"{name} evaluates the loss several times in a step, workers exchange once: choose SGD, Adam, AdamW, ...")


class SegmentOptimizer:
    """A twin of the optimizer for each bucket; they share state, and each has group dicts of its own, so that counters which live in
    groups count once per step.

    skip_missing: a segment where no gradient has arrived is left alone, as torch leaves a parameter; else it has a gradient of zero,
    which is the same under every layout.
    """

    whole: None = None  # buckets are stepped one by one
    skip_missing = False

    def __init__(self, optimizer: torch.optim.Optimizer, replicas: Replicas):
        self.optimizer, self.replicas, self._fills = optimizer, replicas, fills(optimizer)
        self.counted: set[str] = set()
        self.state = type(optimizer.state)(dict)
        self.twins: list[torch.optim.Optimizer] = []
        for bucket in replicas.buckets:
            groups = [
                {**group, "params": [segment.x for segment in bucket.segments if segment.group == number]}
                for number, group in enumerate(optimizer.param_groups)
                if any(segment.group == number for segment in bucket.segments)
            ]
            self.twins.append(self._twin(groups))
        self._pulled: list[list[dict[str, Any]]] = [[{} for _ in twin.param_groups] for twin in self.twins]
        self._groups = [sorted({segment.group for segment in bucket.segments}) for bucket in replicas.buckets]
        for segment in replicas.segments:
            self._import(segment)

    def pull(self) -> None:
        """Take learning rates, momenta, ... from the user's groups."""
        for twin, numbers, pulled in zip(self.twins, self._groups, self._pulled):
            for k, (mine, number) in enumerate(zip(twin.param_groups, numbers)):
                pulled[k] = {k: v for k, v in self.optimizer.param_groups[number].items() if k != "params"}
                mine.update(pulled[k])

    def push(self) -> None:
        """Give back what a step has counted in groups, and no more: the user may have changed the rest since `pull`."""
        for twin, numbers, pulled in zip(reversed(self.twins), reversed(self._groups), reversed(self._pulled)):
            for mine, number, before in zip(twin.param_groups, numbers, pulled):
                changed = {k: v for k, v in mine.items() if k != "params" and not (k in before and before[k] is v)}
                self.optimizer.param_groups[number].update(changed)

    def step(self, bucket: Bucket) -> None:
        """Step a bucket's segments."""
        for segment in bucket.segments:
            segment.x.grad = segment.grad if not self.skip_missing or segment.reached else None
        twin = self.twins[bucket.index]
        before = [noted(group) for group in twin.param_groups]
        twin.step()
        self.counted.update(*map(counted, before, twin.param_groups))

    def blocks(self, segment: Segment) -> dict[str, torch.Tensor]:
        """The state of a segment that is per element, `[n, d]` by name (momentum_buffer, exp_avg, ...)."""
        return {k: v for k, v in self.state.get(segment.x, {}).items() if per_element(k, v, segment.x)}

    def reset(self, segment: Segment) -> None:
        """As if the optimizer had never stepped."""
        group = self.optimizer.param_groups[segment.group]
        kind, state = type(self.optimizer), self.state.get(segment.x)
        if state is None:
            return
        if kind in ZERO_STATE or kind is torch.optim.SGD and not group["dampening"]:
            for value in state.values():  # in place: memory given back and taken anew costs more than the rest of a slow step
                if isinstance(value, torch.Tensor):
                    value.zero_()
        else:
            del self.state[segment.x]
            if self._fills:
                self.state[segment.x] = as_built(self.optimizer, group, segment.x)

    def average(self, segment: Segment) -> None:
        """Average what is per element over all workers; counters are the same everywhere and stay."""
        if self.skip_missing and self.replicas.cluster.world_size > 1:
            self._complete(segment)
        for _, block in sorted(self.blocks(segment).items()):
            block.copy_(self.replicas.cluster.mean(block))

    def _complete(self, segment: Segment) -> None:
        """A rank where no gradient has arrived so far has no state, and takes part with zeros."""
        blocks, mine = self.blocks(segment), self.state.get(segment.x, {})
        counters = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in mine.items() if k not in blocks}
        for dtypes, others in self.replicas.cluster.all_gather_object(({k: v.dtype for k, v in blocks.items()}, counters)):
            for key, dtype in dtypes.items():
                if key not in self.state[segment.x]:
                    self.state[segment.x][key] = torch.zeros_like(segment.x, requires_grad=False, dtype=dtype)
            for key, value in others.items():
                if key not in self.state[segment.x]:
                    self._put_scalar(segment, key, value, segment.places[0].name)

    # --- by parameter name, for checkpoints ---

    def named(self, row: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(views `STATE.NAME` of a worker's state, what is the same for all workers)."""
        own: dict[str, torch.Tensor] = {}
        shared: dict[str, torch.Tensor] = {}
        for segment in self.replicas.segments:
            for key, value in self.state.get(segment.x, {}).items():
                for place in segment.places:
                    if per_element(key, value, segment.x):
                        own[f"{key}.{place.name}"] = place.of(value, row)
                    elif value is not None:
                        shared[f"{key}.{place.name}"] = torch.as_tensor(value).detach()
        return own, shared

    def load(self, row: int, own: dict[str, torch.Tensor], shared: dict[str, torch.Tensor]) -> None:
        """The inverse of `named`, for one worker; with row 0 what was there before is dropped. ValueError, before that, for parameters
        of a segment that have taken different numbers of steps."""
        for segment in self.replicas.segments if row == 0 else ():
            counted: dict[str, Any] = {}
            for place in segment.places:
                for key, value in entries(place.name, shared):
                    _same(place.name, key, value, counted.setdefault(key, value))
        for segment in self.replicas.segments:
            if row == 0:
                self.state.pop(segment.x, None)
            for place in segment.places:
                self._put(segment, place, row, entries(place.name, own), entries(place.name, shared))

    def _put(self, segment: Segment, place: Place, row: int, own: Entries, shared: Entries) -> None:
        """A parameter's state, of one worker. What is a number has the precision of the rows at least."""
        for key, value in own:
            state = self.state[segment.x]
            if key not in state:
                dtype = torch.promote_types(value.dtype, segment.x.dtype) if value.is_floating_point() else value.dtype
                state[key] = torch.zeros_like(segment.x, requires_grad=False, dtype=dtype)
            place.of(state[key], row).copy_(value)
        for key, value in shared:
            self._put_scalar(segment, key, value, place.name)

    def _put_scalar(self, segment: Segment, key: str, value: Any, name: str) -> None:
        state = self.state[segment.x]
        before = state.get(key)
        value = value.clone() if isinstance(value, torch.Tensor) else value
        group = self.optimizer.param_groups[segment.group]
        if isinstance(value, torch.Tensor) and (group.get("capturable") or group.get("fused")):
            value = value.to(segment.x.device)
        if before is not None:
            _same(name, key, value, before)
        state[key] = value

    def _import(self, segment: Segment) -> None:
        """State that the optimizer has already, from steps without us, or because it fills it when it is built."""
        for place, (p, _, _) in zip(segment.places, segment.members):
            found = [(key, value) for key, value in self.optimizer.state.get(p, {}).items() if value is not None]
            own = [(key, value) for key, value in found if per_element(key, value, p)]
            shared = [(key, value) for key, value in found if not per_element(key, value, p)]
            for row in range(len(self.replicas.models)):
                self._put(segment, place, row, own, shared)
        for p, _, _ in segment.members[: len(segment.places)]:
            self.optimizer.state.pop(p, None)

    def _twin(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        twin = object.__new__(type(self.optimizer))
        twin.__dict__.update(self.optimizer.__dict__)
        twin.__dict__.pop("step", None)  # a scheduler's counting wrapper: it counts the user's steps
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            twin.__dict__[hooks] = type(getattr(self.optimizer, hooks))()  # the user's hooks see whole steps, not buckets
        twin.state, twin.param_groups = self.state, groups
        return twin


class WholeOptimizer:
    """An optimizer that is not elementwise: it steps the only model's own parameters, which are views of the rows, all at once."""

    skip_missing = False

    def __init__(self, optimizer: torch.optim.Optimizer, replicas: Replicas):
        self.optimizer, self.replicas, self.whole = optimizer, replicas, Bucket(0, replicas.segments)
        self.counted, self._fills = set[str](), fills(optimizer)
        if any(p.dtype != x.dtype for segment in replicas.segments for p, x, _ in segment.members):
            raise ValueError(f"{type(optimizer).__name__} is not elementwise and cannot step master weights: give all parameters one dtype")

    def pull(self) -> None:
        """The groups are the user's own."""

    push = pull

    def step(self, bucket: Bucket) -> None:
        """Step all: the bucket is `whole`."""
        for segment in bucket.segments:
            if self.skip_missing and not segment.reached:
                segment.take_grads()
        before = [noted(group) for group in self.optimizer.param_groups]
        type(self.optimizer).step(self.optimizer)
        self.counted.update(*map(counted, before, self.optimizer.param_groups))

    def blocks(self, segment: Segment) -> dict[str, torch.Tensor]:
        """Of the segment's first parameter."""
        p, _, _ = segment.members[0]
        return {k: v for k, v in self.optimizer.state.get(p, {}).items() if per_element(k, v, p)}

    def reset(self, segment: Segment) -> None:
        for p, _, _ in segment.members:
            self.optimizer.state.pop(p, None)
            if self._fills:
                self.optimizer.state[p] = as_built(self.optimizer, self.optimizer.param_groups[segment.group], p)

    def average(self, segment: Segment) -> None:
        cluster, mine = self.replicas.cluster, {}
        for k, (p, _, _) in enumerate(segment.members):
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim:
                    mine[k, key] = value
        kinds = {name: (value.shape, value.dtype) for name, value in mine.items()}
        if self.skip_missing and cluster.world_size > 1:  # where no gradient has arrived so far there is no state, and zeros take part
            kinds = {name: kind for other in cluster.all_gather_object(kinds) for name, kind in other.items()}
        for name, (shape, dtype) in sorted(kinds.items(), key=lambda item: item[0]):
            mean = cluster.mean(mine[name].reshape(1, -1) if name in mine else segment.x.new_zeros(1, shape.numel(), dtype=dtype))
            if name in mine:
                mine[name].copy_(mean.view(shape))

    def named(self, row: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        own: dict[str, torch.Tensor] = {}
        for segment in self.replicas.segments:
            for place, (p, _, _) in zip(segment.places, segment.members):
                own |= {f"{k}.{place.name}": torch.as_tensor(v) for k, v in self.optimizer.state.get(p, {}).items() if v is not None}
        return own, {}

    def load(self, row: int, own: dict[str, torch.Tensor], shared: dict[str, torch.Tensor]) -> None:
        for segment in self.replicas.segments:
            for place, (p, _, _) in zip(segment.places, segment.members):
                self.optimizer.state.pop(p, None)
                if found := entries(place.name, own | shared):
                    self.optimizer.state[p] = {key: value.clone() for key, value in found}


def counted(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Which values of a group a step has changed, in place too: `before` is of `noted`. A rate is none of the optimizer's state."""
    return {k for k, (value, version) in noted(after).items() if k != "lr" and (k not in before or before[k] != (value, version))}


def noted(group: dict[str, Any]) -> dict[str, tuple[Any, int]]:
    """The values of a group, each with the version of a tensor."""
    return {k: (id(v), v._version) if isinstance(v, torch.Tensor) else (v, 0) for k, v in group.items() if k != "params"}


def as_built(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: torch.Tensor) -> dict[str, Any]:
    """The state that the optimizer's class gives p when it is built, as torch's Adagrad does."""
    kind = type(optimizer)
    words = {k: v for k, v in optimizer.defaults.items() if k in inspect.signature(kind).parameters}
    return kind([{k: v for k, v in group.items() if k not in ("params", "param_names")} | {"params": [p]}], **words).state.get(p, {})


def fills(optimizer: torch.optim.Optimizer) -> bool:
    """Whether parameters have a state before the first step. A class that cannot be built again is taken for one whose have not."""
    group = next((group for group in optimizer.param_groups if group["params"]), None)
    if group is None or not optimizer.state:
        return False
    try:
        return bool(as_built(optimizer, group, group["params"][0]))
    except Exception:
        return False


def _same(name: str, key: str, value: Any, neighbours: Any) -> None:
    if not torch.equal(torch.as_tensor(value), torch.as_tensor(neighbours)):
        raise ValueError(
            f"{name} has {key} = {float(value)} and a neighbour in its segment {float(neighbours)}: parameters that have taken different "
            "numbers of steps need parameter groups of their own"
        )


def per_element(key: str, value: Any, like: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == like.shape and key not in COUNTERS


def entries(name: str, values: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """(STATE, value) of each `STATE.NAME`. Names of parameters have dots, those of states do not."""
    ending = f".{name}"
    return [(key[: -len(ending)], value) for key, value in values.items() if key.endswith(ending) and "." not in key[: -len(ending)]]
