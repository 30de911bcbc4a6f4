"""From the command to its results: experiments, golden numbers, foldings; runs stopped, killed, damaged, asked for twice."""

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, Command, arrays, at_call, command, finished, free_port, planned, problem, signal_at_step
from generated import databin, tree
from omegaconf import OmegaConf
from safetensors.torch import load_file

from slowmo.train import TrainingMeter

BETA = OmegaConf.load(ROOT / "configs/experiment/cifar10_small_slowmo_sgp.yaml").outer.beta  # as it was tuned
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml"))
# Table 1 of the paper: best training loss and best validation accuracy or BLEU, without and with SlowMo
TABLE_1 = {
    "cifar10": {
        "local_sgd": ("Local SGD", "0.122", "91.73"),
        "slowmo_local_sgd": ("Local SGD with SlowMo", "0.006", "93.20"),
        "osgp": ("OSGP", "0.011", "93.17"),
        "slowmo_osgp": ("OSGP with SlowMo", "0.001", "93.74"),
        "sgp": ("SGP", "0.002", "93.90"),
        "slowmo_sgp": ("SGP with SlowMo", "0.001", "94.32"),
        "ar_sgd": ("AR-SGD", "0.002", "92.66"),
    },
    "imagenet": {
        "local_sgd": ("Local SGD", "1.43", "69.94"),
        "slowmo_local_sgd": ("Local SGD with SlowMo", "1.21", "73.24"),
        "osgp": ("OSGP", "1.03", "74.96"),
        "slowmo_osgp": ("OSGP with SlowMo", "0.97", "75.54"),
        "sgp": ("SGP", "1.07", "75.15"),
        "slowmo_sgp": ("SGP with SlowMo", "1.00", "75.73"),
        "ar_sgd": ("AR-SGD", "0.96", "76.00"),
    },
    "wmt16": {
        "local_adam": ("Local Adam", "2.520", "26.62"),
        "slowmo_local_adam": ("Local Adam with SlowMo", "2.480", "27.14"),
        "sgp": ("SGP", "2.500", "26.92"),
        "slowmo_sgp": ("SGP with SlowMo", "2.447", "27.84"),
        "ar_adam": ("AR-Adam", "2.468", "27.17"),
    },
}
# the same in small, on data that can be made anywhere
# where the paper has no number
SMALL_ONLY = dict.fromkeys(("cifar10_small", "cifar10_small_loss"), ("sgp_noaverage", "double_averaging_sgp", "double_averaging_local_sgd"))
IN_SMALL = {"cifar10_small": "cifar10", "cifar10_small_loss": "cifar10", "imagenet_small": "imagenet", "wmt16_small": "wmt16"}
# the paper's other runs: noaverage and double-averaging
OTHERS = {
    "imagenet": {"sgp_noaverage": "75.78", "double_averaging_sgp": "75.54", "double_averaging_local_sgd": "72.04"},
    "wmt16": {"sgp_noaverage": "2.11"},
}
# neither evaluations (5) nor checkpoints (7) fall on slow steps (4), and 46 is a multiple of none of them
NOISY = ("task=quadratic", "workers=4", "steps=46", "outer.tau=4", "evaluate.every=5", "checkpoint_every=7", "task.noise=0.3",
         "optimizer.momentum=0.9", "optimizer.nesterov=true", "dtype=float64")  # fmt: skip
SGP = (*NOISY, "base=sgp")
PICTURES = ("task=cifar10", "workers=4", "steps=11", "base=sgp", "outer.tau=3", "optimizer.momentum=0.9", "task.batch_size=16",
            "task.layers=[1,1,1,0]", "task.width=4", "data.train=64", "data.validation=20", "evaluate.every=3",
            "checkpoint_every=4", "cluster.threads=1")  # fmt: skip
absent = [package for package in ("skimage", "sklearn") if importlib.util.find_spec(package) is None]
photos = pytest.mark.skipif(bool(absent), reason="the photos extra is not installed")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the photo patches are made, once a size."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return tree(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture(scope="module")
def wmt16(tmp_path_factory):
    if importlib.util.find_spec("fairseq") is None:
        pytest.skip("the wmt16 extra is not installed")
    return databin(tmp_path_factory.mktemp("wmt16"))


def suite_of(name) -> str:
    return re.match("(?:cifar10|imagenet|wmt16)(?:_small(?:_loss)?)?|quickstart", name)[0]


def small(name, request) -> list[str]:
    """What makes an experiment small: few data in their real format, a thin net, a small batch."""
    suite = suite_of(name)
    if suite in ("imagenet", "imagenet_small"):
        return ["data=imagenet", f"data.root={request.getfixturevalue('imagenet')}", "data.train=66", "data.validation=21",
                "data.classes=3", "workers=4", "task.batch_size=8", "task.layers=[1,1,0,0]", "task.width=4", "task.size=32",
                "task.resize=36", "task.num_loader_workers=0", "cluster.threads=1", "cluster.device=cpu"]  # fmt: skip
    if suite in ("wmt16", "wmt16_small"):
        return ["data=wmt16", f"data.root={request.getfixturevalue('wmt16')}", "workers=4", "task.layers=1", "task.dim=16", "task.ffn=16",
                "task.heads=2", "task.max_tokens=48", "task.pieces=2", "cluster.threads=1", "cluster.device=cpu"]  # fmt: skip
    words = ["data.train=256", "data.validation=16", f"data.root={request.getfixturevalue('cache')}"]
    if suite == "cifar10":
        words += ["data=photos", "task.width=8", "task.batch_size=64", "cluster.threads=1", "cluster.device=cpu"]
    return words


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that nothing happened to."""
    return finished(*SGP, cwd=tmp_path_factory.mktemp("straight"))


def strict(path):
    """JSON as it is defined: without NaN and Infinity, which Python would read."""

    def refuse(name):
        raise AssertionError(f"{path}: {name} is no JSON")

    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    return json.loads(text, parse_constant=refuse)


def rows(folder) -> list[dict]:
    """All metric rows without their clock."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in strict(folder / "metrics.jsonl")]


