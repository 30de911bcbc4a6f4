"""What the scripts make of result files."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def result(folder, experiment, accuracy, status="done"):
    best = {"accuracy": {"value": accuracy, "step": 10}, "train_loss": {"value": 1.5, "step": 20}, "nll": {"value": 1.25, "step": 10}}
    diverged = status == "diverged"
    text = {"experiment": experiment, "seed": 1, "status": status, "seconds_per_iteration": 0.125, "folder": f"runs/{experiment}/seed1",
            "best": {} if diverged else best, "last": None if diverged else {"accuracy": 50.0, "train_loss": 1.5, "nll": 1.5}}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(text))


def compare(*folders):
    command = [sys.executable, str(ROOT / "scripts/compare.py"), *map(str, folders)]
    return subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "160", "PATH": "/usr/bin:/bin"})


def test_compare_pairs_a_run_with_its_base(tmp_path):
    result(tmp_path / "a", "x_sgp", 51.0)
    result(tmp_path / "b", "x_slowmo_sgp", 53.5)
    done = compare(tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert "53.50 50.00" in done.stdout and "125.0" in done.stdout
    assert "over x_sgp SlowMo changes the best accuracy by +2.50" in done.stdout


def test_compare_never_shows_a_diverged_run_as_a_number(tmp_path):
    result(tmp_path / "a", "x_sgp", 51.0)
    result(tmp_path / "b", "x_slowmo_sgp", 0.0, "diverged")
    done = compare(tmp_path)
    assert "diverged" in done.stdout and "changes" not in done.stdout and "0.00 " not in done.stdout.replace("50.00", "")


def test_compare_without_runs_names_the_remedy(tmp_path):
    done = compare(tmp_path)
    assert done.returncode == 1 and "python run.py experiment=" in done.stderr


def test_exporting_what_is_no_run_names_the_remedy(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/export_fairseq.py"), str(tmp_path), str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})
    assert done.returncode == 1 and "holds 0 averaged models: name a run's folder" in done.stderr and not list(tmp_path.iterdir())
