"""Our algorithms against torch's, fairscale's and the links' own limits, in each process of a group.

Every function is one contest: it builds both sides and gives their paired ratios, a list. The sides take turns, the one that begins
changes, and a side's time is the mean over processes.
"""

import copy
import functools
import inspect
import statistics
import time
import warnings
from unittest import mock

import torch
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import slowmo
from benchmarks.table2 import Waiting
from experiments.tasks.resnet import ResNet
from slowmo import outer as outers

MEGABYTES, COMPUTE = 2.0, 0.1355  # of a row on links; seconds of an iteration there
KINDS = {"local_sgd": slowmo.LocalSGD, "sgp": slowmo.SGP, "osgp": slowmo.OSGP}
SETTINGS = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "fused": True}


def paired_ratios(cluster, ours, theirs, iterations: int, rounds: int) -> list[float]:
    """Seconds of `ours` over `theirs`, each an iteration, in `rounds` pairs after one that warms up."""

    def seconds(call) -> float:
        cluster.barrier()
        start = time.perf_counter()
        for _ in range(iterations):
            call()
        return statistics.mean(cluster.all_gather_object(time.perf_counter() - start))

    ratios = []
    for round_ in range(rounds + 1):
        order = (ours, theirs) if round_ % 2 else (theirs, ours)
        found = {call: seconds(call) for call in order}
        ratios.append(found[ours] / found[theirs])
    return ratios[1:]


class Contestants:
    """The same model and batch for both sides. link: bits per second of emulated links, or None for a real model over loopback.

    On links computation is a wait, so that two cores can carry several hosts: half of ImageNet's in the paper, for half of its bytes.
    """

    def __init__(self, link: float | None, memory_format=torch.channels_last):
        torch.set_num_threads(1)
        self.cluster, self.link, self.bucket_cap_mb = slowmo.Cluster(timeout=120.0), link, 25.0
        torch.manual_seed(0)
        if link:
            self.model, self.inputs = Waiting(round(MEGABYTES * 1e6 / 4), COMPUTE), ()
            self.bucket_cap_mb = 25 * MEGABYTES / 102.2
        else:
            self.model = ResNet([2, 2, 2, 2], 64).to(memory_format=memory_format)
            torch.manual_seed(1 + self.cluster.rank)
            self.inputs, self.y = (torch.randn(16, 3, 32, 32).contiguous(memory_format=memory_format),), torch.randint(0, 10, (16,))

    def loss(self, model) -> torch.Tensor:
        out = model(*self.inputs)
        return out if self.link else F.cross_entropy(out, self.y)

    def ours(self, base, outer=None, overlap: bool = True):
        """One iteration of an algorithm of ours. base: replicas, optimizer -> base; outer: base -> outer."""
        model = copy.deepcopy(self.model)
        optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)
        replicas = slowmo.Replicas(model, self.cluster, optimizer.param_groups, bucket_cap_mb=self.bucket_cap_mb)
        algorithm = base(replicas, optimizer, overlap=overlap)
        algorithm = outer(algorithm) if outer else algorithm

        def iteration():
            algorithm.start()
            self.loss(model).backward()
            algorithm.step()

        return iteration

    def computing(self):
        """An iteration that sends nothing."""
        return self.ours(slowmo.LocalSGD)

    def ddp(self):
        """One iteration of torch's DistributedDataParallel."""
        model = copy.deepcopy(self.model)
        options = {"gradient_as_bucket_view": True, "bucket_cap_mb": self.bucket_cap_mb if self.link else None}  # None: its own 25, first 1
        # its name since torch 2.13
        sync = (
            "forward_sync_buffers"
            if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            else "broadcast_buffers"
        )
        ddp = DistributedDataParallel(model, **options, **{sync: False})
        optimizer = torch.optim.SGD(ddp.parameters(), **SETTINGS)

        def iteration():
            self.loss(ddp).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return iteration


def allreduce(link, rounds):
    side = Contestants(link)
    return paired_ratios(side.cluster, side.ours(slowmo.AllReduce), side.ddp(), 12, rounds)


def local_sgd(link, rounds, tau=12):
    """torch's is DDP without its gradient all-reduce, PostLocalSGDOptimizer around SGD, and PeriodicModelAverager."""
    side = Contestants(link)
    model = copy.deepcopy(side.model)
    optimizer = PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), **SETTINGS), PeriodicModelAverager(period=tau, warmup_steps=0))

    def theirs():
        side.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return paired_ratios(side.cluster, side.ours(slowmo.LocalSGD, functools.partial(outers.Average, tau=tau)), theirs, tau, rounds)