def assert_close_run(folder, expected) -> None:
    """As far as sums in another order agree."""
    left, right = arrays(folder), arrays(expected)
    for name in right:
        np.testing.assert_allclose(left[name], right[name], rtol=1e-12, atol=1e-12)
    for row, other in zip(rows(folder), rows(expected), strict=True):
        texts = ("evaluated", "slow_momentum_norm") if other["slow_momentum_norm"] is None else ("evaluated",)
        assert all(row.pop(name) == other.pop(name) for name in texts)
        assert row == pytest.approx(other, rel=1e-9, abs=1e-12)


def checkpoints(folder) -> list[str]:
    """What lies in the folder of checkpoints, whatever it is."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same_run(folder, expected) -> None:
    """Bitwise: iterates, momenta, every metric row; and nothing but the last two checkpoints is left."""
    left, right = arrays(folder), arrays(expected)
    assert left.keys() == right.keys() == {"x", "mean", "u"}
    assert all(left[key].dtype == right[key].dtype and (left[key] == right[key]).all() for key in right)
    assert rows(folder) == rows(expected)
    results = [strict(path / "result.json") for path in (folder, expected)]
    assert results[0]["best"] == results[1]["best"] and results[0]["status"] == results[1]["status"] == "done"
    assert checkpoints(folder) == checkpoints(expected)
    assert not list(folder.rglob("*partial*"))


# ---- experiments


# one of each suite, and each algorithm once; the others are behind the marker
SOME = ("cifar10_slowmo_sgp", "cifar10_small_slowmo_osgp", "cifar10_small_loss_ar_sgd", "imagenet_double_averaging_sgp",
        "imagenet_small_local_sgd", "quickstart_slowmo_local_sgd", "wmt16_slowmo_local_adam", "wmt16_small_sgp_noaverage")  # fmt: skip


@photos
@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in SOME else pytest.mark.slow) for name in EXPERIMENTS])
def test_every_experiment_takes_two_steps(name, request, tmp_path):
    folder = finished(f"experiment={name}", "steps=2", "epochs=null", "evaluate.band=true", *small(name, request), cwd=tmp_path)
    result, (row,) = strict(folder / "result.json"), rows(folder)
    assert (result["status"], result["step"], result["experiment"]) == ("done", 2, name)
    assert row["step"] == 2 and 0 < row["train_loss"] < 1000 and row["nll_worker_min"] <= row["nll_worker_max"]
    if "accuracy" in row:
        assert 0 <= row["accuracy_worker_min"] <= row["accuracy_worker_max"] <= 100
    else:
        assert set(result["bleu"]) == {"valid", "test"} and all(0 <= facts["bleu"] <= 100 for facts in result["bleu"].values())
    assert folder.parent.name.startswith(name) and folder.name == "seed1"
    assert [path.name for path in (folder / "models").iterdir()] == ["step-000000002.safetensors"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_prints_its_plan(name, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suite = suite_of(name)
    case = name.removeprefix(f"{suite}_")
    # a plan of translations counts batches and words: it needs the data
    words = ()
    if suite in ("wmt16", "wmt16_small"):
        words = ("data=wmt16", f"data.root={request.getfixturevalue('wmt16')}", "task.max_tokens=32", "task.pieces=1", "task.layers=1",
                 "task.dim=16", "task.ffn=16", "task.heads=2")  # fmt: skip
    *_, done = planned(f"experiment={name}", *words)
    assert done.fact("experiment") == name and done.fact("folder").startswith(f"runs/{name}") and not (tmp_path / "runs").exists()
    assert done.fact("cost") != "-"
    if suite == "quickstart":
        assert done.fact("table cell") == "none of the paper's" and done.fact("paper") == "-"
        return
    paper, cell, words = IN_SMALL.get(suite, suite), done.fact("table cell"), done.fact("paper")
    if case in TABLE_1[paper]:
        algorithm, loss, best = TABLE_1[paper][case]
        assert cell.startswith(algorithm) or cell.endswith(f", {algorithm}")
        assert "Table 1" in cell and ("SlowMo" in cell) == ("slowmo" in case)
        figures = (loss, best)
    elif case in SMALL_ONLY.get(suite, ()):
        figures = ()
    else:
        figures = (OTHERS[paper][case],)
    if suite == paper:  # no number of the paper's is a target on other data
        assert all(f" {figure}" in words for figure in figures)
    else:
        assert words == "-"
    assert f"m = {8 if paper == 'wmt16' or suite == 'imagenet_small' else 32}," in done.fact("title")
    if paper != "wmt16":
        steps, tau = int(done.fact("iterations").replace(",", "")), 12 if suite != "imagenet" or "local" in case else 48
        # 200 epochs of 50 000 pictures in batches of 4096, the last one left out; 90 of 1.28 million in batches of 8192
        assert steps == {"cifar10": 2400, "imagenet": 14040}.get(suite, steps)
        assert done.fact("slow steps") == ("0" if case in ("sgp", "osgp", "ar_sgd") else f"{steps // tau:,}")


def test_table_1_is_whole():
    wanted = {f"{suite}_{case}" for paper, cells in TABLE_1.items() for case in (*cells, *OTHERS.get(paper, ()))
              for suite in (paper, *(small for small, of in IN_SMALL.items() if of == paper))}  # fmt: skip
    wanted |= {f"{small}_{case}" for small, cases in SMALL_ONLY.items() for case in cases}
    assert wanted <= set(EXPERIMENTS) and len(EXPERIMENTS) == len(wanted) + 2  # and the quickstart


# ---- golden numbers


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "c, words, x, u",
    [
        ([-1, 7], "base=local_sgd steps=6 optimizer.lr=0.5 outer.tau=2", 3.71875, -0.1875),
        ([-1, 7], "base=local_sgd steps=6 optimizer.lr=0.5 outer.tau=2 outer.alpha=0.5", 3.16796875, None),
        ([-1, 7], "base=local_sgd steps=6 optimizer.lr=0.5 outer.tau=2 schedule=step schedule.milestones=[2] schedule.factor=0.5",
         3.349609375, None),
        ([-1, 7], "base=local_sgd steps=6 optimizer.lr=0.5 outer=average outer.tau=2", 2.96875, 0),
        ([-1, 7, 4, -2], "base=sgp steps=6 optimizer.lr=0.5 outer.tau=3", 2.421875, None),
        ([-1, 7, 4, -2], "base=osgp steps=6 optimizer.lr=0.25 outer.tau=3", 2.111083984375, None),
    ],
    ids=["local_sgd", "alpha", "schedule", "average", "sgp", "osgp"],
)  # fmt: skip
def test_golden_numbers(c, words, x, u, dtype, tmp_path):
    """Problem G: f_i(x) = (x - c_i)^2 / 2, all start at 1; the numbers are exact in float32 too."""
    file, beta = problem(tmp_path / "g.npz", c), [] if "average" in words else ["outer.beta=0.5"]
    words = (f"task.problem={file}", f"workers={len(c)}", f"dtype={dtype}", *beta, *words.split())
    folder = finished("task=quadratic", *words, cwd=tmp_path)
    final = arrays(folder)
    assert final["x"].shape == (len(c), 1) and final["mean"].shape == final["u"].shape == (1,) and final["x"].dtype == dtype
    assert (final["x"] == x).all() and (final["mean"] == x).all()
    assert u is None or final["u"] == u


def test_golden_numbers_of_sgp_alone(tmp_path):
    """Without a slow step workers differ: x has a row each, the mean is between them, u is zero."""
    file = problem(tmp_path / "g.npz", [-1, 7, 4, -2])
    words = ("task=quadratic", f"task.problem={file}", "workers=4", "steps=4", "base=sgp", "outer=none", "optimizer.lr=0.5")
    final = arrays(finished(*words, cwd=tmp_path))
    assert final["x"].flatten().tolist() == [1.6875, 2.1875, 1.6875, 2.1875] and final["mean"] == 1.9375 and final["u"] == 0


# ---- processes


@pytest.mark.parametrize("base", ["sgp", *(pytest.param(base, marks=pytest.mark.slow) for base in ("local_sgd", "osgp", "allreduce"))])
def test_processes_agree_with_one(base, tmp_path):
    words = (*NOISY, f"base={base}")
    folders = {p: finished(*words, f"runs=on{p}", cwd=tmp_path, processes=p) for p in (1, 2, 4)}
    for p in (2, 4):
        assert_close_run(folders[p], folders[1])


@pytest.mark.slow
def test_node_workers_agree_with_one_process(tmp_path):
    """Two workers of two processes each."""
    words = (*SGP, "workers=2")
    alone, nodes = (finished(*words, f"runs=on{p}", cwd=tmp_path, processes=p) for p in (1, 4))
    assert_close_run(nodes, alone)


@pytest.mark.slow
def test_through_torchrun(straight, tmp_path):
    """The true launcher, its own processes and its own exit."""
    words = [*SGP, f"runs={tmp_path}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    real = [*launcher, str(ROOT / "run.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(real, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: ") == 1
    (result,) = tmp_path.glob("*/seed1/result.json")
    assert (strict(result)["processes"], strict(result)["step"]) == (2, 46)
    assert_close_run(result.parent, straight)


# ---- sweeps


SHORT = ("task=quadratic", "workers=4", "steps=6", "outer.tau=3", "dtype=float64")


def test_a_sweep_s_config_is_not_shown_but_neither_does_it_train(tmp_path):
    done = command("-m", "--cfg", "job", *SHORT, "seed=1,2", cwd=tmp_path)
    assert done.code == 2 and "--cfg and --info show one run's config: leave -m out" in done.err and not (tmp_path / "runs").exists()


def test_a_refusal_does_not_end_a_sweep(tmp_path):
    """Nor does one that Hydra itself finds, nor an error that nobody foresaw; the largest exit code is the sweep's."""
    done = command("-m", *SHORT, "outer.beta=1.5,0.5", "seed=1,2", cwd=tmp_path)
    assert done.code == 2 and done.err == 2 * "error: beta=1.5: the slow momentum lies in [0, 1)\n"
    assert done.out.endswith(
        "4 jobs: 2 refused, 2 done\n"
        "  refused     outer.beta=1.5 seed=1  beta=1.5: the slow momentum lies in [0, 1)\n"
        "  refused     outer.beta=1.5 seed=2  beta=1.5: the slow momentum lies in [0, 1)\n"
        "  done        outer.beta=0.5 seed=1\n  done        outer.beta=0.5 seed=2\n"
    )
    assert len(list(tmp_path.glob("runs/*/seed*/result.json"))) == len(list(tmp_path.glob("runs/*/*"))) == 2
    done = command("-m", *SHORT[:3], "outer=nope,none,average", "base=local_sgd,sgp", "outer.tau=3", "runs=other", cwd=tmp_path)
    assert done.code == 2 and "6 jobs: 4 refused, 2 done" in done.out and "Traceback" not in done.err
    assert "refused     outer=nope base=sgp" in done.out and "done        outer=average base=sgp" in done.out

    def bug(rank):
        def raise_it():
            raise ZeroDivisionError("of nobody's making")

        at_call(TrainingMeter, "start", 3, raise_it)

    done = command("-m", *SHORT, "seed=1,2", "runs=third", cwd=tmp_path, before=bug)
    assert done.code == 1 and "Traceback" in done.err and "2 jobs: 1 failed, 1 done" in done.out
    assert "  failed      seed=1  ZeroDivisionError: of nobody's making\n" in done.out
    assert [path.parent.name for path in tmp_path.glob("third/*/*/result.json")] == ["seed2"]


