"""What several test files share: small problems, and whole runs of the library on them."""

import torch

import slowmo
from experiments.tasks.quadratic import Quadratic
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


class Several(Quadratic):
    """The quadratic of `quadratic`, its unknowns spread over three parameters of different shapes."""

    def __init__(self, m, d=6, seed=0, noise=0.3):
        super().__init__(workers=m, seed=seed, dtype="float64", device="cpu", dimension=d, noise=noise)

    def model(self):
        model = torch.nn.Module()
        for name, part in zip("abc", self.x0.split([2, 1, len(self.x0) - 3])):
            setattr(model, name, torch.nn.Parameter(part.clone()))
        return model

    def loss(self, model, batch):
        return super().loss(self._whole(model), batch)

    def evaluate(self, model, part):
        return super().evaluate(self._whole(model), part)

    def _whole(self, model):
        whole = torch.nn.Module()
        whole.x = torch.cat([model.a, model.b, model.c])
        return whole


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
    "osgp_irregular": lambda replicas, optimizer, **more: slowmo.OSGP(replicas, optimizer, irregular(replicas.cluster.num_workers), **more),
}


def irregular(m, in_turn=False):
    """Column-stochastic, not row-stochastic for any m > 1: worker j keeps (j + 1) / (m + 1), its next gets a third of the rest, the first
    two thirds. in_turn: every other round the same with the workers in reverse order."""
    matrix = torch.zeros(m, m, dtype=torch.float64)
    for j in range(m):
        kept = (j + 1) / (m + 1)
        matrix[j, j] += kept
        matrix[(j + 1) % m, j] += (1 - kept) / 3
        matrix[0, j] += (1 - kept) * 2 / 3
    return slowmo.Mixing(m, torch.stack([matrix, matrix.flip(0, 1)]) if in_turn else matrix)


def build(task, m, base, optimizer=sgd, outer=None, cluster=None, bucket_cap_mb=25.0, accumulate=1, loss_scale=1.0,
          num_fragments=1, **more):  # fmt: skip
    """(replicas, algorithm) of `m` workers. base: a name of BASES or a function; optimizer: parameters -> optimizer; outer: base -> outer.

    more: for the base (overlap).
    """
    model = task.model()
    inner = optimizer(model.parameters())
    replicas = Replicas(model, cluster or Cluster(m), inner.param_groups, bucket_cap_mb=bucket_cap_mb, accumulate=accumulate,
                        loss_scale=loss_scale, num_fragments=num_fragments)  # fmt: skip
    algorithm = (BASES[base] if isinstance(base, str) else base)(replicas, inner, **more)
    return replicas, outer(algorithm) if outer else algorithm


def run(task, replicas, algorithm, steps, lr, vectorize=False, before_average=None):
    """Train to `steps`; lr: γ, or a function of the step. Gives the de-biased rows [n, numel]."""
    meter = TrainingMeter(len(replicas.models), replicas.cluster.device)
    schedule = lr if callable(lr) else lambda step: lr
    for _ in train(task, replicas, algorithm, schedule, steps, task.seed, meter, vectorize, before_average):
        pass
    return replicas.rows()


def two_groups(make):
    """parameters -> `make` over two parameter groups, of the first parameter and of the others: two segments."""

    def optimizer(parameters):
        first, *rest = parameters
        return make([{"params": [first]}, {"params": rest}])

    return optimizer


def write(replicas, blocks, values):
    """The inverse of `replicas.flat`: values [n, numel] into `blocks`, one [n, d] for each segment."""
    places = [(place, block) for segment, block in zip(replicas.segments, blocks) for place in segment.places]
    places.sort(key=lambda pair: pair[0].index)
    for (place, block), part in zip(places, values.split([place.shape.numel() for place, _ in places], 1), strict=True):
        block.detach()[:, place.offset : place.offset + part.shape[1]] = part


def write_rows(replicas, values):
    write(replicas, [segment.x for segment in replicas.segments], values)


def write_gradients(replicas, values):
    write(replicas, [segment.grad for segment in replicas.segments], values)


def buffers(algorithm):
    """What the optimizer keeps for each element, by name: [n, numel]."""
    inner, segments = algorithm.base.inner, algorithm.replicas.segments
    return {name: algorithm.replicas.flat([inner.blocks(segment)[name] for segment in segments]) for name in inner.blocks(segments[0])}


def restart(algorithm, x, kind="maintain", exact=True):
    """base.restart, segment by segment; x: a list of blocks."""
    for segment, block in zip(algorithm.replicas.segments, x):
        algorithm.base.restart(segment, block, kind, exact)


def copied(state):
    """A state of slowmo.state, its tensors cloned."""
    clone = lambda part: {name: value.detach().clone() for name, value in part.items()}
    return state | {"workers": [clone(worker) for worker in state["workers"]], "shared": clone(state["shared"])}


def assert_same_state(left, right):
    """Equal to the last bit."""
    assert left["steps"] == right["steps"] and left["groups"] == right["groups"]
    for a, b in zip([*left["workers"], left["shared"]], [*right["workers"], right["shared"]], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def average(algorithm):
    """The exact average of the workers, [1, numel]."""
    return algorithm.replicas.flat(algorithm.base.average())


def slow(algorithm, name):
    """x0 or u of an outer algorithm, [1, numel] ([n, numel] without exact averages)."""
    k = algorithm.slow_names.index(name)
    return algorithm.replicas.flat([values[k] for values in algorithm.slow.values()])
