"""Small replicas of one process in one computation: where calling kernels costs more than computing, m times fewer calls."""

import copy
import itertools

import torch
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from slowmo.replicas import _trained

# forward FLOPs of a worker's batch below which one batched computation beat the loop on a CPU; on GPUs not tried
LIMIT = 64e6


class Together:
    """Forward and backward of all `replicas` by torch.func.vmap over their rows; gradients are added where the loop adds them."""

    def __init__(self, replicas):
        self.replicas, (n, d) = replicas, replicas.rows.shape
        self.model = torch.nn.Module()
        self.model.inner = replicas.models[0]
        names = [name for name, p in self.model.named_parameters() if _trained(p)]
        self.parameters, self.gradients, self.buffers = {}, [], {}
        for name, (_, x, _, offset) in zip(names, replicas._entries):
            leaf, gradient = (t.as_strided((n, *x.shape), (d, *x.stride()), offset) for t in (replicas.rows.detach(), replicas.rows.grad))
            self.parameters[name] = leaf.requires_grad_()
            self.gradients.append(gradient)
        for name, _ in replicas.models[0].named_buffers():
            owner, _, own = name.rpartition(".")
            owners = [model.get_submodule(owner) for model in replicas.models]
            stack = torch.stack([module._buffers[own] for module in owners])
            for module, part in zip(owners, stack):  # each model's own buffer is its part of the stack from now on
                module._buffers[own] = part
            self.buffers[f"inner.{name}"] = stack

    def __call__(self, loss, batches: list) -> torch.Tensor:
        """Each replica's loss `[n]` on its batch, after backward. RuntimeError, or ValueError for batches that do not stack."""
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

        def one(parameters, buffers, *leaves):
            self.model.forward = lambda batch: loss(self.model.inner, batch)
            return functional_call(self.model, (parameters, buffers), (tree_unflatten(leaves, flat[0][1]),))

        losses = vmap(one, in_dims=(0, 0, *dims))(self.parameters, self.buffers, *leaves)
        found = torch.autograd.grad(losses.sum() * self.replicas.loss_scale, list(self.parameters.values()), materialize_grads=True)
        for gradient, part in zip(self.gradients, found):
            gradient.add_(part)
        return losses.detach()


def where_it_pays(replicas, loss, draw) -> Together | None:
    """All replicas together where that is faster and computes the same, which is tried out on the first of `draw()`; otherwise None.

    Faster: by the forward FLOPs of a worker's batch, so that a run takes the same way wherever it goes on. Not the same: a model that
    draws random numbers (every worker has its own), whose buffers are replaced instead of written, or that vmap does not know.
    """
    rows, n = replicas.rows, len(replicas.models)
    if n == 1 or replicas.accumulate > 1 or rows.device.type != "cpu":
        return None
    if any(p.dtype != rows.dtype for p, *_ in replicas._entries):
        return None
    probe, batch = copy.deepcopy(replicas.models[0]), next(iter(draw()))
    with FlopCounterMode(display=False) as counter:
        expected = loss(probe, batch)
    if counter.get_total_flops() > LIMIT:
        return None
    trained = [p for p in probe.parameters() if _trained(p)]
    gradients = torch.autograd.grad(expected, trained, materialize_grads=True)
    grad, buffers = rows.grad.clone(), replicas.buffers()
    rows.grad.zero_()
    try:
        together = Together(replicas)
        losses = together(loss, [batch] * n)
        ours = [gradient[0] / replicas.loss_scale for gradient in together.gradients]
        kept = [(stack[0], buffer) for stack, buffer in zip(together.buffers.values(), probe.buffers())]
        same = all(_close(a, b) for a, b in itertools.chain([(losses[0], expected)], zip(ours, gradients, strict=True), kept))
    except (RuntimeError, ValueError):
        same = False
    rows.grad.copy_(grad)
    replicas.load_buffers(buffers)
    return together if same else None


def _close(ours: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal but for the order of summation."""
    ours, other = ours.detach().double(), other.detach().double()
    return bool((ours - other).abs().max() <= 1e-3 * other.abs().max() + 1e-6) if ours.numel() else True