def test_a_signal_ends_a_sweep(tmp_path):
    done = command("-m", *SHORT, "steps=50", "seed=1,2,3", cwd=tmp_path, before=signal_at_step(13, signal.SIGTERM))
    assert done.code == 128 + signal.SIGTERM and "saved at step 13" in done.out
    assert "3 jobs: 1 stopped, 2 not started" in done.out and [path.name for path in tmp_path.glob("runs/*/*")] == ["seed1"]


def test_options_in_a_sweep_have_their_own_values(tmp_path):
    """A sweep over a group that the experiment sets values of."""
    words = ("experiment=cifar10_small_slowmo_sgp", "outer=slowmo,lookahead,none", "dry_run=true")
    done = command("-m", *words, cwd=tmp_path)
    assert done.code == 0 and "3 jobs: 3 done" in done.out, done.text
    for title in (f"slowmo (tau = 12, alpha = 1.0, beta = {BETA},", "lookahead (tau = 5, alpha = 0.5, beta = 0.0,", "none\n"):
        assert f"outer = {title}" in done.out


@pytest.mark.slow
def test_sweeps_on_two_processes(tmp_path):
    """All processes run all jobs, also after a refused one, and meet anew for each."""
    words = (*SHORT, "outer.beta=0.5,2.0", "seed=1,2,3")
    done = command("-m", *words, cwd=tmp_path, processes=2)
    assert (
        done.codes == [2, 2] and done.out.count("6 jobs: 3 done, 3 refused") == 1 and done.out.count("processes = 2 (2 per process)") == 3
    )
    assert command("-m", *words, "runs=alone", cwd=tmp_path).code == 2
    for seed in (1, 2, 3):
        (two,), (alone,) = (tmp_path.glob(f"{runs}/*/seed{seed}") for runs in ("runs", "alone"))
        assert_close_run(two, alone)


