"""The only place where nn.Module meets rows."""

import copy
import gc
import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from slowmo.buckets import Bucket, Segment, cut, fragments, is_dense
from slowmo.cluster import Cluster

# models in the hands of a Replicas
_OWNERS: weakref.WeakKeyDictionary[torch.nn.Module, "weakref.ref[Replicas]"] = weakref.WeakKeyDictionary()


class Replicas:
    """One copy of `model` for each worker hosted here, its parameters and gradients views into the rows of segments.

    param_groups: the parameter groups of the optimizer of `model`, a list of dicts whose `params` are the model's parameters (default:
    all in one). segments: tensors `[n, d]`, one row per worker, see buckets.py; buckets: lists of neighbouring segments, about
    `bucket_cap_mb` MiB per row, one bucket for everything where nothing is sent. Backward adds into the gradients where they lie, and
    the algorithm's `step` zeroes them: nobody needs to call zero_grad. Frozen parameters stay as they are.

    Strides survive (channels_last), so do ties. Parameters of another dtype than `dtype` (default: the widest of the model) are
    copies refreshed after each update, so that a bfloat16 layer gets master weights in the row. Everybody starts from rank 0's
    parameters and buffers. `model` itself becomes `models[0]`. cluster: default one worker per rank, on the model's device.

    accumulate: backward passes of each replica per step; their gradients add up. loss_scale: what the caller multiplies losses by,
    against underflow in float16; `step` divides the gradients by it, and until then they are so much larger, for a clip too.
    num_fragments: of the model, for outer.Streaming.

    Raises ValueError for a model without trainable parameters, on several devices, complex, sharded, without memory, in the hands of
    another `Replicas`, or that differs between ranks, and for groups of other parameters than the model's.
    """

    def __init__(self, model: torch.nn.Module, cluster: Cluster | None = None, param_groups: list[dict] | None = None,
                 dtype: torch.dtype | None = None, bucket_cap_mb: float = 25.0, accumulate: int = 1, loss_scale: float = 1.0,
                 num_fragments: int = 1):  # fmt: skip
        named = [(name, p) for name, p in model.named_parameters() if _trained(p)]
        trained = [p for _, p in named]
        dtype = dtype or _widest(trained)
        if not isinstance(num_fragments, int) or num_fragments < 1:
            raise ValueError(f"num_fragments={num_fragments}: the number of fragments is a whole number >= 1")
        if not bucket_cap_mb > 0 or accumulate < 1:
            raise ValueError(f"bucket_cap_mb={bucket_cap_mb} and accumulate={accumulate}: a positive size, and at least one backward pass")
        if _owned(model):
            raise ValueError("this model is already in the hands of another SlowMo or Replicas: wrap it once, or a copy of it")
        cluster = cluster or Cluster(device=trained[0].device)
        if trained[0].is_meta and cluster.device.type != "meta":
            raise ValueError("the model is on the meta device: give its parameters memory first, model.to_empty(device=...)")
        if cluster.device.type != trained[0].device.type:
            raise ValueError(f"the model is on {trained[0].device}, the cluster on {cluster.device}: give both the same device")
        groups = _groups(trained, param_groups)
        if cluster.world_size > 1:
            order = lambda p: [s for s, n in zip(p.stride(), p.shape) if n > 1] if is_dense(p) else None
            facts = [(name, tuple(p.shape), order(p), str(p.dtype), group) for (name, p), group in zip(named, groups)]
            agree(cluster, "the model", facts)
            # what is not trained comes from rank 0 too
            for fixed in (*model.buffers(), *(p for p in model.parameters() if not _trained(p))):
                cluster.broadcast(fixed)
        self.cluster, self.models, self.accumulate, self.loss_scale, self.dtype = cluster, [model], accumulate, loss_scale, dtype
        self.models += [copy.deepcopy(model) for _ in cluster.local_workers[1:]]
        _OWNERS[model] = weakref.ref(self)
        self.num_fragments = num_fragments
        self.numel = sum(p.numel() for p in trained)
        limit = bucket_cap_mb if cluster.world_size > 1 else float("inf")
        self.buckets: list[Bucket] = cut(
            named, list(zip(groups, fragments(named, num_fragments))), len(cluster.local_workers), dtype, limit
        )
        self.segments: list[Segment] = [segment for bucket in self.buckets for segment in bucket.segments]
        self._copy: torch.nn.Module | None = None
        self._hooks: list[Callable[[], Callable[..., None] | None]] = []
        for row, replica in enumerate(self.models):
            parameters = [p for p in replica.parameters() if _trained(p)]
            for segment in self.segments:
                segment.adopt(row, [parameters[place.index] for place in segment.places])
        if cluster.device.type != "meta":
            for segment in self.segments:
                first = segment.x.detach()[:1].clone()
                cluster.broadcast(first)
                segment.x.detach().copy_(first)
                segment.written()
        self._parameters, self._trained = [id(p) for p in model.parameters()], [_trained(p) for p in model.parameters()]
        self._versions: list[int] | None = None

    # --- what the engine asks ---

    def check(self, frozen: bool = False) -> bool:
        """Whether somebody else has written to the first model's parameters since `remember`.

        RuntimeError where parameters were moved, cast, replaced, frozen or freed after they became views: training would do nothing.
        frozen: not for those that are frozen or freed.
        """
        parameters = list(self.models[0].parameters())
        if self.replaced(parameters) or not all(segment.in_place() for segment in self.segments):
            raise RuntimeError(
                "a parameter was moved, cast, added or replaced after it was wrapped, training would do nothing: change the model "
                "(to(...), double(), a new layer, load_state_dict(assign=True)) before wrapping it, and wrap model and optimizer anew after"
            )
        if not frozen and [_trained(p) for p in parameters] != self._trained:
            raise RuntimeError("a parameter was frozen or freed after it was wrapped: wrap model and optimizer anew")
        return self._versions is not None and self._versions != self._now()

    def replaced(self, parameters: Iterable[torch.nn.Parameter] | None = None) -> bool:
        """Whether the first model has other parameters (as they are now) than it had, for a while (functional_call) or for good."""
        return [id(p) for p in parameters or self.models[0].parameters()] != self._parameters

    def remember(self) -> None:
        """The parameters are as the algorithm left them."""
        self._versions = self._now()

    def forget(self) -> None:
        """Whatever is written until the next step is welcome."""
        self._versions = None

    @property
    def forgotten(self) -> bool:
        return self._versions is None

    def accept_writes(self) -> None:
        """Where `forget` said so, or nothing has been remembered yet: the parameters as they are now are the rows."""
        if self._versions is None:
            for segment in self.segments:
                segment.take_writes()
            self.remember()

    def _now(self) -> list[int]:
        return [p._version for segment in self.segments for p, _, _ in segment.members[: len(segment.places)]]

    def release(self) -> None:
        """The first model is nobody's again, and may be wrapped anew."""
        _OWNERS.pop(self.models[0], None)
        for segment in self.segments:
            for p, _, _ in segment.members:
                p.grad = None

    def register_grad_hook(self, call: Callable[..., None]) -> None:
        """After backward has written a parameter's gradient: `call(index)` of its bucket, once per parameter, replica and backward pass.
        A method is held weakly, so that a model does not keep alive who wrapped it."""
        found = weakref.WeakMethod(call) if inspect.ismethod(call) else lambda: call
        self._hooks.append(found)

        def hook(index: int) -> None:
            if (method := found()) is not None:
                method(index)

        for bucket in self.buckets:
            for segment in bucket.segments:
                for p, _, _ in segment.members:
                    p.register_post_accumulate_grad_hook(lambda p, index=bucket.index: hook(index))

    def watch_grads(self) -> None:
        """Segments learn of each gradient that arrives, before the hooks that are registered from now on."""
        for segment in self.segments:
            seen = weakref.ref(segment)  # a model keeps nobody alive

            def hook(p: torch.Tensor, seen: "weakref.ref[Segment]" = seen) -> None:
                if (found := seen()) is not None:
                    found.arrived = True

            for p, _, _ in segment.members:
                p.register_post_accumulate_grad_hook(hook)

    def announce_grads(self) -> None:
        """Gradients of all replicas were written without backward's hooks: call these."""
        for method in filter(None, (call() for call in self._hooks)):
            for bucket in self.buckets:
                for _ in range(sum(len(segment.members) for segment in bucket.segments)):
                    method(bucket.index, during_backward=False)

    # --- parameters by name and as one row ---

    def named(self, blocks: list[torch.Tensor], row: int) -> dict[str, torch.Tensor]:
        """`blocks`, one `[n, d]` or `[1, d]` for each segment, as views by parameter name."""
        return {place.name: place.of(block, row) for segment, block in zip(self.segments, blocks) for place in segment.places}

    def flat(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        """`blocks` as one new tensor `[n or 1, numel]`, in the order of `model.parameters()` and of each one's memory."""
        parts: dict[int, torch.Tensor] = {}
        for segment, block in zip(self.segments, blocks):
            parts |= {place.index: part for place, part in zip(segment.places, segment.used(block))}
        return torch.cat([parts[index].detach() for index in range(len(parts))], 1)

    def rows(self) -> torch.Tensor:
        """A copy of the workers' iterates, `[n, numel]`."""
        return self.flat([segment.x for segment in self.segments])

    def gradients(self) -> torch.Tensor:
        """A copy of the workers' gradients, `[n, numel]`."""
        return self.flat([segment.grad for segment in self.segments])

    # --- buffers ---

    def buffers(self) -> list[dict[str, torch.Tensor]]:
        """The persistent buffers (BatchNorm statistics, counters) of each worker's model by name: the tensors themselves."""
        return [_kept(model) for model in self.models]

    @torch.no_grad()
    def mean_buffers(self) -> dict[str, torch.Tensor]:
        """New tensors: the average over all workers of what is floating or complex, rank 0's of the rest. A collective."""
        return _averaged(self.buffers(), self.cluster)

    @torch.no_grad()
    def mean_buffers_in_worker(self) -> dict[str, torch.Tensor] | None:
        """The same inside this rank's worker, where it is several ranks; else None: the model holds its worker's own."""
        return _averaged(self.buffers(), self.cluster, inside=True) if self.cluster.worker_size > 1 else None

    @torch.no_grad()
    def load_buffers(self, workers: list[dict[str, torch.Tensor]]) -> None:
        """The inverse of `buffers`."""
        for mine, given in zip(self.buffers(), workers, strict=True):
            for name, buffer in mine.items():
                buffer.copy_(given[name])

    @torch.no_grad()
    def materialize(self, x: list[torch.Tensor], buffers: dict[str, torch.Tensor]) -> torch.nn.Module:
        """A model in eval mode with parameters `x`, one `[1, d]` for each segment, and `buffers`: one copy, reused by the next call."""
        if self._copy is None:
            self._copy = copy.deepcopy(self.models[0])
            for module in self._copy.modules():  # vectorize.py makes buffers parts of a stack, and copies would hold all of it
                module._buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
        return self.filled(self._copy, x, buffers)

    @torch.no_grad()
    def filled(self, model: torch.nn.Module, x: list[torch.Tensor], buffers: dict[str, torch.Tensor]) -> torch.nn.Module:
        """`model`, a copy of the first one, in eval mode with parameters `x` and `buffers`."""
        parameters = dict(model.named_parameters())
        for name, value in self.named(x, 0).items():
            parameters[name].copy_(value)
        for name, buffer in _kept(model).items():
            buffer.copy_(buffers[name])
        return model.eval()


def recalibrate(model: torch.nn.Module, batches: Iterable[Any], forward: Callable[[torch.nn.Module, Any], Any]) -> None:
    """Recompute BatchNorm statistics of `model` as plain averages over `forward(model, batch)` for each batch, without gradients."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # the cumulative average
        module.train()
    with torch.no_grad():
        for batch in batches:
            forward(model, batch)
    for module, momentum in zip(norms, momenta):
        module.momentum = momentum
        module.eval()


def _owned(model: torch.nn.Module) -> bool:
    """Whether whoever wrapped it is still there; who was let go lives in a cycle of references until the next collection."""
    alive = lambda: model in _OWNERS and _OWNERS[model]() is not None
    return alive() and (gc.collect(), alive())[1]


def _trained(p: torch.Tensor) -> bool:
    return p.requires_grad and p.numel() > 0


def _widest(trained: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype of rows. ValueError for parameters that rows cannot hold."""
    if not trained:
        raise ValueError("the model has no parameter that requires a gradient: nothing to train")
    if any(type(p.data) is not torch.Tensor for p in trained):
        kind = next(type(p.data).__name__ for p in trained if type(p.data) is not torch.Tensor)
        raise ValueError(f"the model's parameters are {kind}s: sharded models are not supported, give every rank whole parameters")
    if len({p.device for p in trained}) > 1 or not all(p.is_floating_point() for p in trained):
        raise ValueError("the model's parameters must be real and on one device: move it with model.to(device)")
    dtype = trained[0].dtype
    for p in trained:
        dtype = torch.promote_types(dtype, p.dtype)
    return dtype


def _groups(trained: list[torch.nn.Parameter], param_groups: list[dict] | None) -> list[int]:
    """Of each parameter the number of its group. ValueError where groups and model do not hold the same trained parameters."""
    if param_groups is None:
        return [0] * len(trained)
    group_of = {p: number for number, group in enumerate(param_groups) for p in group["params"] if _trained(p)}
    missing, foreign = sum(p not in group_of for p in trained), len(set(group_of) - set(trained))
    if missing or foreign:
        raise ValueError(
            f"the optimizer lacks {missing} of the model's trainable parameters and holds {foreign} that are not the model's: build it "
            "over model.parameters(), and freeze the rest with requires_grad_(False)"
        )
    return [group_of[p] for p in trained]


def agree(cluster: Cluster, what: str, facts: Any) -> None:
    """ValueError on every rank where `facts` differ between ranks."""
    for rank, other in enumerate(cluster.all_gather_object(facts)):
        if other != facts:
            raise ValueError(f"{what} of rank {cluster.rank} is not that of rank {rank}: build both from the same configuration")


def _kept(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are state: a table of positions, say, is not."""
    names = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}


def _averaged(workers: list[dict[str, torch.Tensor]], cluster: Cluster, inside: bool = False) -> dict[str, torch.Tensor]:
    """In one message of float64, which holds float32 exactly; what has no average comes from the first worker."""
    out = {name: buffer.detach().clone() for name, buffer in workers[0].items()}
    numbers = [name for name, buffer in out.items() if buffer.is_floating_point() or buffer.is_complex()]
    if numbers:
        rows = (torch.cat([_real(worker[name]).to(cluster.device) for name in numbers]) for worker in workers)
        total = sum(rows, torch.zeros((), dtype=torch.float64, device=cluster.device))
        cluster.all_reduce(total, inside=inside)
        total /= cluster.worker_size if inside else len(workers) * cluster.world_size
        for name, part in zip(numbers, total.split([_real(out[name]).numel() for name in numbers])):
            value = torch.view_as_complex(part.view(*out[name].shape, 2)) if out[name].is_complex() else part.view(out[name].shape)
            out[name].copy_(value)
    if not inside:
        for name in sorted(out.keys() - set(numbers)):
            cluster.broadcast(out[name])
    return out


def _real(buffer: torch.Tensor) -> torch.Tensor:
    buffer = buffer.detach()
    return (torch.view_as_real(buffer) if buffer.is_complex() else buffer).double().flatten()
