"""Our algorithms against independent code: plain loops over separate workers, torch's local SGD, fairscale's SlowMo."""

import functools
from unittest import mock

import pytest
import torch
from helpers import average, build, run
from processes import spawn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import slowmo
from slowmo.outer import Average, SlowMo

M, TAU, STEPS = 5, 3, 11  # three rounds and a part of one; with 5 workers the exponential graph has hops 1, 2, 4
ALPHA, BETA = 0.8, 0.6
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=1.0, weight_decay=0.02),
    "nesterov": functools.partial(torch.optim.SGD, lr=1.0, momentum=0.9, nesterov=True, weight_decay=0.02),
    "no decay": functools.partial(torch.optim.SGD, lr=1.0, momentum=0.9, nesterov=True),
    "adam": functools.partial(torch.optim.Adam, lr=1.0, betas=(0.8, 0.9), weight_decay=0.02),
}


class Regression:
    """Two layers of different shapes in float64; each worker has its own function to learn, and new samples at each step."""

    seed = 0

    def model(self):
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()

    def batches(self, step, workers, part):
        for i in workers:
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1000 * i + step), dtype=torch.float64)
            yield x, torch.sin((i + 1) * x[:, :2]) - i / 2

    def loss(self, model, batch):
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


TASK = Regression()