@pytest.mark.slow
def test_a_sweep_through_torchrun(tmp_path):
    """Its agent keeps one store for all jobs."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, str(ROOT / "run.py"), "-m", *SHORT, "seed=1,2"], check=False, cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: ") == 2 and "2 jobs: 2 done" in done.stdout
    assert [strict(path)["processes"] for path in tmp_path.glob("runs/*/*/result.json")] == [2, 2]


# ---- stopped and killed runs


@pytest.fixture(scope="module")
def straight_on_two(tmp_path_factory):
    return finished(*SGP, cwd=tmp_path_factory.mktemp("two"), processes=2)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass
class Place:
    """The `count`-th call of a function, on its way in or (`after`) out."""

    where: object
    name: str
    count: int
    after: bool = False

    def __call__(self, rank):
        at_call(self.where, self.name, self.count, die, self.after)

    def __str__(self):
        return f"{'after' if self.after else 'at'} {self.name} {self.count}"


# fsync: two at the start (config, metrics), two an evaluation (model, row), and a checkpoint's workers, its global file and its manifest.
# replace: two at the start, ten models, then final.npz and result.json
PLACES = [
    Place(TrainingMeter, "start", 3),  # nothing saved yet
    Place(TrainingMeter, "start", 20),
    Place(TrainingMeter, "start", 46),
    Place(os, "fsync", 5),  # the workers of the first checkpoint
    Place(os, "fsync", 7),  # the manifest of the first checkpoint
    Place(os, "rename", 1),  # whole, but not yet under its name
    Place(os, "rename", 1, after=True),
    Place(os, "rename", 3, after=True),  # three of them
    Place(os, "unlink", 2),  # an old one half deleted
    Place(json, "dumps", 3),  # a metric row is due
    Place(os, "replace", 13),  # final.npz without its name
    Place(os, "replace", 14),  # all done, only result.json is missing
]


@pytest.mark.parametrize("place", [pytest.param(p, marks=[] if k % 3 == 1 else pytest.mark.slow) for k, p in enumerate(PLACES)], ids=str)
def test_killed_anywhere_a_run_ends_as_if_nothing_had_happened(place, straight, tmp_path):
    assert command(*SGP, cwd=tmp_path, before=place).code == -signal.SIGKILL
    assert not list(tmp_path.rglob("result.json"))
    assert_same_run(finished(*SGP, cwd=tmp_path), straight)


def test_killed_again_and_again(straight, tmp_path):
    """One run, at moments of a fixed seed; some of them bring it no further than it was."""
    rng = random.Random(20)
    for steps in [rng.randint(1, 12) for _ in range(4)]:
        assert command(*SGP, cwd=tmp_path, before=Place(TrainingMeter, "start", steps)).code == -signal.SIGKILL
    assert_same_run(finished(*SGP, cwd=tmp_path), straight)


def test_killed_by_the_clock(straight, tmp_path):
    """In the middle of whatever it is doing a few milliseconds after its first step."""
    rng, killed = random.Random(5), 0

    def before(delay):
        return lambda rank: at_call(TrainingMeter, "start", 1, threading.Timer(delay, die).start)

    for _ in range(3):
        killed += command(*SGP, cwd=tmp_path, before=before(rng.uniform(0, 0.02))).code == -signal.SIGKILL
    assert killed
    assert_same_run(finished(*SGP, cwd=tmp_path), straight)


def test_killed_as_one_of_two_processes(straight_on_two, tmp_path):
    """The other one notices (here soon, by its timeout); both together go on later."""
    words = (*SGP, "cluster.timeout=20")
    started = Command(*words, cwd=tmp_path, processes=2, before=lambda rank: rank and Place(TrainingMeter, "start", 30)(rank))
    try:
        done = started.wait(60)
    finally:
        started.kill()
    assert done.codes[1] == -signal.SIGKILL and done.codes[0] != 0
    assert_same_run(finished(*words, cwd=tmp_path, processes=2), straight_on_two)


def test_half_a_metric_row_is_no_row(straight, tmp_path):
    assert command(*SGP, cwd=tmp_path, before=Place(TrainingMeter, "start", 18)).code == -signal.SIGKILL
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    with open(metrics, "a") as file:
        file.write('{"step": 20, "epo')
    assert_same_run(finished(*SGP, cwd=tmp_path), straight)


def real(task, request) -> tuple[str, ...]:
    """Eleven steps of SGP with SlowMo on small real data, a network with BatchNorm or with dropout."""
    if task == "cifar10":
        return (*PICTURES, f"data.root={request.getfixturevalue('cache')}")
    words = ("workers=4", "steps=11", "base=sgp", "outer.tau=3", "evaluate.every=3", "checkpoint_every=4", "evaluate.keep=2")
    if task == "imagenet":
        return (*words, "task=imagenet", *small("imagenet", request), "optimizer.momentum=0.9", "task.num_loader_workers=1")
    return (*words, "task=wmt16", *small("wmt16", request), "optimizer=adam", "outer.buffers=maintain")


def numbers(row) -> dict:
    return {name: value for name, value in row.items() if isinstance(value, (int, float))}


def same_files(folder, expected, part) -> dict:
    """Bitwise, tensor by tensor, whichever rank's file of a checkpoint has it; the first run's tensors."""
    left, right = {}, {}
    for found, path in ((left, folder / part), (right, expected / part)):
        for file in path.rglob("*.safetensors"):
            name = file.name if part == "models" else ""
            found |= {name + key: value for key, value in load_file(file).items()}
    assert right and left.keys() == right.keys() and all((left[key] == right[key]).all() for key in right)
    return left


@photos
@pytest.mark.slow
@pytest.mark.parametrize("task", ["cifar10", "imagenet", "wmt16"])
def test_killed_with_real_data(task, request, tmp_path):
    """Parameters, momenta, x0 and u, push-sum weights, BatchNorm statistics of every worker, bitwise; averaged models and BLEU too."""
    words = real(task, request)
    expected = finished(*words, "runs=straight", cwd=tmp_path)
    for step in (6, 6):  # the second counts from the checkpoint of step 4
        assert command(*words, cwd=tmp_path, before=Place(TrainingMeter, "start", step)).code == -signal.SIGKILL
    folder = finished(*words, cwd=tmp_path)
    assert rows(folder) == rows(expected)
    state = same_files(folder, expected, "checkpoints/step-000000011")
    same_files(folder, expected, "models")
    momentum = "exp_avg" if task == "wmt16" else "momentum_buffer"
    weight = next(key for key in state if key.startswith("3/model.") and key.endswith(".weight")).removeprefix("3/model.")
    assert {
        f"{i}/{key}" for i in range(4) for key in (f"model.{weight}", "push_sum_weight", f"optimizer.{momentum}.{weight}")
    } <= state.keys()
    assert task == "wmt16" or state["3/model.bn1.running_var"].std() > 0
    assert [strict(path / "result.json").get("bleu") for path in (folder,)] == [strict(expected / "result.json").get("bleu")]


@photos
@pytest.mark.parametrize("task", ["cifar10", pytest.param("imagenet", marks=pytest.mark.slow), "wmt16"])
def test_two_processes_are_one_with_real_data(task, request, tmp_path):
    words = [word for word in real(task, request) if not word.startswith("outer.")]
    alone, two = (finished(*words, "outer=none", f"runs=on{p}", cwd=tmp_path, processes=p) for p in (1, 2))
    same_files(two, alone, "checkpoints/step-000000011")  # gossip reorders no sum
    for row, other in zip(rows(two), rows(alone), strict=True):
        assert numbers(row) == pytest.approx(numbers(other), rel=1e-5, abs=1e-7)


def test_node_workers_are_one_process_with_pieces(request, tmp_path):
    """Two workers of two processes each, on texts: each process takes one of a worker's two pieces."""
    words = (*real("wmt16", request), "workers=2", "dtype=float64", "optimizer=sgd")
    alone, nodes = (finished(*words, f"runs=on{p}", cwd=tmp_path, processes=p) for p in (1, 4))
    for row, other in zip(rows(nodes), rows(alone), strict=True):
        assert numbers(row) == pytest.approx(numbers(other), rel=1e-5, abs=1e-6)  # fairseq's softmax is in float32


