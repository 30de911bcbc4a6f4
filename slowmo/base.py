"""The base algorithms, together because they are read by comparison. Each is line 4 of Algorithm 1: one inner step of all workers.

The contract, four verbs over rows `[n, d]`:

    start()              before the gradients: OSGP and D-PSGD send, AllReduce arms its buckets, the others do nothing
    step(lr)             after them: x <- the next iterate, gradients zeroed
    average()            -> [1, d], exact over all m workers, changes nothing (a collective)
    restart(x, buffers)  continue from x; the optimizer's buffers: reset | maintain | average

Between steps rows hold the de-biased z = x / w, which is what models see, and no message is in flight. The optimizer turns
(gradient at z, z) into the update γd, so weight decay is taken at z. Memory beyond rows, gradients and optimizer state: `inboxes()`
blocks `[n, d]` for the gossip algorithms, `[1, d]` at an average.
"""

import torch

from slowmo.topology import Exponential, Ring, is_symmetric

BUFFERS = ("reset", "maintain", "average")


class LocalSGD:
    """x_i <- x_i - γ d_i. Workers meet only when somebody calls `average` and `restart` (see outer.py).

    optimizer: a torch optimizer whose only parameter is `replicas.rows`, elementwise (SGD, Adam, ...), so that rows do not mix.
    Where a worker is a node of several processes, their gradients are averaged first, in buckets, during backward.
    Raises ValueError for another optimizer.
    """

    _everybody = False  # whether gradients are averaged over all workers or inside a worker

    def __init__(self, replicas, optimizer: torch.optim.Optimizer):
        _check_optimizer(optimizer, replicas.rows)
        self.replicas, self.optimizer, self.cluster, self.rows = replicas, optimizer, replicas.cluster, replicas.rows
        self._fresh = _copied(optimizer.state.get(replicas.rows, {}))  # not empty for Adagrad, which fills it before the first step
        self._zeros = not self._fresh and _zeros_are_fresh(optimizer)
        self.steps = 0  # finished steps; never restarts
        self.u = None  # no slow momentum
        buckets = self._everybody and self.cluster.size > 1 or self.cluster.node > 1
        self.buckets = Buckets(replicas, inside=not self._everybody) if buckets else None

    def start(self) -> None:
        if self.buckets:
            self.buckets.arm()

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        """One inner step with learning rate `lr`; default: the one in the optimizer's parameter group."""
        self._descend(lr)
        self._done()

    @torch.no_grad()
    def average(self) -> torch.Tensor:
        """The exact mean of the workers, `[1, d]`."""
        return self.cluster.mean(self.rows)

    @torch.no_grad()
    def restart(self, x: torch.Tensor, buffers: str = "maintain", exact: bool = True) -> None:
        """All rows <- x: `[1, d]`, or with exact=False `[n, d]`, each its own.

        buffers: `reset` leaves the optimizer as if it had never stepped, `maintain` as it is; `average` averages each buffer over the
        workers and keeps counters.
        """
        if buffers not in BUFFERS:
            raise ValueError(f"buffers={buffers!r}: choose one of {', '.join(BUFFERS)}")
        self.rows.copy_(x)
        self.replicas.publish()
        if buffers == "reset" and self._zeros:  # in place: memory given back and taken anew costs more than the rest of a slow step
            _zero(self.optimizer.state.get(self.rows, {}))
        elif buffers == "reset":
            self.optimizer.state.clear()
            if self._fresh:
                self.optimizer.state[self.rows] = _copied(self._fresh)
        elif buffers == "average":
            for block in self.optimizer_rows().values():
                block.copy_(self.cluster.mean(block))

    def state(self) -> tuple[dict, dict]:
        """What a run needs to go on: tensors `[n, ...]` of workers, and tensors that are the same for all of them.

        These are views: save or clone them before the next step. The models' buffers are `replicas.buffers()`.
        """
        shared = {"steps": torch.tensor(self.steps), "lr": torch.tensor(float(self.optimizer.param_groups[0]["lr"]), dtype=torch.float64)}
        for name, value in self.optimizer.state.get(self.rows, {}).items():
            if value is not None and not _is_rows(value, self.rows):
                shared[f"optimizer.{name}"] = torch.as_tensor(value).detach()
        rows = {"z": self.rows.detach()}
        rows |= {f"optimizer.{name}": block for name, block in self.optimizer_rows().items()}
        return rows, shared

    def load(self, rows: dict, shared: dict) -> None:
        """The inverse of `state`."""
        self.steps = int(shared["steps"])
        self.rows.detach().copy_(rows["z"])
        self.replicas.publish()
        saved = {k.removeprefix("optimizer."): v.clone() for k, v in (rows | shared).items() if k.startswith("optimizer.")}
        self.optimizer.param_groups[0]["lr"] = float(shared["lr"])
        groups = self.optimizer.state_dict()["param_groups"]
        # the optimizer's own loader puts each state where that optimizer wants it (Adam's step count stays on the CPU) ...
        self.optimizer.load_state_dict({"state": {0: saved} if saved else {}, "param_groups": groups})
        for name, value in saved.items():  # ... but gives scalars the rows' dtype
            self.optimizer.state[self.rows][name] = self.optimizer.state[self.rows][name].to(value.dtype)

    def sends(self) -> tuple[float, float]:
        """What a worker sends an iteration, on average: (messages, numbers in units of d)."""
        return 0.0, 0.0

    def inboxes(self) -> float:
        """Blocks `[n, d]` that messages take, beside rows and gradients."""
        return 0

    def optimizer_rows(self) -> dict[str, torch.Tensor]:
        """The optimizer's state blocks `[n, d]` by name (momentum_buffer, exp_avg, ...)."""
        state = self.optimizer.state.get(self.rows, {})
        return {name: value for name, value in state.items() if _is_rows(value, self.rows)}

    def _descend(self, lr: float | None) -> None:
        """rows <- rows - γd, in place. The gradients are spent."""
        self.replicas.collect()
        if self.buckets:
            self.buckets.finish()
        if lr is not None:
            self.optimizer.param_groups[0]["lr"] = lr
        if self.replicas.loss_scale != 1:
            self.rows.grad.div_(self.replicas.loss_scale)
        self.optimizer.step()

    def _done(self) -> None:
        self.rows.grad.zero_()
        self.replicas.publish()
        self.steps += 1


