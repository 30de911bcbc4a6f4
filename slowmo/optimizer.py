"""SlowMo for a training loop of your own: one line after the optimizer, and the loop stays as it is.

optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
optimizer = slowmo.SlowMo(model, optimizer, base="sgp", tau=12, beta=0.6)
"""

import contextlib
import copy
import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from slowmo import base as bases
from slowmo import outer
from slowmo.cluster import Cluster
from slowmo.inner import COUNTERS, ELEMENTWISE, WholeOptimizer, check, entries, per_element
from slowmo.replicas import Replicas, agree
from slowmo.topology import Graph

BASES = {"local_sgd": bases.LocalSGD, "sgp": bases.SGP, "osgp": bases.OSGP, "dpsgd": bases.DPSGD, "allreduce": bases.AllReduce}


class SlowMo(torch.optim.Optimizer):
    """`optimizer` over `model`, distributed by a base algorithm and SlowMo (Wang et al. 2020, Algorithm 1).

    It is an optimizer itself: learning rate schedulers, GradScaler, gradient clipping and training frameworks see the user's own
    `param_groups`, per-parameter `state`, `step`, `zero_grad` and `state_dict`. A step begins with the first forward pass of `model` in
    training mode. Every rank starts from rank 0's parameters and buffers. With one process nothing is sent.

    model: on its device and in its dtype already, not wrapped in DistributedDataParallel: SlowMo does the communication.
    optimizer: a torch optimizer over all trainable parameters of the model, in one or several groups.
    base: local_sgd | sgp | osgp | dpsgd | allreduce. tau: inner steps between slow steps. alpha, beta: slow learning rate and momentum.
    buffers: the optimizer's state at a slow step: reset | maintain | average. exact=False: the paper's noaverage. alpha=1, beta=0 and
    buffers="maintain" over local_sgd is Local SGD.
    graph: of topology.py, default the base's. num_workers: default one per rank; fewer, and a worker is several ranks, which average
    their gradients. overlap: step and send during backward. Gradients are gone when it returns: nothing can clip or read them, and every
    step has exactly `accumulate` backward passes. bucket_cap_mb: MiB per message. elementwise: see inner.py. timeout: seconds after which
    a silent rank is an error. cluster: one that exists already.

    Raises ValueError for a model or an optimizer that does not fit, RuntimeError during training for what would silently do nothing or
    something else: see docs/library.md.
    """

    _step_supports_amp_scaling = True  # a GradScaler hands over its scale and what it found, and ranks agree on skipping a step

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, base: str = "sgp", tau: int = 12, alpha: float = 1.0,
                 beta: float = 0.7, buffers: str = "reset", exact: bool = True, *, graph: Graph | None = None,
                 num_workers: int | None = None, overlap: bool = False, bucket_cap_mb: float = 25.0, accumulate: int = 1,
                 elementwise: bool | None = None, timeout: float = 600.0, cluster: Cluster | None = None):  # fmt: skip
        if base not in BASES:
            raise ValueError(f"base={base!r}: choose one of {', '.join(BASES)}")
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            raise ValueError("the model is wrapped in DistributedDataParallel, which averages gradients at every step: give the bare model")
        if isinstance(optimizer, SlowMo):
            raise ValueError("the optimizer is a SlowMo: build a torch.optim optimizer over model.parameters()")
        check(optimizer)  # before the model is anybody's
        if getattr(optimizer.__dict__.get("step"), "_of_slowmo", False):
            raise ValueError("this optimizer is already in the hands of another SlowMo, which has its state: build a new one")
        options = {} if graph is None else {"graph": graph}
        if graph is not None and base not in ("sgp", "osgp", "dpsgd"):
            raise ValueError(f"base={base} has no graph: leave it out, or choose sgp, osgp or dpsgd")
        device = next((p.device for p in model.parameters() if p.requires_grad), torch.device("cpu"))
        cluster = cluster or Cluster(num_workers, "cpu" if device.type == "meta" else device, timeout)
        if len(cluster.local_workers) > 1:
            raise ValueError(f"{cluster.num_workers} workers on {cluster.world_size} ranks: a loop of your own drives one model, so "
                             "start at least one rank for each worker")  # fmt: skip
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups  # the user's own list
        self.inner_optimizer, self.model, self.cluster = optimizer, model, cluster
        if cluster.world_size > 1:
            mixing = [sorted(graph(step).items()) for step in range(graph.cycle)] if graph else None
            kinds = type(optimizer).__name__, elementwise, mixing
            agree(cluster, "SlowMo", (base, tau, alpha, beta, buffers, exact, overlap, bucket_cap_mb, accumulate, *kinds))
        self.replicas = Replicas(model, cluster, self.param_groups, bucket_cap_mb=bucket_cap_mb, accumulate=accumulate)
        self.replicas.watch_grads()
        kept = dict(optimizer.state)
        try:
            algorithm = BASES[base](self.replicas, optimizer, overlap=overlap, elementwise=elementwise, **options)
            made = outer.SlowMo(algorithm, tau, alpha, beta, buffers, exact)
        except Exception:
            self.replicas.release()
            optimizer.state.update(kept)
            raise
        algorithm.inner.skip_missing = True
        self.algorithm = made
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):  # they see whole steps
            setattr(self, hooks, getattr(optimizer, hooks))
            setattr(optimizer, hooks, type(getattr(optimizer, hooks))())
        self._stands_in_for = {p: (segment, place) for segment in self.replicas.segments
                               for (p, _, _), place in zip(segment.members, segment.places)}  # fmt: skip
        algorithm.handover.starter = self.algorithm.start
        self._evaluating = False  # inside averaged()
        self._at_start: list[int] = []  # versions of the gradients when a forward pass began the step
        self._count()
        model.register_forward_pre_hook(_BeforeForward(self))
        self._guard(optimizer)

    @property
    def steps(self) -> int:
        """Finished steps."""
        return self.algorithm.steps

    def before_forward(self) -> None:
        """A step begins, if none has, with the model's forward pass in training mode: called by a hook of the model.

        RuntimeError in DistributedDataParallel, which averages gradients at every step.
        """
        if torch.nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None:
            raise RuntimeError("the model is wrapped in DistributedDataParallel, which averages gradients every step: train the bare one")
        if not any(p.requires_grad for p in self._stands_in_for):
            return  # a discriminator, while its generator learns
        if self._evaluating:
            raise RuntimeError("a training forward pass inside averaged(): call model.eval(), or take its gradients outside")
        base, handover = self.algorithm.base, self.algorithm.base.handover
        if not (base.started and self.steps) and self.replicas.replaced():
            return  # by functional_call; or for good, and `step` will say so
        gradients = [segment.grad._version for segment in self.replicas.segments]
        if base.started and not self.steps and gradients == self._at_start and self.replicas.check():
            base.drop()  # weights were loaded after a forward pass that nothing followed
        if not base.started:
            self.algorithm.start()
            self._at_start = [segment.grad._version for segment in self.replicas.segments]
        elif handover.touched and self.replicas.accumulate == 1 and not handover.half_done:
            handover.again = True  # gradients were averaged and more may be added to them; or backward has failed

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; after every tau-th the slow step. closure: as in torch, it computes the loss and gradients. Returns its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._skips():
            self.algorithm.step()
            self._count()
        self.inner_optimizer._opt_called = True  # type: ignore[attr-defined]  # for a scheduler that was built on it
        return loss

    @torch.no_grad()
    def _skips(self) -> bool:
        """With a GradScaler: gradients are unscaled; or, where any rank has found an infinite one, dropped, and no rank takes the step."""
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is None:
            return False
        base = self.algorithm.base
        if base.overlap:
            raise RuntimeError("a GradScaler needs the gradients after backward, and overlap=True has spent them: choose overlap=False")
        base.handover.settle()
        if self.cluster.all_reduce_max(int(bool(found))):
            self.zero_grad()
            base.drop()
            return True
        if scale is not None:
            for segment in self.replicas.segments:
                segment.gather_grads()
                if segment.has_gradient:
                    segment.grad.div_(scale)
        return False

    @torch.no_grad()
    def zero_grad(self, set_to_none: bool = True) -> None:
        """A new step begins: gradients are zero, what a failed backward left is dropped. They stay views, whatever `set_to_none` says.

        RuntimeError with overlap=True where backward has begun the step and `step` was not called.
        """
        if self.algorithm.base.handover.touched:
            self.algorithm.base.handover.rearm()
        for segment in self.replicas.segments:
            segment.gather_grads()
            segment.zero_grads()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only add to the gradients: all but the last of a step, for accumulation."""
        handover = self.algorithm.base.handover
        before, handover.paused = handover.paused, True
        try:
            yield
        finally:
            handover.paused = before

    @torch.inference_mode(False)
    def averaged_model(self) -> torch.nn.Module:
        """A copy of the model in eval mode with the exact average of all workers, buffers (BatchNorm statistics) included. A collective.

        The copy is the caller's. What is frozen is this rank's.
        """
        loading = self._look()
        out = self.replicas.filled(copy.deepcopy(self.model), self.algorithm.base.average(), self.replicas.mean_buffers())
        if loading:
            self.replicas.forget()
        return out

    @contextlib.contextmanager
    def averaged(self) -> Iterator[torch.nn.Module]:
        """The model holds the exact average of all workers inside, and its own iterate again afterwards. A collective.

        In training mode it stays in training mode: call model.eval() as usual. A training forward pass that nothing has followed is
        forgotten. RuntimeError where gradients are averaged, between a backward pass and its step.
        """
        base = self.algorithm.base
        if base.started and base.handover.touched:
            raise RuntimeError("averaged() between a backward pass and its step: call step() first")
        if len(set(self.cluster.all_gather_object(base.started))) > 1:
            raise RuntimeError("averaged() between a training forward pass and its step on some ranks, not on others: call step() first")
        if base.started:
            base.drop()
        outermost, loading = not self._evaluating, self._look()
        x, buffers = self.algorithm.base.average(), self.replicas.mean_buffers()
        own, model_buffers = [segment.x.detach().clone() for segment in self.replicas.segments], self.replicas.buffers()[0]
        own_buffers = {name: buffer.clone() for name, buffer in model_buffers.items()}
        self._write(x, buffers)
        self._evaluating = True
        try:
            yield self.model
        finally:
            self._write(own, own_buffers)
            if outermost:
                self._evaluating = False
                self.replicas.forget() if loading else self.replicas.remember()

    def _look(self) -> bool:
        """Before rows are read: they follow weights that were written from outside. RuntimeError for those of mid-training.

        Returns whether a state is being loaded, so that weights may still be written after.
        """
        if self._evaluating:
            return False
        loading, algorithm = self.replicas.forgotten, self.algorithm
        if not self.steps and self.replicas.check(frozen=True):
            if algorithm.base.started:
                algorithm.base.drop()
            algorithm.slow = None  # x0 is taken when the step begins
        algorithm.base.take_writes(frozen=True)
        return loading

    @torch.inference_mode(False)
    def rebase(self) -> None:
        """Go on from the weights as they are now, after they were written from outside: x0 is their average, the slow momentum 0.

        A collective.
        """
        self.algorithm.rebase()

    def accept(self) -> None:
        """Go on from the weights as they are now, after a clamp or a norm of the loop's own: they are this worker's iterate, and x0
        and the slow momentum stay."""
        self.algorithm.base.rebase()

    # --- state, per parameter as torch has it ---

    @property  # type: ignore[override]  # torch's is an attribute
    def state(self) -> dict[torch.nn.Parameter, dict[str, Any]]:
        """Of each parameter: the optimizer's state and, as `slowmo_x0` and `slowmo_u`, SlowMo's; of one in a narrower dtype also the
        row, `slowmo_x`. To write, use load_state_dict."""
        if getattr(self, "algorithm", None) is None:  # torch's constructor asks; Lightning's wrappers have our class and not our __dict__
            return {}
        whole = isinstance(self.algorithm.base.inner, WholeOptimizer)
        own, shared = ({}, {}) if whole else self.algorithm.base.inner.named(0)
        out: defaultdict[torch.nn.Parameter, dict[str, Any]] = defaultdict(dict)
        for p, (segment, place) in self._stands_in_for.items():
            found: dict[str, Any] = dict(self.inner_optimizer.state.get(p, {})) if whole else dict(entries(place.name, own))
            found |= {key: value.clone() for key, value in entries(place.name, shared)}
            if self.algorithm.slow and p.dtype != segment.x.dtype:
                found["slowmo_x"] = place.of(segment.x.detach(), 0)
            if self.algorithm.slow:
                blocks = zip(self.algorithm.slow_names, self.algorithm.slow[segment])
                found |= {f"slowmo_{key}": place.of(block, 0) for key, block in blocks}
            if found:
                out[p] = found
        return out

    @state.setter
    def state(self, value: Any) -> None:
        """torch's constructor sets an empty one; there is nothing to take from it."""

    def state_dict(self) -> dict[str, Any]:
        """In torch's layout. Each rank's own: save every rank's. The groups have `slowmo_steps` and `slowmo_w`, the push-sum weight."""
        out = super().state_dict()
        copied = lambda v: v.clone() if isinstance(v, torch.Tensor) else copy.deepcopy(v)
        out["state"] = {k: {n: copied(v) for n, v in s.items()} for k, s in out["state"].items()}
        return out

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A state of `state_dict`, or of the wrapped optimizer in plain torch: then x0 is taken at the next forward pass.

        Load the model's parameters before or after, but before the next step. ValueError, before anything is written, for another model's.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        groups = state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("the state has other parameter groups than this optimizer: build it with the same groups")
        places = {p: place for p, (_, place) in self._stands_in_for.items()}
        order = {number: p for mine, saved in zip(self.param_groups, groups) for number, p in zip(saved["params"], mine["params"])}
        own: dict[str, torch.Tensor] = {}
        shared: dict[str, torch.Tensor] = {}
        slow: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
        wide: dict[torch.nn.Parameter, torch.Tensor] = {}
        kept: dict[torch.Tensor, dict[str, Any]] = {}  # of an optimizer that is not elementwise, as it is
        whole = isinstance(self.algorithm.base.inner, WholeOptimizer)
        known = type(self.inner_optimizer) in ELEMENTWISE
        for number, found in state_dict["state"].items():
            p = order[number]
            if p not in places:
                continue  # frozen
            for key, value in found.items():
                if key.startswith("slowmo_"):
                    if value.shape != p.shape:
                        raise ValueError(f"{key} of {places[p].name} has shape {list(value.shape)} in the state, not {list(p.shape)}")
                    if key == "slowmo_x":
                        wide[p] = value
                    else:
                        slow.setdefault(p, {})[key.removeprefix("slowmo_")] = value
                elif whole:
                    moves = isinstance(value, torch.Tensor) and key != "step"
                    kept.setdefault(p, {})[key] = value.to(p.device, copy=True) if moves else copy.deepcopy(value)
                elif known and isinstance(value, torch.Tensor) and not _fits(key, value, p):
                    raise ValueError(f"{key} of {places[p].name} has shape {list(value.shape)} in the state, not {list(p.shape)}")
                elif value is not None:
                    # numbers as torch's optimizers of today have them
                    value = value if isinstance(value, torch.Tensor) else torch.tensor(float(value)) if known else torch.as_tensor(value)
                    (own if per_element(key, value, p) else shared)[f"{key}.{places[p].name}"] = value
        if slow and [set(slow.get(p, ())) for p in places] != [set(self.algorithm.slow_names)] * len(places):
            raise ValueError("the state has x0 and u of some parameters and not of others: it is another model's, or damaged")
        base = self.algorithm.base
        if base.started:
            base.drop()
        base.inner.load(0, own, shared)
        if whole:
            self.inner_optimizer.state.update(kept)
        for p, value in wide.items():
            segment, place = self._stands_in_for[p]
            place.of(segment.x.detach(), 0).copy_(value)
        self.algorithm.slow = None
        if slow:
            blank = self.algorithm.blank()
            for p, (segment, place) in self._stands_in_for.items():
                for key, block in zip(self.algorithm.slow_names, blank[segment]):
                    place.of(block, 0).copy_(slow[p][key])
        extra = groups[0]
        for mine, saved in zip(self.param_groups, groups):
            mine.update({k: copy.deepcopy(v) for k, v in saved.items() if k not in ("params", "param_names")})
        if hasattr(base, "w"):
            base.w = torch.full_like(base.w, extra.get("slowmo_w", 1.0))
        base.steps = int(extra.get("slowmo_steps", 0))
        self._count()
        self.replicas.forget()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """ValueError after construction: what is trained is fixed then."""
        if getattr(self, "algorithm", None) is not None:
            raise ValueError("parameters cannot be added to SlowMo: build a new optimizer over all, and wrap model and optimizer again")
        super().add_param_group(param_group)

    def _count(self) -> None:
        """In the user's groups, where every way to save an optimizer's state finds it."""
        base = self.algorithm.base
        w = float(base.w) if isinstance(base, bases.SGP) and not base.regular else 1.0
        for group in self.param_groups:
            group["slowmo_steps"], group["slowmo_w"] = self.steps, w

    def _guard(self, optimizer: torch.optim.Optimizer) -> None:
        """The wrapped optimizer's own step would move this worker and send nothing."""

        def step(*_: Any, **__: Any) -> NoReturn:
            raise RuntimeError("this optimizer is wrapped in SlowMo: call the SlowMo object's step() instead")

        # a scheduler that was built on it before finds what it looks for
        step._wrapped_by_lr_sched = step._of_slowmo = True  # type: ignore[attr-defined]  # torch marks a function, too
        optimizer.step = step  # type: ignore[method-assign]  # of this one object, not of its class
        # its state is ours, and it learns of no parameter that we do not know
        for name in ("state_dict", "load_state_dict", "add_param_group"):
            ours = weakref.WeakMethod(getattr(self, name))
            setattr(optimizer, name, functools.partial(_through, ours))

    def __getstate__(self) -> NoReturn:
        raise RuntimeError("a SlowMo cannot be pickled or copied, as it holds views of the model and a process group: save state_dict()")

    def _write(self, x: list[torch.Tensor], buffers: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for segment, block in zip(self.replicas.segments, x):
                segment.x.copy_(block)
                segment.written()
            for name, buffer in self.replicas.buffers()[0].items():
                buffer.copy_(buffers[name])


def _fits(key: str, value: torch.Tensor, p: torch.Tensor) -> bool:
    """Whether a parameter's state may have this shape: its own or one number's, as counters have."""
    return value.numel() == 1 if key in COUNTERS else value.ndim == 0 or value.shape == p.shape


def _through(method: Callable[[], Callable[..., Any] | None], *args: Any, **kwargs: Any) -> Any:
    found = method()
    if found is None:
        raise RuntimeError("this optimizer was wrapped in a SlowMo that is gone: build a new one")
    return found(*args, **kwargs)


class _BeforeForward:
    """The hook of a model in a SlowMo's hands. Copies and pickles of the model are in nobody's hands: theirs does nothing."""

    def __init__(self, optimizer: SlowMo | None = None):
        self._optimizer: Callable[[], SlowMo | None] = weakref.ref(optimizer) if optimizer is not None else lambda: None

    @torch._disable_dynamo  # torch.compiler.disable, which loads the compiler when it is called and not when this module is read
    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        optimizer = self._optimizer()
        inside_backward = torch._C._current_graph_task_id() != -1  # the recomputation of a checkpoint is not a step
        if optimizer is not None and module.training and torch.is_grad_enabled() and not inside_backward:
            optimizer.before_forward()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _BeforeForward, ()

    def __deepcopy__(self, memo: Any) -> "_BeforeForward":
        return _BeforeForward()