def test_loaders_survive_the_signal_of_their_run(request, tmp_path):
    """A scheduler signals every process of a job: the loaders must live until the run has finished its step."""
    words = real("imagenet", request)
    expected = finished(*words, "runs=straight", cwd=tmp_path)

    def everybody():
        for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
            os.kill(process, signal.SIGTERM)

    done = command(*words, cwd=tmp_path, before=lambda rank: at_call(TrainingMeter, "start", 5, everybody))
    assert done.code == 128 + signal.SIGTERM and "SIGTERM: saved at step 5" in done.out, done.text
    folder = finished(*words, cwd=tmp_path)
    assert rows(folder) == rows(expected)
    same_files(folder, expected, "checkpoints/step-000000011")


def test_a_run_that_was_to_start_anew_goes_on_without_that_word(tmp_path):
    done = command(*SGP, "resume=never", cwd=tmp_path, before=signal_at_step(13, signal.SIGTERM))
    assert "saved at step 13; the same command, without resume=never, goes on from there" in done.out


def test_a_round_that_never_ends_is_said(tmp_path):
    done = command(*SGP, "outer=slowmo", "outer.tau=1000", "dry_run=true", cwd=tmp_path)
    assert done.code == 0 and "end before outer.tau=1000" in done.out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals(number, straight, tmp_path):
    done = command(*SGP, cwd=tmp_path, before=signal_at_step(13, number))
    assert done.code == 128 + number
    assert f"{number.name}: saved at step 13; the same command goes on from there" in done.out
    assert "Traceback" not in done.err and not list(tmp_path.rglob("result.json"))
    done = command(*SGP, cwd=tmp_path)
    assert done.code == 0 and "resumed at step 13" in done.out
    assert_same_run(next(tmp_path.rglob("final.npz")).parent, straight)


