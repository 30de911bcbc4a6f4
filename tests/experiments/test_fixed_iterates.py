"""Which commits' runs of the small CIFAR-10 may stand in one table: those at which these numbers are the same.

The first steps of the loss and the accuracy tier in float64, over a slow step. A change here that is meant is a new protocol: runs from
before it and after it are not pooled.
"""

import importlib.util

import pytest
from hydra import initialize_config_dir

from experiments.runner import build
from experiments.runner.cli import CONFIGS
from experiments.runner.config import compose
from slowmo.cluster import Cluster
from slowmo.train import TrainingMeter, train

absent = [package for package in ("skimage", "sklearn", "PIL") if importlib.util.find_spec(package) is None]
pytestmark = pytest.mark.skipif(bool(absent), reason="the photos extra is not installed")

# the workers' mean training loss over the first four steps, and the norm of the averaged parameters after them
EXPECTED = {
    "cifar10_small_slowmo_sgp outer.tau=2 outer.beta=0.6": (2.360117713522406, 28.086035501055832),
    "cifar10_small_loss_slowmo_local_sgd outer.tau=2 outer.beta=0.6": (2.349029282804522, 28.086452707241673),
    "cifar10_small_ar_sgd": (2.351175920114812, 28.08620572036963),
    "cifar10_small_loss_sgp_noaverage outer.tau=2 outer.beta=0.6": (2.3472872678750156, 28.086463941677163),
    "cifar10_small_loss_double_averaging_sgp outer.tau=2": (2.338883116107855, 28.086719055964565),
    "cifar10_small_loss_ar_sgd outer=slowmo outer.tau=2 outer.beta=0.4": (2.338338939843011, 28.08722779539771),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("experiment", EXPECTED)
def test_the_first_iterates(experiment, vectorize, tmp_path_factory):
    words = ["dtype=float64", "cluster.device=cpu", f"data.root={tmp_path_factory.getbasetemp()}", "optimizer.lr=0.1", "data.validation=10"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose([*f"experiment={experiment}".split(), *words]).cfg
    task, cluster = build.build(cfg.task), Cluster(cfg.workers, "cpu", 60.0)
    replicas, algorithm = build.algorithm(cfg, task.model(), cluster)
    meter = TrainingMeter(cfg.workers, cluster.device)
    for _ in train(task, replicas, algorithm, lambda step: 0.02 * (step + 1), 4, cfg.seed, meter, vectorize):
        pass
    norm = sum(part[0].square().sum() for part in algorithm.base.average()).sqrt()
    found = float(meter.losses.mean() / 4), float(norm)
    assert found == pytest.approx(EXPECTED[experiment], rel=1e-9), found
