"""What the scripts make of result files."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import compare
import pytest
import samples
from PIL import Image

ROOT = Path(__file__).parents[2]


def result(folder, experiment, accuracy, status="done", rows=12):
    best = {"accuracy": {"value": accuracy, "step": 10}, "train_loss": {"value": 1.5, "step": 20}, "nll": {"value": 1.25, "step": 10}}
    diverged = status == "diverged"
    text = {"experiment": experiment, "seed": 1, "status": status, "seconds_per_iteration": 0.125, "folder": f"runs/{experiment}/seed1",
            "best": {} if diverged else best, "last": None if diverged else {"accuracy": 50.0, "train_loss": 1.5, "nll": 1.5}}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(text))
    rows = [{"step": 10 * k, "accuracy": accuracy - 30 / (k + 1), "train_loss": 3 / (k + 1)} for k in range(rows)]
    rows += [{"step": 10 * len(rows), "diverged": True}] * diverged
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(name="compare")
def _compare(monkeypatch, capsys):
    """compare(*words) on a screen of 80 columns: its exit code or last words, and what it printed."""

    def say(*words):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "80")
        try:
            code = compare.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return say


def test_compare_pairs_a_run_with_its_base(tmp_path, compare):
    result(tmp_path / "a", "x_sgp", 51.0)
    result(tmp_path / "b", "x_slowmo_sgp", 53.5)
    code, out, _ = compare(tmp_path / "a", tmp_path / "b")
    assert code is None and "53.50 50.00" in out and "125.0" in out
    assert "seed 1, SlowMo over x_sgp: best accuracy +2.50, training loss +0.000" in out


def test_compare_shows_the_course_in_blocks(tmp_path, compare):
    result(tmp_path / "a", "x_sgp", 51.0)
    result(tmp_path / "b", "x_slowmo_sgp", 81.0)
    _, out, _ = compare(tmp_path)
    at = out.splitlines().index("accuracy, 21.00 to 78.50")
    low, high = (line.split()[-1] for line in out.splitlines()[at + 1 : at + 3])
    assert (low[0], high[-1], len(low)) == ("▁", "█", 24) and all(a < b for a, b in zip(low, high))


@pytest.mark.parametrize(
    "name", ["quickstart_slowmo_local_sgd", "cifar10_small_slowmo_sgp,data.train=12288,outer.beta=0.25,task.batch_size=1024"]
)
def test_compare_cuts_nothing_at_80_columns(name, tmp_path, compare):
    result(tmp_path / "a", name, 100.0)
    result(tmp_path / "b", f"{name}2", 0.0, "diverged")
    _, out, _ = compare(tmp_path)
    part = out[: out.index("\ntraining loss, ")]
    assert all(len(line) <= 80 for line in part.splitlines()) and "…" not in out
    head, *body = part[part.index("run ") :].splitlines()
    first = "".join(line[: head.index("seed")].strip() for line in body)
    assert first == f"{name}{name}2" and "100.00 50.00" in part and "1.250 1.500" in part and "diverged" in part


def test_compare_draws_a_picture(tmp_path, compare):
    result(tmp_path / "a", "x_sgp", 51.0)
    _, out, _ = compare(tmp_path / "a", "--picture", tmp_path / "new/a.png")
    assert f"picture: {tmp_path}/new/a.png" in out
    with Image.open(tmp_path / "new/a.png") as image:
        image.verify()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_compare_never_shows_a_diverged_run_as_a_number(tmp_path, compare):
    result(tmp_path / "a", "x_sgp", 51.0)
    result(tmp_path / "b", "x_slowmo_sgp", 0.0, "diverged", rows=0)
    _, out, _ = compare(tmp_path)
    assert "diverged" in out and "SlowMo over" not in out and "0.00 " not in out.replace("50.00", "")


def test_compare_says_what_is_wrong(tmp_path, compare):
    assert "python run.py experiment=" in compare(tmp_path)[0]
    assert "usage: compare.py" in compare("--help")[1] and "usage:" in compare()[2]
    result(tmp_path / "a", "x_sgp", 51.0)
    assert "no folder nowhere" in compare(tmp_path / "a", "nowhere")[2]
    assert f"{tmp_path} is a folder" in compare(tmp_path / "a", "--picture", tmp_path)[2]
    assert "no picture at /proc/x/y.png" in compare(tmp_path / "a", "--picture", "/proc/x/y.png")[0]
    (tmp_path / "a/result.json").write_text("{")
    assert f"{tmp_path}/a is damaged" in compare(tmp_path)[0]


def test_exporting_what_is_no_run_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export_fairseq.py", str(tmp_path), str(tmp_path / "model.pt")])
    with pytest.raises(SystemExit, match="holds 0 averaged models: name a run's folder"):
        runpy.run_path(str(ROOT / "scripts/export_fairseq.py"), run_name="__main__")
    assert not list(tmp_path.iterdir())
    (tmp_path / "models").mkdir()
    (tmp_path / "models/step-000000001.safetensors").touch()
    (tmp_path / "config.yaml").write_text("task: {name: quadratic}\n")
    with pytest.raises(SystemExit, match="is no run of task=wmt16"):
        runpy.run_path(str(ROOT / "scripts/export_fairseq.py"), run_name="__main__")


def test_a_quickstart_that_only_plans_draws_nothing():
    done = subprocess.run([sys.executable, str(ROOT / "scripts/quickstart.py"), "dry_run=true"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("slow steps") >= 2 and not done.stderr


def test_the_quickstart_ends_in_a_table_and_a_picture(tmp_path):
    """`make run` in small, with no more than it installs: both runs at once."""
    absent = tmp_path / "absent"
    absent.mkdir()
    for name in ("pandas", "fairseq", "sacrebleu", "sacremoses", "tensorboard", "wandb", "fairscale", "pytest", "nbformat", "lightning"):
        (absent / f"{name}.py").write_text(f"raise ModuleNotFoundError('make run installs no {name}')\n")
    words = ["steps=4", "evaluate.every=2", "data.train=256", "data.validation=20", "task.width=2", f"data.root={tmp_path}"]
    command = [sys.executable, str(ROOT / "scripts/quickstart.py"), *words, f"runs={tmp_path}/runs"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(absent)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^(?:slowmo_)?local_sgd +\d/4 ", done.stdout, re.MULTILINE)) == 4
    assert f"picture: {tmp_path}/runs/quickstart.png" in done.stdout and "\naccuracy, " in done.stdout
    assert re.search(r"^seed 1, SlowMo over quickstart_local_sgd\S*: best accuracy [-+]", done.stdout, re.MULTILINE)
    with Image.open(tmp_path / "runs/quickstart.png") as image:
        image.verify()


def test_a_quickstart_that_fails_says_why_and_draws_nothing(tmp_path, monkeypatch, capsys):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho error: outer.tau=0\nexit 2\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts/quickstart.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert end.value.code == 2 and "\nlocal_sgd        error: outer.tau=0\n" in said and "picture" not in said


def test_a_folder_that_is_no_cluster_of_ours_is_never_deleted(tmp_path):
    (tmp_path / "etc").mkdir()
    for words in (("stop", tmp_path), ("stop", tmp_path / "none")):
        done = subprocess.run([ROOT / "scripts/local_slurm.sh", *words], capture_output=True, text=True)
        assert done.returncode == 1 and "no cluster of this script's" in done.stderr and (tmp_path / "etc").is_dir()


def test_samples_are_in_columns_of_a_class():
    colours = ["red", "lime", "blue"]
    sheet = samples.sheet([[Image.new("RGB", (32, 32), colour)] * samples.ROWS for colour in colours]).convert("RGB")
    assert sheet.size == (3 * samples.PIXELS, samples.ROWS * samples.PIXELS)
    seen = [[sheet.getpixel(((k + 0.5) * samples.PIXELS, (row + 0.5) * samples.PIXELS)) for k in range(3)] for row in range(samples.ROWS)]
    assert seen == [[(255, 0, 0), (0, 255, 0), (0, 0, 255)]] * samples.ROWS
    for name in ("cifar10_small", "imagenet_small"):
        with Image.open(ROOT / f"docs/images/{name}.png") as shown:
            assert shown.size == (samples.COLUMNS * samples.PIXELS, samples.ROWS * samples.PIXELS)