def test_a_second_signal_ends_at_once(straight, tmp_path):
    def before(rank):
        at_call(TrainingMeter, "start", 13, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])

    assert command(*SGP, cwd=tmp_path, before=before).code == -signal.SIGTERM
    assert_same_run(finished(*SGP, cwd=tmp_path), straight)


def test_a_signal_at_the_last_step_changes_nothing(straight, tmp_path):
    assert_same_run(finished(*SGP, cwd=tmp_path, before=signal_at_step(46, signal.SIGTERM)), straight)


def test_a_signal_to_one_of_two_processes(straight_on_two, tmp_path):
    """To the one that does not print."""
    done = command(*SGP, cwd=tmp_path, processes=2, before=signal_at_step(13, signal.SIGUSR1, only=1))
    assert done.codes == [128 + signal.SIGUSR1] * 2
    assert done.out.count("SIGUSR1: saved at step 14; the same command goes on") == 1  # 14: the next step at which they meet
    assert_same_run(finished(*SGP, cwd=tmp_path, processes=2), straight_on_two)


@pytest.mark.parametrize(
    "words, bitwise", [(("base=sgp", "outer=none"), True), pytest.param(("base=local_sgd",), False, marks=pytest.mark.slow)]
)
def test_goes_on_under_another_folding(words, bitwise, tmp_path):
    """One process, then two, then four (a worker each), then one again."""
    words = tuple(word for word in NOISY if bitwise <= (not word.startswith("outer."))) + words
    if bitwise:  # a process with one worker has nothing to compute together, which sums in another order
        words += ("cluster.vectorize=false",)
    expected = finished(*words, "runs=straight", cwd=tmp_path)
    for processes, step in ((1, 6), (2, 10), (4, 8)):
        stop = signal_at_step(step, signal.SIGTERM, only=0)
        assert command(*words, cwd=tmp_path, processes=processes, before=stop).code == 128 + signal.SIGTERM
    folder = finished(*words, cwd=tmp_path)
    assert_close_run(folder, expected)
    assert not bitwise or (arrays(folder)["x"] == arrays(expected)["x"]).all()


