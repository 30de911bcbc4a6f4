"""Small replicas of one rank in one computation: where calling kernels costs more than computing, m times fewer calls.

Sums then come in another order, so a run is equal to the loop's up to rounding only: it is a choice of the config, see `vectorized`.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from slowmo.replicas import Replicas

Loss = Callable[[torch.nn.Module, Any], torch.Tensor]
MODES = ("auto", True, False)
# forward FLOPs of a worker's batch below which one batched computation beat the loop on a CPU; on GPUs not tried
MAX_FLOPS = 64e6


class _Around(torch.nn.Module):
    """A model, with the computation of its loss as `forward`."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner = inner


class VmapReplicas:
    """Forward and backward of all `replicas` by torch.func.vmap over their rows; gradients are added where the loop adds them."""

    def __init__(self, replicas: Replicas):
        self.replicas = replicas
        self.model = _Around(replicas.models[0])
        self.parameters: dict[str, torch.Tensor] = {}
        self.gradients: list[torch.Tensor] = []
        self.buffers: dict[str, torch.Tensor] = {}
        for segment in replicas.segments:
            for place in segment.places:
                self.parameters[f"inner.{place.name}"] = place.stacked(segment.x.detach()).requires_grad_()
                self.gradients.append(place.stacked(segment.grad))
        for name, _ in replicas.models[0].named_buffers():
            owner, _, own = name.rpartition(".")
            owners = [model.get_submodule(owner) for model in replicas.models]
            stack = torch.stack([module.get_buffer(own) for module in owners])
            # each model's own buffer is its part of the stack from now on, in a storage of its own: saving a model writes that only
            for module, part in zip(owners, stack):
                module._buffers[own] = torch.from_dlpack(part)
            self.buffers[f"inner.{name}"] = stack
        # glibc gives freed memory back to the system beyond twice the largest piece it has seen freed, of 32 MB at the most, and then takes
        # it anew page by page: for the activations of all replicas an eighth of an iteration
        torch.empty(31 * 2**20, dtype=torch.uint8)

    def __call__(self, loss: Loss, batches: list[Any]) -> torch.Tensor:
        """Each replica's loss `[n]` on its batch, after backward. RuntimeError, or ValueError for batches that do not stack."""
        losses, found = self.gradients_of(loss, batches, self.parameters, self.buffers)
        with torch.no_grad():
            for gradient, part in zip(self.gradients, found):
                gradient.add_(part)
        self.replicas.announce_grads()
        return losses

    def gradients_of(
        self, loss: Loss, batches: list[Any], parameters: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(losses `[n]`, the gradient `[n, ...]` of each of `parameters`); `buffers` are updated."""
        flat = [tree_flatten(batch) for batch in batches]
        leaves, dims = [], []
        for parts in zip(*(leaves for leaves, _ in flat), strict=True):
            if isinstance(parts[0], torch.Tensor):
                leaves.append(torch.stack(parts))
            elif all(part is parts[0] for part in parts):
                leaves.append(parts[0])
            else:
                raise ValueError("batches of this kind do not stack")
            dims.append(0 if isinstance(parts[0], torch.Tensor) else None)

        def one(parameters: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor], *leaves: Any) -> Any:
            self.model.forward = lambda batch: loss(self.model.inner, batch)
            return functional_call(self.model, (parameters, buffers), (tree_unflatten(leaves, flat[0][1]),))

        losses = vmap(one, in_dims=(0, 0, *dims))(parameters, buffers, *leaves)
        found = torch.autograd.grad(losses.sum() * self.replicas.loss_scale, list(parameters.values()), materialize_grads=True)
        return losses.detach(), found


def vectorized(replicas: Replicas, loss: Loss, batch: Any, mode: str | bool = "auto") -> VmapReplicas | None:
    """The replicas in one computation, or None for the loop. Changes nothing that training sees.

    mode: True, or ValueError where it cannot be; False; or `auto`: where it is faster, judged by the forward FLOPs of a worker's `batch`
    so that a run takes the same way wherever it goes on, and computes the same, which is tried out on copies. Not the same: a model that
    draws random numbers (every worker has its own), whose buffers are replaced instead of written, or that vmap does not know.
    """
    if mode not in MODES:
        raise ValueError(f"vectorize={mode}: choose auto, true or false")
    if not mode or len(replicas.models) == 1:
        return None
    obstacle = None
    if replicas.accumulate > 1:
        obstacle = "a worker's batch comes in several pieces"
    elif any(p.dtype != x.dtype for segment in replicas.segments for p, x, _ in segment.members):
        obstacle = "parameters have several dtypes"
    elif mode == "auto" and (replicas.segments[0].x.device.type != "cpu" or _forward_flops(replicas, loss, batch) > MAX_FLOPS):
        return None
    obstacle = obstacle or _differs(replicas, loss, batch)
    if obstacle and mode != "auto":
        raise ValueError(f"vectorize=true cannot be: {obstacle}; choose auto or false")
    return None if obstacle else VmapReplicas(replicas)


def _forward_flops(replicas: Replicas, loss: Loss, batch: Any) -> float:
    with FlopCounterMode(display=False) as counter, torch.random.fork_rng(devices=[]):
        loss(copy.deepcopy(replicas.models[0]), batch)
    return counter.get_total_flops()


def _differs(replicas: Replicas, loss: Loss, batch: Any) -> str | None:
    """Why one computation of all replicas is not the loop, found out on copies."""
    probe, n = copy.deepcopy(replicas.models[0]), len(replicas.models)
    names = [place.name for segment in replicas.segments for place in segment.places]
    parameters = dict(probe.named_parameters())
    trial = VmapReplicas.__new__(VmapReplicas)
    trial.replicas, trial.model = replicas, _Around(copy.deepcopy(probe))
    stacked = {f"inner.{name}": torch.stack([parameters[name].detach()] * n).requires_grad_() for name in names}
    buffers = {f"inner.{name}": torch.stack([buffer] * n) for name, buffer in probe.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        expected = loss(probe, batch)
        gradients = torch.autograd.grad(expected, [parameters[name] for name in names], materialize_grads=True)
        try:
            losses, found = trial.gradients_of(loss, [batch] * n, stacked, buffers)
        except (RuntimeError, ValueError) as error:
            return f"{error}".splitlines()[0]
    pairs = itertools.chain(
        [(losses[0], expected)],
        zip((part[0] / replicas.loss_scale for part in found), gradients, strict=True),
        ((buffers[f"inner.{name}"][0], buffer) for name, buffer in probe.named_buffers()),
    )
    return None if all(_close(a, b) for a, b in pairs) else "the model computes something else then, as with dropout"


def _close(ours: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for the order of summation."""
    ours, other = ours.detach().double(), other.detach().double()
    return bool((ours - other).abs().max() <= 1e-3 * other.abs().max() + 1e-6) if ours.numel() else True
