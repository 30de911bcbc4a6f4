"""The command for a GPU, on a CPU: its correctness is real there, its speeds are of tiny networks, graphs are refused and noted."""

import csv
import subprocess
import sys
import types
from pathlib import Path

import hydra
import pytest
import torch

from benchmarks import cases, gpu, iterates
from experiments.runner import config
from results.store import COLUMNS, read

ROOT = Path(__file__).parents[2]
NO_GRAPHS = "graph captures a GPU's kernels: choose a CUDA device, or graph=false"


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Inductor takes minutes on a CPU; that compiled replicas are equal is for tests/slowmo/test_passes.py."""
    monkeypatch.setattr(torch, "compile", lambda function, options=None: function)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def measured(out, name, *words):
    gpu.main(["--only", name, "--device", "cpu", "--tiny", "--out", str(out / "gpu.csv"), *words])
    return read(out / "gpu.csv", "gpu").astype(object).fillna("")  # its columns are those of results/store.py


def test_iterates_of_every_base_and_outer_are_those_of_plain_loops(tmp_path):
    lines = measured(tmp_path, "correctness").set_index("what")
    for base, outer in iterates.PAIRS:
        assert 0 <= lines.loc[f"{base}, {outer}", "value"] < 1e-12 and not lines.loc[f"{base}, {outer}", "error"]
    ways = {name: lines.loc[f"ResNet, {name}"] for name in gpu.WAYS}
    assert all((line["error"] == NO_GRAPHS) == ("graphs" in name) for name, line in ways.items())
    assert ways["one after another"]["value"] == 0 and ways["vmap"]["value"] < 1e-12
    assert lines.loc["a process group of one rank", "value"] < 1e-12 and not torch.distributed.is_initialized()
    assert len(lines) == 5 * 9 + 1 + 6 + 1


def test_no_two_bases_or_outers_are_the_same():
    """A comparison that could not fail would tell nothing."""
    found = {pair: iterates.loops(*pair) for pair in iterates.PAIRS}
    same = {frozenset((a, b)) for a in found for b in found if a < b and torch.allclose(found[a], found[b], rtol=1e-6, atol=0)}
    alike = {"none", "average, maintain", "average, average"}  # of AllReduce, whose workers are always their average
    assert all({base for base, _ in pair} == {"allreduce"} and {outer for _, outer in pair} <= alike | {"slowmo, maintain"} | {
        "slowmo, average", "slowmo, noaverage"} for pair in same)  # fmt: skip


def test_what_differs_and_what_fails_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch):
    def wrong(base, outer, device):
        if base == "sgp":
            raise RuntimeError("CUDA error: out of luck\nand a long story")
        return iterates.ours(base, outer, device) * (1 + 1e-6 * (base == "osgp"))

    monkeypatch.setattr(gpu, "ours", wrong)
    lines = measured(tmp_path, "correctness").set_index("what")["error"]
    assert set(lines[lines.index.str.startswith("sgp")]) == {"CUDA error: out of luck"}
    assert set(lines[lines.index.str.startswith("osgp")]) == {"the iterates differ by more than rounding"}
    assert set(lines[lines.index.str.startswith(("allreduce", "local_sgd", "dpsgd", "a process"))]) == {""}


@pytest.mark.parametrize("name", cases.CASES)
def test_speeds(name, tmp_path):
    lines = measured(tmp_path, name).set_index("what")
    case = cases.TINY[name]
    assert set(lines["part"]) == {name} and set(lines.loc[lines["batch"] != "", "batch"]) == {case.m * case.batch}
    for way in gpu.WAYS:
        line = lines.loc[f"{case.what}: {way}"]
        if line["error"]:
            assert line["error"] == NO_GRAPHS or (name, way) == ("transformer", "vmap")  # dropout is every worker's own
            assert line["value"] == ""
        else:
            assert line["value"] > 0 and line["unit"] == case.unit and line["m"] == case.m
            plain = lines.loc[[f"{case.what}: one plain model, {kind}" for kind in ("eager", "compiled")], "value"]
            assert line["ratio"] == pytest.approx(line["value"] / plain.max(), rel=1e-3)
    if name == "resnet18":
        rate = lines.loc[[f"{case.what}: {way}" for way in gpu.WAYS], "value"].replace("", 0).max()
        hours = lines.loc[f"{case.what}: Table 1's CIFAR-10 column, training alone", "value"]
        assert hours == pytest.approx(35 * 2400 * 4096 / rate / 3600, rel=0.01)
        assert "graphs" in "".join(lines.index) and len(lines) == 2 + len(gpu.WAYS) + 1


def test_measured_again_and_left_out(tmp_path):
    measured(tmp_path, "transformer", "--minutes", "0")
    lines = measured(tmp_path, "resnet18", "--minutes", "0")
    again = measured(tmp_path, "resnet18", "--minutes", "0")
    assert list(again["part"]) == list(lines["part"]) == ["transformer"] * 8 + ["resnet18"] * 8
    assert set(again["error"]) == {"left out: the part's time was up"}
    (tmp_path / "gpu.csv").write_text("what,value\nother,1\n")
    with pytest.raises(ValueError, match="has other columns than a list of gpu: move it away"):
        measured(tmp_path, "resnet18")


def test_parts_are_processes_with_a_share_of_the_time(tmp_path, monkeypatch):
    limits = {}

    def run(command, cwd, timeout):
        name = command[command.index("--only") + 1]
        limits[name] = timeout
        assert float(command[command.index("--minutes") + 1]) * 60 < timeout
        if name == "resnet18":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, -9 if name == "resnet50" else 0)

    measured(tmp_path, "resnet18", "--minutes", "0")
    monkeypatch.setattr(gpu, "subprocess", types.SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired))
    gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "gpu.csv")])
    assert list(limits) == ["correctness", *cases.CASES] and sum(gpu.SHARES.values()) == pytest.approx(1)
    assert limits["correctness"] == pytest.approx(0.2 * 513, rel=0.01) and limits["transformer"] == pytest.approx(513, rel=0.01)
    lines = read(tmp_path / "gpu.csv", "gpu")
    assert list(lines["error"])[-2:] == [f"cut off after {limits['resnet18']:.0f} s", "the process ended with code -9"]
    assert len(lines) == 8 + 2  # what a part had written stays


@pytest.mark.slow
def test_torch_and_the_repository_suffice(tmp_path):
    """A machine with a GPU may lack the rest."""
    blocked = (
        "import sys\nfor name in ('hydra', 'omegaconf', 'pandas', 'safetensors', 'fairseq', 'submitit', 'rich'): sys.modules[name] = None\n"
    )
    program = f"{blocked}from benchmarks import gpu\ngpu.main()"
    words = ["--only", "resnet18", "--device", "cpu", "--tiny", "--minutes", "0", "--out", tmp_path / "gpu.csv"]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "gpu.csv") as file:
        assert len(list(csv.DictReader(file))) == 8


def test_no_gpu_no_measurement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: torch sees no GPU: .*--device cpu --tiny"):
        gpu.main(["--out", str(tmp_path / "gpu.csv")])
    assert gpu.COLUMNS == COLUMNS["gpu"] and not list(tmp_path.iterdir())


def test_what_is_measured_is_the_experiment():
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = config.compose(["experiment=cifar10_slowmo_sgp"]).cfg
    case, task, optimizer = cases.CASES["resnet18"], cfg.task, cfg.optimizer
    assert (case.m, case.batch, case.classes) == (cfg.workers, task.batch_size // cfg.workers, 10)
    assert (task.layers, task.width, task.stride, task.channels_last) == ([2, 2, 2, 2], 64, 1, True)
    assert cases.small_pictures.__defaults__ == ((2, 2, 2, 2), 64)
    assert (optimizer.momentum, optimizer.nesterov, optimizer.weight_decay) == (cases.MOMENTUM, True, cases.DECAY)
    assert (cfg.outer.tau, cfg.outer.beta, cfg.outer.buffers) == (cases.TAU, cases.BETA, "reset")
    assert (cfg.base._target_, cfg.base.graph._target_) == ("slowmo.base.SGP", "slowmo.topology.Exponential")
    assert (gpu.PICTURES, gpu.ITERATIONS) == (task.batch_size, cfg.epochs * (50_000 // task.batch_size))
    column = [path.stem for path in (ROOT / "configs/experiment").glob("cifar10_*.yaml") if "small" not in path.stem]
    assert len(column) * 5 == gpu.RUNS


def test_the_transformer_has_the_big_one_s_size():
    with torch.device("meta"):
        model = cases.Transformer()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(209_911_808, rel=0.001)  # fairseq's, see test_plan.py