def schedule(step):
    """Changes inside rounds: a slow step has to use the learning rate of the step just taken."""
    return 0.1 / (1 + step // 2)


def ours(base, optimizer, outer=None, m=M, steps=STEPS, lr=schedule):
    """(algorithm, de-biased rows) after `steps`; base: a name of helpers.BASES or (replicas, optimizer) -> base."""
    make = functools.partial(build, TASK, m, base, OPTIMIZERS[optimizer])
    replicas, algorithm = make(outer and (lambda base: outer(base, tau=TAU)))
    return algorithm, run(TASK, replicas, algorithm, steps, lr)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# One worker of the references: a model and a torch optimizer of its own


def team(optimizer, m=M):
    models = [TASK.model() for _ in range(m)]
    return models, [OPTIMIZERS[optimizer](model.parameters()) for model in models]


def inner_step(model, optimizer, batch, lr):
    optimizer.zero_grad()
    TASK.loss(model, batch).backward()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()


def batch_of(i, step):
    return next(TASK.batches(step, [i], (0, 1)))


def read(model):
    return parameters_to_vector(model.parameters()).detach()


def write(model, x):
    vector_to_parameters(x.clone(), model.parameters())  # a copy: the parameters become views of what they are given


# The outer loop: identities


@pytest.mark.parametrize("optimizer", ["nesterov", "adam"])
def test_slowmo_is_sgd_with_momentum_on_the_pseudo_gradient(optimizer):
    lr, x0 = 0.1, torch.nn.Parameter(read(TASK.model()))
    slow = torch.optim.SGD([x0], lr=ALPHA, momentum=BETA)
    for t in range(4):
        models, optimizers = team(optimizer)  # new optimizers: the buffers are reset
        for i, (model, inner) in enumerate(zip(models, optimizers)):
            write(model, x0.detach())
            for step in range(t * TAU, (t + 1) * TAU):
                inner_step(model, inner, batch_of(i, step), lr)
        x0.grad = x0.detach() - sum(map(read, models)) / M
        slow.step()
    outer = functools.partial(SlowMo, alpha=ALPHA, beta=BETA, buffers="reset")
    _, x = ours("local_sgd", optimizer, outer, steps=4 * TAU, lr=lr)
    same(x, x0.detach().expand_as(x))


def test_one_worker_without_slow_momentum_is_lookahead():
    (model,), (inner,) = team("nesterov", 1)
    slow = read(model)
    for step in range(4 * TAU):
        inner_step(model, inner, batch_of(0, step), schedule(step))
        if (step + 1) % TAU == 0:
            slow = slow + ALPHA * (read(model) - slow)
            write(model, slow)
    outer = functools.partial(SlowMo, alpha=ALPHA, beta=0.0, buffers="maintain")
    _, x = ours("local_sgd", "nesterov", outer, m=1, steps=4 * TAU)
    same(x[0], slow)


@pytest.mark.parametrize(
    "base, optimizer, slow", [("allreduce", "nesterov", False), ("allreduce", "adam", False), ("local_sgd", "sgd", True)]
)
def test_large_batch_sgd(base, optimizer, slow):
    """AllReduce is; and so is SlowMo with τ = 1, α = 1, β = 0 over SGD without momentum."""
    (model,), (inner,) = team(optimizer, 1)
    for step in range(STEPS):
        batches = [batch_of(i, step) for i in range(M)]
        inner_step(model, inner, [torch.cat(part) for part in zip(*batches)], schedule(step))
    outer = (lambda base, tau: SlowMo(base, tau=1, alpha=1.0, beta=0.0)) if slow else None
    _, x = ours(base, optimizer, outer)
    same(x, read(model).expand_as(x))


# The base algorithms, worker by worker


def local_sgd(optimizer, buffers):
    models, optimizers = team(optimizer)
    for step in range(STEPS):
        for i, (model, inner) in enumerate(zip(models, optimizers)):
            inner_step(model, inner, batch_of(i, step), schedule(step))
        if (step + 1) % TAU == 0:
            mean = sum(map(read, models)) / M
            for model in models:
                write(model, mean)
            if buffers == "reset":
                optimizers = [OPTIMIZERS[optimizer](model.parameters()) for model in models]
            elif buffers == "average":
                for twins in zip(*(model.parameters() for model in models)):
                    states = [inner.state[p] for inner, p in zip(optimizers, twins)]
                    for name in [name for name, value in states[0].items() if value.shape == twins[0].shape]:
                        mean = sum(state[name] for state in states) / M
                        for state in states:
                            state[name] = mean.clone()
    return torch.stack([read(model) for model in models])


@pytest.mark.parametrize("optimizer", ["nesterov", "adam"])
@pytest.mark.parametrize("buffers", ["reset", "maintain", "average"])
def test_local_sgd(optimizer, buffers):
    algorithm, x = ours("local_sgd", optimizer, functools.partial(Average, buffers=buffers))
    expected = local_sgd(optimizer, buffers)
    same(x, expected)
    same(average(algorithm), expected.mean(0, keepdim=True))


def exponential(step):
    return (torch.eye(M).double() + torch.eye(M).double().roll(2 ** (step % 3), 0)) / 2


def ring(step):
    return sum(torch.eye(M).double().roll(hop, 0) for hop in (-1, 0, 1)) / 3


def uneven(step):
    """Two column-stochastic matrices in turn, all entries different: push-sum weights wander between about 0.5 and 2."""
    matrix = torch.rand(M, M, generator=torch.Generator().manual_seed(step % 2), dtype=torch.float64) + 0.05
    return matrix / matrix.sum(0)


def gossip(matrix, overlap, optimizer, slow):
    """Push-sum by numerators x and weights w, kept together as `[x, w]` of each worker: (z, w) after STEPS steps.

    Overlapped, in the order of the released code: receive what was sent a step ago, send, then the inner step on what is kept.
    """
    models, optimizers = team(optimizer)
    one = torch.ones(1, dtype=torch.float64)
    xw = [torch.cat([read(model), one]) for model in models]
    x0, u, inbox = read(models[0]), 0.0, [0.0] * M

    def send(step):
        P = matrix(step)
        messages = [sum(P[i, j] * xw[j] for j in range(M) if j != i) for i in range(M)]
        xw[:] = [P[i, i] * xw[i] for i in range(M)]
        return messages

    def receive(messages):
        xw[:] = [kept + message for kept, message in zip(xw, messages)]

    for step in range(STEPS):
        lr = schedule(step)
        if overlap:
            receive(inbox)
            inbox = send(step)
        for i, (model, inner) in enumerate(zip(models, optimizers)):
            z = xw[i][:-1] / xw[i][-1]
            write(model, z)
            inner_step(model, inner, batch_of(i, step), lr)
            xw[i][:-1] -= z - read(model)
        if not overlap:
            receive(send(step))
        if slow and (step + 1) % TAU == 0:
            receive(inbox)
            inbox = [0.0] * M
            x, w = sum(xw)[:-1], sum(xw)[-1]
            u = BETA * u + (x0 - x / w) / lr
            x0 = x0 - ALPHA * lr * u
            xw[:] = [torch.cat([x0, one]) for _ in range(M)]
            optimizers = [OPTIMIZERS[optimizer](model.parameters()) for model in models]
    receive(inbox)
    x, w = torch.stack(xw)[:, :-1], torch.stack(xw)[:, -1:]
    return x / w, w


GOSSIP = {
    "sgp exponential": (slowmo.SGP, slowmo.Exponential(M), exponential, False),
    "sgp uneven": (slowmo.SGP, slowmo.Mixing(M, torch.stack([uneven(0), uneven(1)])), uneven, False),
    "osgp exponential": (slowmo.OSGP, slowmo.Exponential(M), exponential, True),
    "osgp uneven": (slowmo.OSGP, slowmo.Mixing(M, torch.stack([uneven(0), uneven(1)])), uneven, True),
    "dpsgd ring": (slowmo.DPSGD, slowmo.Ring(M), ring, True),
}


@pytest.mark.parametrize("slow", [False, True], ids=["alone", "slowmo"])
@pytest.mark.parametrize("optimizer", ["nesterov", "adam"])
@pytest.mark.parametrize("case", GOSSIP)
def test_gossip(case, optimizer, slow):
    base, graph, matrix, overlap = GOSSIP[case]
    outer = functools.partial(SlowMo, alpha=ALPHA, beta=BETA, buffers="reset") if slow else None
    algorithm, x = ours(lambda replicas, inner: base(replicas, inner, graph), optimizer, outer)
    expected, w = gossip(matrix, overlap, optimizer, slow)
    same(x, expected)
    same(algorithm.base.w, w)
    same(average(algorithm), ((w * expected).sum(0) / w.sum()).unsqueeze(0))
    assert ((w - 1).abs().max() > 0.1) == ("uneven" in case)


# Other people's implementations, four processes of one worker each


def post_local_sgd(optimizer):
    """(ours, torch's): the parameters of the worker of this process."""
    from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as hooks
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    rank = torch.distributed.get_rank()
    _, x = ours("local_sgd", optimizer, functools.partial(Average, buffers="maintain"), m=4)
    model = torch.nn.parallel.DistributedDataParallel(TASK.model())
    state = hooks.PostLocalSGDState(None, None, start_localSGD_iter=0, post_local_gradient_allreduce=False)
    model.register_comm_hook(state, hooks.post_localSGD_hook)
    averager = PeriodicModelAverager(period=TAU, warmup_steps=0)
    averager.step = 1  # it counts from 0 and averages before it counts: by itself after steps 1, 1 + τ, ... instead of τ, 2τ, ...
    inner = PostLocalSGDOptimizer(OPTIMIZERS[optimizer](model.parameters()), averager)
    for step in range(STEPS):
        inner_step(model, inner, batch_of(rank, step), schedule(step))
    return x[0], read(model)


@pytest.mark.parametrize("optimizer", ["nesterov", "adam"])
def test_torchs_post_local_sgd(optimizer):
    results = spawn(post_local_sgd, 4, optimizer)
    for actual, expected in results:
        same(actual, expected)
    assert not torch.equal(results[0][0], results[1][0])  # the last round is cut short: workers differ


# fairscale 0.4.13 and Algorithm 1. It agrees on the phase (after steps τ, 2τ, ...), on the learning rate (the parameter group's
# at the slow step: a scheduler has to wait for `perform_slowmo`), on x <- P(x - γd) and on the hops 1, 2 of four workers.
# It differs in this, and is called here so that it does not:
# - x_{0,0} is taken in the first `perform_slowmo`, after one inner step, unless `_init_global_momentum_buffers` is called before.
# - Base buffers are never touched, which is our `maintain`. For `reset` its optimizer's state is cleared after the slow step.
# - A slow step that averages exactly replaces that step's gossip, and then the graph stands still: the hops are 1, 2, -, 1, 2, -
#   where the global step gives 1, 2, -, 2, 1, -. No option changes that, so its gossiper is advanced by hand.
# - SGP with slowmo_memory_efficient=False averages exactly only with slowmo_sgp_average_params=True; else it is `noaverage`.
# - Slow momentum insists on float32 parameters by an assertion only: told that float64 is float32, it computes in float64.
# - Weight decay is taken at the push-sum numerator x, not at z = x / w, where the gradient is: left out where w is not 1.
# - An exact average does not set push-sum weights back to 1: irregular mixing is compared without SlowMo.


def uneven_shares(j):
    """What worker j of 4 keeps, sends one further and sends two further: senders differ, so push-sum weights do."""
    return [(1 + j) / 8, (5 - j) / 16, (9 - j) / 16]


def uneven_mixing():
    """fairscale's graph and mixing for `uneven_shares`."""
    from fairscale.experimental.nn.data_parallel.gossip.graph_manager import GraphManager
    from fairscale.experimental.nn.data_parallel.gossip.mixing_manager import MixingManager

    class Graph(GraphManager):
        def _make_graph(self):
            for rank in range(self.world_size):
                self._add_peers(rank, [self._rotate_forward(rank, hop) for hop in (1, 2)])

        is_regular_graph = is_bipartite_graph = is_dynamic_graph = lambda self: False
        is_passive = lambda self, rank=None: False

    class Shares(MixingManager):
        is_uniform = lambda self: False

        def get_mixing_weights(self, residual_adjusted=True):
            me = self.graph_manager.rank
            kept, *sent = torch.tensor(uneven_shares(me), dtype=torch.float64).split(1)
            if residual_adjusted:  # messages are cut from what is kept
                sent = [share / kept for share in sent]
            return {"lo": kept} | {(me + hop) % 4: share for hop, share in zip((1, 2), sent)}

    graph = Graph(torch.distributed.get_rank(), 4, peers_per_itr=2)
    return {"graph": graph, "mixing": Shares(graph, torch.device("cpu"))}


def fairscales(optimizer, base, outer, buffers, options):
    """(ours, fairscale's): the parameters of the worker of this process. Its patches of torch end with the process."""
    from fairscale.experimental.nn.data_parallel import SlowMoDistributedDataParallel

    rank, options = torch.distributed.get_rank(), options | {"slowmo_frequency": TAU, "localsgd_frequency": TAU}
    _, x = ours(base, optimizer, outer and functools.partial(outer, buffers=buffers), m=4)

    for name in ("synchronize", "current_stream", "Stream", "stream"):
        setattr(torch.cuda, name, mock.MagicMock())
    torch.Tensor.cuda = torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor
    if options.pop("uneven", False):
        options |= uneven_mixing()
    model = SlowMoDistributedDataParallel(TASK.model(), nprocs_per_node=1, **options)
    inner = OPTIMIZERS[optimizer](model.parameters())
    with mock.patch.object(torch, "float32", torch.float64):
        model._init_global_momentum_buffers(inner)
    for step in range(STEPS):
        inner_step(model, inner, batch_of(rank, step), schedule(step))
        model.perform_slowmo(inner)
        if outer and (step + 1) % TAU == 0:
            if buffers == "reset":
                inner.state.clear()
            if model.sgp and (model.slowmo_memory_efficient or model.slowmo_sgp_average_params):
                for gossiper in model.dist_config["gossipers"].values():
                    gossiper.refresh_peers_()
    if model.sgp:
        model._sgp_unbias()
    return x[0], read(model)


def uneven_sgp(replicas, inner):
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    for j in range(4):
        for hop, share in enumerate(uneven_shares(j)):
            matrix[(j + hop) % 4, j] = share
    return slowmo.SGP(replicas, inner, slowmo.Mixing(4, matrix))


EXACT = functools.partial(SlowMo, alpha=ALPHA, beta=BETA)
NOAVERAGE = functools.partial(EXACT, exact=False)
SLOW = {"slowmo_lr": ALPHA, "slowmo_momentum": BETA}
ALONE = {"slowmo_lr": 1.0, "slowmo_momentum": 0.0}
LOCAL, SGP = {"slowmo_base_algorithm": "localsgd"}, {"slowmo_base_algorithm": "sgp"}
WHOLE, SHARDED = {"slowmo_memory_efficient": False}, {"slowmo_memory_efficient": True}
FAIRSCALE = {
    "local sgd, maintain": ("nesterov", "local_sgd", Average, "maintain", LOCAL | ALONE),
    "local sgd + slowmo, reset": ("nesterov", "local_sgd", EXACT, "reset", LOCAL | SLOW | SHARDED),
    "local sgd + slowmo, maintain": ("adam", "local_sgd", EXACT, "maintain", LOCAL | SLOW | WHOLE),
    "sgp": ("nesterov", "sgp", None, None, SGP | ALONE),
    "sgp, uneven": ("no decay", uneven_sgp, None, None, SGP | ALONE | {"uneven": True}),
    "sgp + slowmo, reset": ("nesterov", "sgp", EXACT, "reset", SGP | SLOW | SHARDED),
    "sgp + slowmo, maintain": ("adam", "sgp", EXACT, "maintain", SGP | SLOW | WHOLE | {"slowmo_sgp_average_params": True}),
    "sgp + slowmo, noaverage": ("nesterov", "sgp", NOAVERAGE, "maintain", SGP | SLOW | WHOLE),
}


@pytest.mark.oracles
@pytest.mark.parametrize("case", FAIRSCALE)
def test_fairscale(case):
    pytest.importorskip("fairscale.experimental.nn.data_parallel")  # imported once, before the processes fork
    for actual, expected in spawn(fairscales, 4, *FAIRSCALE[case]):
        same(actual, expected)
