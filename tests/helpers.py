"""What several test files share: small problems, and whole runs of the library on them."""

import torch

import slowmo
from experiments.quadratic import Quadratic
from slowmo.cluster import Cluster
from slowmo.replicas import Replicas
from slowmo.train import Tally, train


class Scalars(Quadratic):
    """Problem G of the golden numbers: worker i minimises a_i (x - c_i)^2 / 2 over one scalar, all start at 1."""

    def __init__(self, c, a=None, dtype=torch.float64):
        self.seed, self.noise, self.dtype, self.device = 0, 0.0, dtype, torch.device("cpu")
        self.b = torch.tensor(c, dtype=dtype)[:, None]
        self.A = torch.tensor(a or [1.0] * len(c), dtype=dtype)[:, None, None]
        self.x0 = torch.ones(1, dtype=dtype)


def quadratic(m, d=6, seed=0, noise=0.3):
    return Quadratic(workers=m, seed=seed, dtype="float64", device="cpu", dimension=d, noise=noise)


def sgd(rows, lr=0.5, **options):
    return torch.optim.SGD([rows], lr=lr, fused=True, **options)


BASES = {
    "allreduce": lambda replicas, optimizer: slowmo.AllReduce(replicas, optimizer),
    "local_sgd": lambda replicas, optimizer: slowmo.LocalSGD(replicas, optimizer),
    "sgp": lambda replicas, optimizer: slowmo.SGP(replicas, optimizer, slowmo.Exponential(replicas.cluster.size)),
    "osgp": lambda replicas, optimizer: slowmo.OSGP(replicas, optimizer, slowmo.Exponential(replicas.cluster.size)),
    "dpsgd": lambda replicas, optimizer: slowmo.DPSGD(replicas, optimizer, slowmo.Ring(replicas.cluster.size)),
    "sgp_double": lambda replicas, optimizer: slowmo.SGP(
        replicas, optimizer, slowmo.Exponential(replicas.cluster.size), gossip_buffers=True
    ),
    "sgp_irregular": lambda replicas, optimizer: slowmo.SGP(replicas, optimizer, irregular(replicas.cluster.size)),
    "osgp_irregular": lambda replicas, optimizer: slowmo.OSGP(replicas, optimizer, irregular(replicas.cluster.size)),
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


def build(task, m, base, optimizer=sgd, outer=None, cluster=None):
    """(replicas, algorithm) of `m` workers. base: a name of BASES or a function; optimizer: rows -> optimizer; outer: base -> outer."""
    replicas = Replicas(task.model(), cluster or Cluster(m))
    algorithm = (BASES[base] if isinstance(base, str) else base)(replicas, optimizer(replicas.rows))
    return replicas, outer(algorithm) if outer else algorithm


def run(task, replicas, algorithm, steps, lr):
    """Train to `steps`; lr: γ, or a function of the step. Gives the de-biased rows [n, d]."""
    tally = Tally(len(replicas.models), torch.device("cpu"))
    schedule = lr if callable(lr) else lambda step: lr
    for _ in train(task, replicas, algorithm, schedule, steps, task.seed, tally):
        pass
    return replicas.rows.detach()[:, : replicas.parameters].clone()