@pytest.mark.slow
def test_stopped_from_outside(tmp_path):
    """`python run.py` in a process of its own, SIGTERM from another one."""
    words = ("task=quadratic", "workers=2", "steps=1500", "evaluate.every=50", "dtype=float64", f"runs={tmp_path / 'runs'}")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    real = [sys.executable, str(ROOT / "run.py"), *words]
    process = subprocess.Popen(real, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while not (found := list(tmp_path.rglob("metrics.jsonl"))) or not found[0].read_text().count("\n"):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on from there" in out
    folder = finished(*words, cwd=tmp_path)
    expected = finished(*words, f"runs={tmp_path / 'straight'}", cwd=tmp_path)
    assert rows(folder) == rows(expected) and (arrays(folder)["x"] == arrays(expected)["x"]).all()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_saves_and_nohup_goes_on(ignored, tmp_path):
    def before(rank):
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal_at_step(13, signal.SIGHUP)(rank)

    done = command(*SGP, cwd=tmp_path, before=before)
    assert done.code == (0 if ignored else 128 + signal.SIGHUP) and ("SIGHUP: saved at step" in done.out) != ignored, done.text


@pytest.mark.slow
def test_who_reads_along_may_go(tmp_path):
    """As with `run.py ... | head`: the run goes on to its end, and its words are in log.txt."""
    words = ("task=quadratic", "workers=2", "steps=300", "evaluate.every=50", f"runs={tmp_path / 'runs'}")
    process = subprocess.Popen([sys.executable, str(ROOT / "run.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 0 and not err
    assert "done: " in next(tmp_path.rglob("log.txt")).read_text()


# ---- asked again


def test_asked_again_after_the_end(tmp_path):
    folder = finished(*SGP, cwd=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    done = command(*SGP, cwd=tmp_path, before=lambda rank: at_call(TrainingMeter, "start", 1, die))
    assert done.code == 0 and "already done at step 46" in done.out and "delete the folder" in done.out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    assert command(*SGP, cwd=tmp_path, processes=2).out.count("already done at step 46") == 1


def test_only_the_last_two_checkpoints_are_kept(straight):
    assert checkpoints(straight) == ["step-000000042", "step-000000046"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rename_count(path):
    """One bit of a name in the manifest's state."""
    path.write_text(path.read_text().replace('"count"', '"counu"'))


def no_object(path):
    path.write_text("[]")


DAMAGES = [
    (flip, "rank-00000.safetensors"),
    (flip, "global.safetensors"),
    (halve, "rank-00000.safetensors"),
    (halve, "manifest.json"),
    (Path.unlink, "rank-00000.safetensors"),
    (rename_count, "manifest.json"),
    (no_object, "manifest.json"),
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run stopped at step 23, with checkpoints of 21 and 23."""
    folder = tmp_path_factory.mktemp("stopped")
    assert command(*SGP, cwd=folder, before=signal_at_step(23, signal.SIGTERM)).code == 128 + signal.SIGTERM
    return folder / "runs"


@pytest.mark.parametrize("damage, name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage, name, stopped, straight, tmp_path):
    shutil.copytree(stopped, tmp_path / "runs")
    (newest,) = tmp_path.rglob("step-000000023")
    damage(newest / name)
    done = command(*SGP, cwd=tmp_path)
    assert done.code == 0, done.text
    assert "checkpoint step-000000023 is damaged" in done.out and "resumed at step 21" in done.out
    folder = newest.parent.parent
    shutil.rmtree(folder / "checkpoints" / "step-000000023.damaged")  # kept for whoever wants to look
    assert_same_run(folder, straight)


def test_a_checkpoint_damaged_for_one_of_two_processes(tmp_path):
    stop = signal_at_step(23, signal.SIGTERM)
    assert command(*SGP, cwd=tmp_path, processes=2, before=stop).code == 128 + signal.SIGTERM
    (newest,) = tmp_path.rglob("step-000000024")
    flip(newest / "rank-00001.safetensors")
    done = command(*SGP, cwd=tmp_path, processes=2)
    assert done.codes == [0, 0], done.text
    assert done.out.count("checkpoint step-000000024 is damaged") == 1 and "resumed at step 21" in done.out


@pytest.mark.parametrize("processes", [1, 2])
def test_all_checkpoints_damaged(processes, stopped, straight, tmp_path):
    """Never from step 0 on, over metrics of later steps, unless asked; then what was there is moved aside."""
    shutil.copytree(stopped, tmp_path / "runs")
    for path in tmp_path.rglob("manifest.json"):
        halve(path)
    (folder,) = tmp_path.glob("runs/*/seed1")
    for words in ("step-000000023 is damaged", "shows training up to step 23"):  # the second time nothing is left to be called damaged
        done = command(*SGP, cwd=tmp_path, processes=processes)
        assert done.codes == [2] * processes and "Traceback" not in done.err and done.err.count("error: ") == 1
        assert words in done.err and "start anew with resume=never" in done.err
        assert strict(folder / "metrics.jsonl")[-1]["step"] == 20
    done = command(*SGP, "resume=never", cwd=tmp_path)
    assert done.code == 0 and f"resume=never: what was there is in {folder.relative_to(tmp_path)}/.old-1" in done.out
    assert checkpoints(folder / ".old-1") == ["step-000000021.damaged", "step-000000023.damaged"]
    shutil.rmtree(folder / ".old-1")
    assert_same_run(folder, straight)


@pytest.mark.parametrize("processes", [1, 2])
def test_diverged(processes, tmp_path):
    """A row's null for what is not finite, in strict JSON; when it was, what it was, and what to lower."""
    words = ("task=quadratic", "workers=2", "steps=400", "optimizer.lr=1e4", "evaluate.every=4", "base=sgp")
    done = command(*words, cwd=tmp_path, processes=processes)
    assert done.codes == [3] * processes and "diverged: " in done.out and done.out.count("diverged at step ") == 1
    # a loss grows 1e8 times a step: past float32's range at the sixth
    assert re.search(r"at step [567]: the training loss of worker [01] became (inf|nan); lower optimizer.lr=10000 \(", done.out)
    (path,) = tmp_path.rglob("result.json")
    result, lines = strict(path), strict(path.parent / "metrics.jsonl")
    assert result["status"] == "diverged" and result["step"] < 400
    assert lines[-1]["diverged"] and lines[-1]["step"] == result["step"]
    assert result["last"] is None or "diverged" not in result["last"]
    assert not (path.parent / "final.npz").exists()
    before = path.stat().st_mtime_ns
    done = command(*words, cwd=tmp_path, processes=processes)
    assert done.codes == [3] * processes and done.out.count(f"already diverged at step {result['step']}") == 1
    assert path.stat().st_mtime_ns == before


def test_one_run_a_folder_at_a_time(straight, tmp_path):
    """The second is refused and leaves the first alone; a third, after the first was killed, may."""

    def hold(rank):
        def wait():
            while not (tmp_path / "go").exists():
                time.sleep(0.005)

        at_call(TrainingMeter, "start", 10, wait)

    first = Command(*SGP, cwd=tmp_path, before=hold)
    try:
        end = time.monotonic() + 60
        while not list(tmp_path.rglob("step-000000007")):
            assert not first.poll() and time.monotonic() < end
            time.sleep(0.005)
        second = command(*SGP, cwd=tmp_path)
        assert second.code == 2 and "Traceback" not in second.err
        assert "is being written by another run: wait for it, or end it" in second.err
        (tmp_path / "go").touch()
        assert first.wait().code == 0
    finally:
        first.kill()
    assert_same_run(next(tmp_path.rglob("final.npz")).parent, straight)


# ---- the folder


def test_the_folder_is_a_function_of_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def folder(*words):
        return Path(planned("task=quadratic", *words)[-1].fact("folder"))

    files = [problem(tmp_path / f"{k}.npz", [k, 1.0]) for k in (3.0, 4.0)]
    base = ("workers=2", "steps=10", "base=sgp", "optimizer.lr=0.2")
    plain = folder(*base)
    same = {
        "another order": base[::-1],
        "the default, said": (*base, "outer.tau=12", "outer=slowmo", "base/graph=exponential", "task.noise=0.0"),
        "a device": (*base, "cluster.device=cpu", "cluster.threads=1", "cluster.timeout=5"),
        "how often it saves, where data lie": (*base, "checkpoint_every=3", "data.root=elsewhere"),
    }
    assert {name: folder(*words) for name, words in same.items()} == dict.fromkeys(same, plain)
    seeded, elsewhere = folder(*base, "seed=3"), folder(*base, "runs=there")
    assert (seeded.parent, seeded.name) == (plain.parent, "seed3")
    assert elsewhere.parts[0] == "there" and elsewhere.parts[1:] == plain.parts[1:]

    shutil.copy(files[0], tmp_path / "copy.npz")
    filed = folder(*base, f"task.problem={files[0]}")
    assert folder(*base, "task.problem=copy.npz") == filed
    shutil.copy(files[1], tmp_path / "copy.npz")
    different = {
        "plain": plain,
        "tau": folder(*base, "outer.tau=5"),
        "steps": folder(*base, "steps=11"),
        "graph": folder(*base, "base/graph=ring"),
        "evaluations": folder(*base, "evaluate.every=7"),
        "outer": folder(*base, "outer=average"),
        "seeded": seeded,
        "a problem": filed,
        "another problem under the same name": folder(*base, "task.problem=copy.npz"),
    }
    assert len(set(different.values())) == len(different), different


def test_the_folder_of_an_experiment(tmp_path):
    def folder(*words):
        return command("experiment=cifar10_small_slowmo_sgp", *words, "dry_run=true", cwd=tmp_path).fact("folder")

    assert folder() == folder(f"outer.beta={BETA}", "cluster.threads=2") == "runs/cifar10_small_slowmo_sgp/seed1"
    assert folder("outer.beta=0.7") == "runs/cifar10_small_slowmo_sgp,outer.beta=0.7/seed1"
    assert folder("base=osgp", "outer.tau=6") == "runs/cifar10_small_slowmo_sgp,base=osgp,outer.tau=6/seed1"
    # long names are cut and go on with a hash of the whole
    matrices = "[" + ",".join("[" + ",".join("0.03125" for _ in range(32)) + "]" for _ in range(32)) + "]"
    names = {folder("base/graph=mixing", f"base.graph.matrices={matrices}", f"optimizer.lr={lr}") for lr in (0.1, 0.2)}
    assert len(names) == 2 and all(len(Path(name).parent.name) < 255 for name in names)