class AllReduce(LocalSGD):
    """x_i <- x_i - γ (direction of the mean gradient): every worker takes the same step. Large-batch SGD, the baseline.

    The mean is formed in buckets while the last backward still runs (`Replicas(accumulate=k)` says which one that is).
    """

    _everybody = True

    def sends(self):
        m = self.cluster.size
        return (2.0 * (m - 1), 2 * (m - 1) / m) if m > 1 else (0.0, 0.0)  # ring: m - 1 pieces around, twice


class SGP(LocalSGD):
    """Stochastic gradient push: x <- P(x - γd), w <- Pw, z = x / w (Assran et al. 2019). Sends in `step` and waits at once.

    graph: `step -> {hop: share}`, see topology.py; default the one-peer exponential. gossip_buffers: the optimizer's blocks take
    part in every round, as in double-averaging (Yu et al. 2019). Neighbours exchange z with their weight and the receiver forms
    z_i <- Σ_j P_ij w_j z_j / w_i: nothing is scaled before it is sent, so there is no send buffer; the spent gradients' block takes the
    first arrivals. On a graph that is not regular `step` and `average` take one more temporary `[n, d]`.

    messages: `bfloat16` or `float16` rounds what workers send each other in a round, weights and exact averages stay as they are: half of
    the bytes, and a temporary of the rows' size. null: the rows' dtype.
    """

    def __init__(self, replicas, optimizer, graph=None, gossip_buffers: bool = False, messages: str | None = None):
        super().__init__(replicas, optimizer)
        graph = graph or Exponential(self.cluster.size)
        if graph.size != self.cluster.size:
            raise ValueError(f"a graph of {graph.size} workers for a cluster of {self.cluster.size}: build it with the cluster's size")
        if messages not in (None, "bfloat16", "float16"):
            raise ValueError(f"messages={messages!r}: choose bfloat16, float16, or null for the rows' own dtype")
        self.graph, self.gossip_buffers, self.messages = graph, gossip_buffers, messages and getattr(torch, messages)
        self.w = torch.ones(len(self.rows), 1, dtype=self.rows.dtype, device=self.rows.device)
        # shares that are plain numbers: all workers receive what they give, and w is 1 between steps
        self.regular = not any(isinstance(share, tuple) for step in range(graph.cycle) for share in graph(step).values())
        self._inboxes = {}

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        surplus = None if self.regular else self.rows * (1 - 1 / self.w)
        self._descend(lr)
        if surplus is not None:  # (w z - γd) / w, of z - γd
            self.rows.div_(self.w).add_(surplus)
        blocks = {"z": self.rows, **(self.optimizer_rows() if self.gossip_buffers else {})}
        rounds = {name: self._send(block, name, self.rows.grad if name == "z" else None) for name, block in blocks.items()}
        shares, w = self._weights()
        for name, block in blocks.items():
            arrivals = rounds[name]()
            block.mul_(shares[0])
            for share, arrival in zip(shares[1:], arrivals):
                _add(block, share, arrival)
        self.w = w
        self._done()

    @torch.no_grad()
    def average(self) -> torch.Tensor:
        """Σ x_i / Σ w_i. One more `[n, d]` on a graph that is not regular."""
        if self.regular:
            return self.cluster.mean(self.rows)
        return self.cluster.mean(self.rows * self.w).div_(self.cluster.mean(self.w))

    @torch.no_grad()
    def restart(self, x: torch.Tensor, buffers: str = "maintain", exact: bool = True) -> None:
        super().restart(x, buffers, exact)
        if exact:  # everybody holds the average: nobody owes weight to anybody
            self.w.fill_(1)

    def state(self):
        rows, shared = super().state()
        return rows | {"w": self.w}, shared

    def load(self, rows, shared):
        super().load(rows, shared)
        self.w.copy_(rows["w"])

    def sends(self):
        cycle = [len(self.graph(step)) - 1 for step in range(self.graph.cycle)]
        messages = sum(cycle) / len(cycle) * self._gossiped()
        return messages, messages * (self.messages.itemsize / self.rows.element_size() if self.messages else 1)

    def inboxes(self):
        return max(0, self._arriving() - 1) + self._rounded()

    def _arriving(self) -> int:
        """The most blocks that arrive in a step."""
        return max(len(self.graph(step)) - 1 for step in range(self.graph.cycle)) * self._gossiped()

    def _rounded(self) -> float:
        """Blocks that rounding takes: of each message what leaves and what arrives."""
        return 2 * self._arriving() * self.messages.itemsize / self.rows.element_size() if self.messages else 0

    def _gossiped(self) -> int:
        return 1 + (len(self.optimizer_rows()) if self.gossip_buffers else 0)

    def _send(self, block: torch.Tensor, name: str, spent: torch.Tensor | None = None):
        """Start sending `block` along this step's hops; the result waits and gives the arrivals, a block `[n, d]` a hop.

        spent: a block that may take the first of them.
        """
        receivers = []
        for k, hop in enumerate(hop for hop in self.graph(self.steps) if hop):
            if k or spent is None:
                if (name, k) not in self._inboxes:
                    self._inboxes[name, k] = torch.empty_like(block, requires_grad=False)
                inbox = self._inboxes[name, k]
            else:
                inbox = spent
            receivers.append(self.cluster.shift(block.detach(), hop, inbox, self.messages))
        return lambda: [receive() for receive in receivers]

    def _weights(self):
        """This round's (shares [kept, then one an arrival], new w): x_i <- Σ_j P_ij x_j written for z = x / w."""
        graph = self.graph(self.steps)
        kept = graph.get(0, 0.0)
        if self.regular:
            return [kept, *(share for hop, share in graph.items() if hop)], self.w
        numerators = [self._of_senders(kept, 0) * self.w]
        for hop, share in graph.items():
            if hop:
                w = self.cluster.shift(self.w, hop, torch.empty_like(self.w))()
                numerators.append(self._of_senders(share, hop) * w)
        w = sum(numerators)
        return [numerator / w for numerator in numerators], w

    def _of_senders(self, share, hop: int) -> torch.Tensor:
        """The share that each worker here gets from the worker `hop` before it, `[n, 1]`."""
        m = self.cluster.size
        values = [share[(i - hop) % m] if isinstance(share, tuple) else share for i in self.cluster.ranks]
        return torch.tensor(values, dtype=self.rows.dtype, device=self.rows.device).unsqueeze(1)