def fairscale(link, rounds, base="localsgd", tau=12):
    """SlowMoDistributedDataParallel insists on CUDA's streams; on a CPU they are nothing. The patches end with this process."""
    warnings.simplefilter("ignore", FutureWarning)  # of fairscale's own calls of torch
    from fairscale.experimental.nn.data_parallel import SlowMoDistributedDataParallel

    side = Contestants(link, torch.contiguous_format)  # fairscale knows no other
    kind = slowmo.LocalSGD if base == "localsgd" else slowmo.SGP
    ours = side.ours(kind, functools.partial(outers.SlowMo, tau=tau, beta=0.6, buffers="maintain"))
    for name in ("synchronize", "current_stream", "Stream", "stream"):
        setattr(torch.cuda, name, mock.MagicMock())
    torch.Tensor.cuda = torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor
    options = {"slowmo_base_algorithm": base, "slowmo_frequency": tau, "localsgd_frequency": tau, "slowmo_momentum": 0.6,
               "broadcast_buffers": False}  # fmt: skip

    def theirs(efficient):
        averages = {"slowmo_sgp_average_params": True} if base == "sgp" and not efficient else {}
        given = options | averages | {"slowmo_memory_efficient": efficient}
        model = SlowMoDistributedDataParallel(copy.deepcopy(side.model), nprocs_per_node=1, **given)
        optimizer = torch.optim.SGD(model.parameters(), **SETTINGS)
        model._init_global_momentum_buffers(optimizer)

        def iteration():
            side.loss(model).backward()
            optimizer.step()
            model.perform_slowmo(optimizer)
            optimizer.zero_grad(set_to_none=True)

        return iteration

    # memory-efficient or not: the faster of the two counts
    return max((paired_ratios(side.cluster, ours, theirs(efficient), tau, rounds) for efficient in (False, True)), key=statistics.median)


def wire(link, rounds, what="gossip", megabytes=16):
    """A message or an exact average alone, over its bytes at the link's rate. Large, so that the shaper's burst is 1% of it."""
    cluster = slowmo.Cluster(timeout=120.0)
    rows = torch.zeros(1, round(megabytes * 1e6 / 4))
    out = torch.empty_like(rows)
    m = cluster.num_workers
    run, share = ((lambda: cluster.shift(rows, 1, out)()), 1) if what == "gossip" else ((lambda: cluster.mean(rows)), 2 * (m - 1) / m)
    least, ratios = share * rows.numel() * 4 * 8 / link, []
    for _ in range(rounds + 1):
        cluster.barrier()
        start = time.perf_counter()
        run()
        ratios.append(statistics.mean(cluster.all_gather_object(time.perf_counter() - start)) / least)
    return ratios[1:]


def overlap(link, rounds):
    """OSGP where computation is longer than the message: over computation alone."""
    side = Contestants(link)
    return paired_ratios(side.cluster, side.ours(slowmo.OSGP), side.computing(), 12, rounds)


def overlap_of_messages(link, rounds):
    """OSGP where the message is longer: over messages one after another."""
    side = Contestants(link)
    side.model = Waiting(round(MEGABYTES * 1e6 / 4), COMPUTE / 7)
    rows = torch.zeros(1, round(MEGABYTES * 1e6 / 4))
    out = torch.empty_like(rows)
    return paired_ratios(side.cluster, side.ours(slowmo.OSGP), lambda: side.cluster.shift(rows, 1, out)(), 12, rounds)


def over_computation(link, rounds, base="sgp", outer=False, tau=12, overlap=True):
    """An algorithm over computation alone, the optimizer's step included in both."""
    side = Contestants(link)
    slow = functools.partial(outers.SlowMo, tau=tau, beta=0.6) if outer else None
    return paired_ratios(side.cluster, side.ours(KINDS[base], slow, overlap), side.computing(), 12, rounds)


def over_allreduce(link, rounds, tau=12):
    side = Contestants(link)
    slow = functools.partial(outers.SlowMo, tau=tau, beta=0.6)
    return paired_ratios(side.cluster, side.ours(slowmo.SGP, slow), side.ours(slowmo.AllReduce), 12, rounds)


def long_message(link, rounds):
    """SGP where the message takes twice as long as backward, as WMT16's does: over forward and the message's bytes at the link's rate."""
    side = Contestants(link)
    message = MEGABYTES * 1e6 * 8 / link
    side.model = Waiting(round(MEGABYTES * 1e6 / 4), message * 0.75)  # a third of it forward
    least = message * 0.25 + message
    return paired_ratios(side.cluster, side.ours(slowmo.SGP), lambda: time.sleep(least), 12, rounds)


def over_base(link, rounds, base="local_sgd", tau=12):
    """SlowMo over its base; Local SGD averages as often, SGP and OSGP do not."""
    side = Contestants(link)
    kind = KINDS[base]
    slow = side.ours(kind, functools.partial(outers.SlowMo, tau=tau, beta=0.6))
    plain = side.ours(kind, functools.partial(outers.Average, tau=tau) if base == "local_sgd" else None)
    return paired_ratios(side.cluster, slow, plain, tau, rounds)
