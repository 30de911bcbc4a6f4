"""examples/own: parts of one's own through --config-dir and PYTHONPATH, without a change to the repository."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import arrays, finished
from listed import lines, written
from safetensors import safe_open

from results import store

OWN = Path(__file__).parents[1] / "examples" / "own"
CONFIGS = "--config-dir", str(OWN / "configs")


def done(*words, cwd, **options):
    """The folder of a run that knows examples/own."""
    return finished(*CONFIGS, "cluster.threads=1", *words, cwd=cwd, before=lambda rank: sys.path.insert(0, str(OWN)), **options)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("processes", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_task_is_the_same_on_any_number_of_processes(processes, tmp_path):
    """Workers that share a process, and workers of two processes each."""
    words = ("task=spirals", "base=sgp", "outer.tau=6", "workers=4", "steps=14", "evaluate.every=7", "dtype=float64")
    one = rows(done(*words, "runs=one", cwd=tmp_path))
    several = rows(done(*words, "runs=several", cwd=tmp_path, processes=processes))
    for row, other in zip(one, several, strict=True):
        for name in ("train_loss", "validation_loss", "accuracy", "consensus_distance"):
            assert row[name] == pytest.approx(other[name], rel=1e-9), name


def test_a_task_is_learnt(tmp_path):
    *_, last = rows(done("experiment=spirals_block_momentum", "evaluate.every=500", cwd=tmp_path))
    assert last["step"] == 500 and last["accuracy"] > 90 and last["validation_loss"] < 0.3


def test_a_model(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    words = ("experiment=cifar10_small_slowmo_sgp", "task=perceptron", "task.batch_size=64", "task.width=4", "data.train=64")
    folder = done(*words, "data.validation=16", "steps=2", cwd=tmp_path)
    (path,) = (folder / "models").iterdir()
    with safe_open(path, "np") as saved:
        assert {name: tuple(saved.get_tensor(name).shape) for name in saved.keys()} == {
            "1.weight": (4, 3072), "1.bias": (4,), "3.weight": (10, 4), "3.bias": (10,)}  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_a_base(processes, tmp_path):
    rng = np.random.default_rng(0)
    m, d, lr = 6, 5, 0.125
    A, b, x = np.stack([np.diag(rng.uniform(0.5, 1.5, d)) for _ in range(m)]), rng.standard_normal((m, d)), np.zeros(d)
    np.savez(tmp_path / "problem.npz", A=A, b=b, x0=x)
    words = ("task=quadratic", f"task.problem={tmp_path / 'problem.npz'}", "base=sign_sgd", "outer=none", f"workers={m}", "steps=6")
    found = arrays(done(*words, f"optimizer.lr={lr}", "dtype=float64", cwd=tmp_path, processes=processes))
    for _ in range(6):
        signs = np.sign(np.einsum("wij,wj->wi", A, x - b))
        x = x - lr * np.sign(signs.mean(0))
    assert len(set(np.abs(x))) > 2  # they do not all go the same way each time
    assert (found["mean"] == x).all() and (found["x"] == x).all()


def test_an_outer(tmp_path):
    """SlowMo's iterates while the learning rate stays as it is, others when it drops."""
    words = ("task=quadratic", "base=local_sgd", "workers=4", "steps=24", "outer.tau=4", "outer.beta=0.5", "dtype=float64")
    drop = ("schedule=step", "schedule.milestones=[10]")
    constant, dropped = (
        [arrays(done(*words, f"outer={outer}", *more, cwd=tmp_path))["mean"] for outer in ("slowmo", "block_momentum")]
        for more in ((), drop)
    )
    np.testing.assert_allclose(*constant, rtol=1e-12)
    assert np.abs(dropped[0] - dropped[1]).max() > 1e-3


def test_an_optimizer(tmp_path):
    """A file names torch's class: its iterates."""
    import torch

    np.savez(tmp_path / "problem.npz", A=np.eye(3)[None], b=np.array([[1.0, -2.0, 3.0]]), x0=np.zeros(3))
    words = ("task=quadratic", f"task.problem={tmp_path / 'problem.npz'}", "optimizer=nadam", "optimizer.lr=0.1", "workers=1", "steps=5")
    found = arrays(done(*words, "base=local_sgd", "outer=none", "dtype=float64", cwd=tmp_path))["mean"]
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.NAdam([x], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        ((x - torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)).square().sum() / 2).backward()
        optimizer.step()
    np.testing.assert_allclose(found, x.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    "values, verdict",
    [
        ([0.10, 0.12, 0.11], "supported: -0.390, 95% interval -0.415 to -0.365, 3 seeds"),
        ([0.60, 0.61, 0.59], "contradicted"),
        ([0.10, 0.90, 0.50], "undecided"),
        ([0.10], "not run"),
    ],
)
def test_a_claim(values, verdict, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(OWN)
    claim = importlib.import_module("my_claim")
    runs = written(
        tmp_path, lines(claim.WITH, values, "validation_loss_last"), lines(claim.WITHOUT, [0.5, 0.5, 0.5], "validation_loss_last")
    )
    assert claim.judge(store.Runs(runs)).startswith(verdict)