class OSGP(SGP):
    """Overlap SGP: x <- Px - γd. Sends in `start`, waits in `step`: the message travels during forward and backward.

    The same iterates as the released code, which adds an arrival at the start of the next step; here nothing is in flight between
    steps, so nothing is drained and nothing more is saved.
    """

    def __init__(self, replicas, optimizer, graph=None, messages: str | None = None):
        super().__init__(replicas, optimizer, graph, messages=messages)
        self._arrivals = None

    def start(self) -> None:
        super().start()
        self._send_once()

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:
        self._send_once()  # without a `start` the message goes out now: the same iterates, no overlap
        arrivals, self._arrivals = self._arrivals(), None
        shares, w = self._weights()
        # rows + change = (Px) / w before γd is taken off; kept in the message, so that it costs no block of its own
        change = arrivals[0].mul_(shares[1]) if arrivals else None if self.regular else torch.zeros_like(self.rows)
        for share, arrival in zip(shares[2:], arrivals[1:]):
            _add(change, share, arrival)
        if change is not None:
            _add(change, shares[0] - 1 if self.regular else shares[0] - 1 / w, self.rows)
        self._descend(lr)
        if not self.regular:
            self.rows.div_(w)
        if change is not None:
            self.rows.add_(change)
        self.w = w
        self._done()

    def inboxes(self):
        return self._arriving() + self._rounded()  # gradients are formed while messages travel: their block is not free

    def load(self, rows, shared):
        if self._arrivals is not None:  # a message of the run that is left behind
            self._arrivals()
            self._arrivals = None
        super().load(rows, shared)

    def _send_once(self) -> None:
        if self._arrivals is None:
            self._arrivals = self._send(self.rows, "z")


