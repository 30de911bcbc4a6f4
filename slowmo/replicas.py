"""The only place where nn.Module meets rows."""

import copy

import torch

from slowmo.cluster import Cluster


class Replicas:
    """One copy of `model` for each worker hosted here, its parameters and gradients views into the rows of one block.

    rows: a Parameter `[n, d]` whose `.grad` `[n, d]` is always there: give it to a torch optimizer as its only parameter. Backward
    adds into the gradients where they lie, and the algorithm's `step` zeroes them: nobody calls zero_grad. A row holds the
    `parameters` numbers that require a gradient, tied ones once, in the order of `model.parameters()`, then zeros up to d, a multiple
    of 64 bytes: an element then meets the same vector instruction under every folding, so that gossip gives the same bits. Frozen
    parameters stay as they are.

    Strides survive (channels_last), so do ties. Parameters of another dtype than `dtype` (default: the widest of the model) are
    copies refreshed after each update, so that a bfloat16 layer gets master weights in the row. Everybody starts from process 0's
    parameters and buffers. `model` itself becomes `models[0]`. cluster: default one worker a process, on the model's device.

    accumulate: backward passes of each replica between `start` and `step`; their gradients add up. loss_scale: what the caller
    multiplies losses by, against underflow in float16; `step` divides the gradients by it.

    Raises ValueError for a model without trainable parameters, on several devices, or with complex ones.
    """

    def __init__(self, model: torch.nn.Module, cluster: Cluster | None = None, dtype: torch.dtype | None = None,
                 accumulate: int = 1, loss_scale: float = 1.0):  # fmt: skip
        trained = [p for p in model.parameters() if _trained(p)]
        if not trained:
            raise ValueError("the model has no parameter that requires a gradient: nothing to train")
        if len({p.device for p in trained}) > 1 or not all(p.is_floating_point() for p in trained):
            raise ValueError("the model's parameters must be real and on one device: move it with model.to(device)")
        if dtype is None:
            dtype = trained[0].dtype
            for p in trained:
                dtype = torch.promote_types(dtype, p.dtype)
        cluster = cluster or Cluster(device=trained[0].device)
        if cluster.device.type != trained[0].device.type:
            raise ValueError(f"the model is on {trained[0].device}, the cluster on {cluster.device}: give both the same device")
        if cluster.processes > 1:  # what is not trained comes from process 0 too
            for fixed in (*model.buffers(), *(p for p in model.parameters() if not _trained(p))):
                value = fixed.detach().clone(memory_format=torch.contiguous_format)
                cluster.broadcast(value)
                fixed.detach().copy_(value)
        self.cluster, self.models, self.accumulate, self.loss_scale = cluster, [model], accumulate, loss_scale
        self.models += [copy.deepcopy(model) for _ in cluster.ranks[1:]]
        self.parameters = sum(p.numel() for p in trained)
        line = 64 // dtype.itemsize
        n, d = len(cluster.ranks), -(-self.parameters // line) * line
        self.rows = torch.nn.Parameter(torch.zeros(n, d, dtype=dtype, device=trained[0].device))
        self.rows.grad = torch.zeros_like(self.rows)
        self._entries, self._copy = [], None
        for row, replica in enumerate(self.models):
            offset = 0
            for p in filter(_trained, replica.parameters()):
                stride = p.stride() if _dense(p) else torch.empty(p.shape, device="meta").stride()
                x, g = (t.as_strided(p.shape, stride, row * d + offset) for t in (self.rows.detach(), self.rows.grad))
                x.copy_(p.detach())
                if p.dtype == dtype:
                    p.data, p.grad = x, g
                else:
                    p.grad = None
                self._entries.append((p, x, g, offset))
                offset += p.numel()
        if not self.rows.is_meta:
            first = self.rows.detach()[:1].clone()
            cluster.broadcast(first)
            self.rows.detach().copy_(first)
            self.publish()

    def collect(self) -> None:
        """Bring home gradients that are not views: those of another dtype, and those that a zero_grad of the user's replaced."""
        for p, x, g, _ in self._entries:
            if p.grad is not g:
                self._land(p, g)
        self.gradients()

    def gradients(self) -> torch.Tensor:
        """The block `[n, d]` of gradients. RuntimeError when somebody took it away."""
        if self.rows.grad is None:
            raise RuntimeError("rows.grad is gone: do not call optimizer.zero_grad(), the algorithm's step zeroes the gradients")
        return self.rows.grad

    def publish(self) -> None:
        """Copy rows to the parameters that are not views (those of another dtype)."""
        for p, x, _, _ in self._entries:
            if p.dtype != x.dtype:
                p.data.copy_(x)

    def on_gradient(self, call, when) -> None:
        """After backward has written a parameter's gradient, and if `when()`, `call(offset)`: its place in the row, once a replica."""

        def hook(p, g, offset):
            if when():
                if p.grad is not g:
                    self._land(p, g)
                call(offset)

        for p, _, g, offset in self._entries:
            p.register_post_accumulate_grad_hook(lambda p, g=g, offset=offset: hook(p, g, offset))

    def slices(self) -> list[tuple[int, int]]:
        """(offset, numel) of each parameter in a row, in order."""
        return [(offset, p.numel()) for p, _, _, offset in self._entries[: len(self._entries) // len(self.models)]]

    def buffers(self) -> torch.Tensor:
        """The models' persistent buffers (BatchNorm statistics, counters) `[n, b]` in float64, which holds float32 and counters exactly."""
        return torch.stack([_flat(_kept(model), self.rows.device) for model in self.models])

    def load_buffers(self, values: torch.Tensor) -> None:
        """The inverse of `buffers`."""
        for model, row in zip(self.models, values):
            _fill(_kept(model), row)

    def snapshot(self, x: torch.Tensor, buffers: torch.Tensor) -> torch.nn.Module:
        """A model in eval mode with parameters `x` `[1, d]` and buffers `[1, b]`: one copy, reused by the next call."""
        if self._copy is None:
            self._copy = copy.deepcopy(self.models[0])
            for module in self._copy.modules():  # together.py makes buffers parts of a stack, and copies would hold all of it
                module._buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in module._buffers.items()}
        _fill(filter(_trained, self._copy.parameters()), x[0], [view for _, view, _, _ in self._entries])
        _fill(_kept(self._copy), buffers[0])
        return self._copy.eval()

    @staticmethod
    def _land(p: torch.nn.Parameter, g: torch.Tensor) -> None:
        if p.dtype != g.dtype:
            if p.grad is not None:
                g.add_(p.grad)
                p.grad = None
            return
        g.copy_(p.grad) if p.grad is not None else g.zero_()  # no gradient is a gradient of zero
        p.grad = g


def recalibrate(model: torch.nn.Module, batches, forward) -> None:
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


def _trained(p: torch.Tensor) -> bool:
    return p.requires_grad and p.numel() > 0


def _kept(model: torch.nn.Module) -> list[torch.Tensor]:
    """Buffers that are state: a table of positions, say, is not."""
    names = model.state_dict(keep_vars=True).keys()
    return [buffer for name, buffer in model.named_buffers() if name in names]


def _dense(p: torch.Tensor) -> bool:
    """Whether p's elements fill one stretch of memory without holes or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(p.stride(), p.shape) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _flat(tensors, device) -> torch.Tensor:
    tensors = [t.detach().double().flatten() for t in tensors]
    return torch.cat(tensors) if tensors else torch.zeros(0, dtype=torch.float64, device=device)


def _fill(tensors, values: torch.Tensor, like=None) -> None:
    """Write consecutive stretches of `values` into `tensors`, each in the memory order of its fellow in `like`."""
    offset = 0
    for k, tensor in enumerate(tensors):
        part = values[offset : offset + tensor.numel()]
        part = part.view(tensor.shape) if like is None else part.as_strided(tensor.shape, like[k].stride())
        tensor.detach().copy_(part)
        offset += tensor.numel()
