"""What several test files share: small problems, and whole runs of the library on them."""

import torch

import slowmo
from experiments.quadratic import Quadratic
from slowmo.cluster import Cluster
from slowmo.replicas import Replicas
from slowmo.train import TrainingMeter, train


class Scalars(Quadratic):
    """Problem G of the golden numbers: worker i minimises a_i (x - c_i)^2 / 2 over one scalar, all start at 1."""

    def __init__(self, c, a=None, dtype=torch.float64):
        self.seed, self.noise, self.dtype, self.device = 0, 0.0, dtype, torch.device("cpu")
        self.b = torch.tensor(c, dtype=dtype)[:, None]
        self.A = torch.tensor(a or [1.0] * len(c), dtype=dtype)[:, None, None]
        self.x0 = torch.ones(1, dtype=dtype)


def quadratic(m, d=6, seed=0, noise=0.3):
    return Quadratic(workers=m, seed=seed, dtype="float64", device="cpu", dimension=d, noise=noise)


def sgd(parameters, lr=0.5, **options):
    return torch.optim.SGD(parameters, lr=lr, fused=True, **options)


BASES = {
    "allreduce": slowmo.AllReduce,
    "local_sgd": slowmo.LocalSGD,
    "sgp": lambda replicas, optimizer, **more: slowmo.SGP(replicas, optimizer, slowmo.Exponential(replicas.cluster.num_workers), **more),
    "osgp": lambda replicas, optimizer, **more: slowmo.OSGP(replicas, optimizer, slowmo.Exponential(replicas.cluster.num_workers), **more),
    "dpsgd": lambda replicas, optimizer, **more: slowmo.DPSGD(replicas, optimizer, slowmo.Ring(replicas.cluster.num_workers), **more),
    "sgp_double": lambda replicas, optimizer, **more: slowmo.SGP(
        replicas, optimizer, slowmo.Exponential(replicas.cluster.num_workers), gossip_buffers=True, **more
    ),
    "sgp_irregular": lambda replicas, optimizer, **more: slowmo.SGP(replicas, optimizer, irregular(replicas.cluster.num_workers), **more),
    "osgp_irregular": lambda replicas, optimizer, **more: slowmo.OSGP(
        replicas, optimizer, irregular(replicas.cluster.num_workers), **more
    ),
}


def irregular(m):
    """Column-stochastic, not row-stochastic: worker j keeps (j + 1) / (m + 1) and splits the rest over its next and the first."""
    matrix = torch.zeros(m, m, dtype=torch.float64)
    for j in range(m):
        kept = (j + 1) / (m + 1)
        matrix[j, j] += kept
        matrix[(j + 1) % m, j] += (1 - kept) / 2
        matrix[0, j] += (1 - kept) / 2
    return slowmo.Mixing(m, matrix)


def build(task, m, base, optimizer=sgd, outer=None, cluster=None, bucket_cap_mb=25.0, accumulate=1, loss_scale=1.0, **more):
    """(replicas, algorithm) of `m` workers. base: a name of BASES or a function; optimizer: parameters -> optimizer; outer: base -> outer.

    more: for the base (overlap).
    """
    model = task.model()
    inner = optimizer(model.parameters())
    replicas = Replicas(model, cluster or Cluster(m), inner.param_groups, bucket_cap_mb=bucket_cap_mb, accumulate=accumulate,
                        loss_scale=loss_scale)  # fmt: skip
    algorithm = (BASES[base] if isinstance(base, str) else base)(replicas, inner, **more)
    return replicas, outer(algorithm) if outer else algorithm


def run(task, replicas, algorithm, steps, lr, vectorize=False, before_average=None):
    """Train to `steps`; lr: γ, or a function of the step. Gives the de-biased rows [n, numel]."""
    meter = TrainingMeter(len(replicas.models), torch.device("cpu"))
    schedule = lr if callable(lr) else lambda step: lr
    for _ in train(task, replicas, algorithm, schedule, steps, task.seed, meter, vectorize, before_average):
        pass
    return replicas.rows()


def average(algorithm):
    """The exact average of the workers, [1, numel]."""
    return algorithm.replicas.flat(algorithm.base.average())


def slow(algorithm, name):
    """x0 or u of an outer algorithm, [1, numel] ([n, numel] without exact averages)."""
    k = algorithm.slow_names.index(name)
    return algorithm.replicas.flat([values[k] for values in algorithm.slow.values()])