class DPSGD(OSGP):
    """D-PSGD (Lian et al. 2017): x <- Wx - γd with W symmetric, so that weights stay 1. The same messages as OSGP, both ways.

    graph: default the ring. Raises ValueError for one that is not symmetric.
    """

    def __init__(self, replicas, optimizer, graph=None, messages: str | None = None):
        graph = graph or Ring(replicas.cluster.size)
        if not all(is_symmetric(graph, step) for step in range(graph.cycle)):
            raise ValueError(f"D-PSGD needs symmetric mixing, {type(graph).__name__} is not: choose base/graph=ring or complete")
        super().__init__(replicas, optimizer, graph, messages)


class Buckets:
    """Averages gradients over processes while backward still runs.

    Gradients are slices of one row, so a bucket is a contiguous slice: nothing is copied (with n > 1 rows here, their sum `[1, d]` is
    formed and sent). Buckets are closed at parameter boundaries, from the end of the row, which backward reaches first, and go out
    in that order on every process, whatever order gradients arrive in; a gradient that never comes holds nothing up. The first is small,
    so that the wire is busy early; the last two are halves, because no computation hides the last.
    """

    megabytes = 25.0  # of a bucket, as DDP's

    def __init__(self, replicas, inside: bool):
        self.replicas, self.cluster, self.inside = replicas, replicas.cluster, inside
        full, bucket_of, slices = self.megabytes * 2**20 / replicas.rows.element_size(), {}, []
        stop, least = replicas.parameters, full / 25
        for offset, _ in reversed(replicas.slices()):
            bucket_of[offset] = len(slices)
            if stop - offset >= least or offset == 0:
                slices.append((offset, stop))
                stop, least = offset, min(full, max(offset, full) / 2)
        self.slices, self.bucket_of, self.armed = slices, bucket_of, False
        self._clear()
        if self.cluster.processes > 1:
            replicas.on_gradient(self._arrived, when=lambda: self.armed)

    def arm(self) -> None:
        """Backward passes count from here. What a skipped step left under way is dropped."""
        if self.means:
            self._wait()
            self._clear()
            self.replicas.gradients().zero_()
        self.armed = True

    @torch.no_grad()
    def finish(self) -> None:
        """Send what is left, wait, and leave the mean in every row."""
        while len(self.means) < len(self.slices):
            self._send()
        self._wait()
        grads = self.replicas.gradients()
        if len(grads) > 1:
            for (start, stop), mean in zip(self.slices, self.means):
                grads[:, start:stop] = mean
        self.armed = False
        self._clear()

    def _wait(self) -> None:
        for handle in self.handles:
            if handle is not None:
                handle.wait()

    def _clear(self) -> None:
        self.means, self.handles = [], []
        self.missing = [0] * len(self.slices)
        for bucket in self.bucket_of.values():
            self.missing[bucket] += len(self.replicas.models) * self.replicas.accumulate

    @torch.no_grad()
    def _arrived(self, offset: int) -> None:
        self.missing[self.bucket_of[offset]] -= 1
        while len(self.means) < len(self.slices) and self.missing[len(self.means)] <= 0:
            self._send()

    def _send(self) -> None:
        start, stop = self.slices[len(self.means)]
        grads = self.replicas.gradients()[:, start:stop]
        part = grads[0] if len(grads) == 1 else grads.sum(0)
        part.div_(self.cluster.node if self.inside else self.cluster.processes * len(grads))  # now, while backward still runs
        self.means.append(part)
        self.handles.append(self.cluster.reduce(part, inside=self.inside, wait=False))


def _add(block: torch.Tensor, share, arrival: torch.Tensor) -> None:
    """block += share * arrival, without a temporary."""
    block.add_(arrival, alpha=share) if not isinstance(share, torch.Tensor) else block.addcmul_(arrival, share)


def _twin(optimizer: torch.optim.Optimizer, parameters: list) -> torch.optim.Optimizer:
    """Another optimizer that computes the same on a CPU."""
    kernels = ("fused", "foreach", "capturable")  # how it is computed, not what
    twin = type(optimizer)(parameters, lr=0.1)
    twin.param_groups[0].update({k: v for k, v in optimizer.param_groups[0].items() if k != "params" and k not in kernels} | {"lr": 0.1})
    return twin


def _zeros_are_fresh(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a state of zeros steps exactly as one that is not there yet: with Adam, and with SGD without dampening."""
    ends = []
    for zeros in (True, False):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
        twin = _twin(optimizer, [p])
        for step in range(4):
            if step == 2 and zeros:
                _zero(twin.state[p])
            elif step == 2:
                twin.state.clear()
            p.grad = (1 - 0.7 * step) * p.detach() ** 2
            twin.step()
        ends.append(p.detach())
    return all(isinstance(value, torch.Tensor) for value in twin.state[p].values() if value is not None) and torch.equal(*ends)


def _zero(state: dict) -> None:
    for value in state.values():
        if isinstance(value, torch.Tensor):
            value.zero_()


def _copied(state: dict) -> dict:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def _is_rows(value, rows: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == rows.shape


def _check_optimizer(optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> None:
    """One parameter, the rows; and elementwise: two rows in one block step exactly as each element on its own."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"the optimizer is a {type(optimizer).__name__}: build a torch.optim optimizer over [replicas.rows]")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(parameters) != 1 or parameters[0] is not rows:
        raise ValueError("the optimizer must hold one parameter, the block of rows: torch.optim.SGD([replicas.rows], lr=...)")
    name = type(optimizer).__name__
    remedy = f"{name} is not elementwise, it would mix workers: choose one that is (SGD, Adam, AdamW, RMSprop, Adagrad, ...)"
    start = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]], dtype=torch.float64)
    results = []
    try:
        for pieces in ([start], list(start.reshape(-1, 1, 1))):
            pieces = [torch.nn.Parameter(piece.clone()) for piece in pieces]
            twin = _twin(optimizer, pieces)
            for scale in (1.0, -0.3):
                for p in pieces:
                    p.grad = scale * p.detach() ** 2
                twin.step()
            results.append(torch.cat([p.detach().flatten() for p in pieces]))
    except Exception as error:
        raise ValueError(remedy) from error
    if not torch.allclose(*results, rtol=1e-12, atol=1e-12):
        raise ValueError(remedy)
