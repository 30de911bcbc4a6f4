"""What a run shows and where its numbers go: the screen at 80 columns, log.txt, TensorBoard, Weights & Biases."""

import importlib.util
import io
import json
import re
import signal
import sys
import types

import numpy as np
import pytest
import torch
from commands import arrays, command, finished, signal_at_step

from experiments.runner.progress import Progress
from slowmo.train import TrainingMeter

RUN = ("task=quadratic", "workers=4", "steps=46", "base=sgp", "outer.tau=4", "evaluate.every=15", "checkpoint_every=7", "log_every=10",
       "task.noise=0.3", "dtype=float64")  # fmt: skip
installed = {name: importlib.util.find_spec(name) is not None for name in ("tensorboard", "wandb")}
ROW = {"step": 96, "train_loss": 2.16361, "validation_loss": 2.09432, "seconds": 75.2}


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def logged(folder) -> dict[int, float]:
    """Training losses of log.txt, by step."""
    found = re.findall(r"^[-\d]+ [:\d]+  step (\d+)  loss (\S+)  lr 0.1$", (folder / "log.txt").read_text(), re.MULTILINE)
    assert len(dict(found)) == len(found)
    return {int(step): float(loss) for step, loss in found}


def events(folder):
    """TensorBoard's own reader of what lies in the run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    return {tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


# ---- the screen


@pytest.mark.parametrize("steps", [100, 1_000_000])
def test_the_bar_reaches_its_end_and_fits(steps, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    tally = TrainingMeter(2, torch.device("cpu"))
    tally.losses += 123.456
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        with Progress(steps, True) as progress:
            for step in (1, 2, steps):  # faster than the screen is refreshed
                tally.count, tally.seconds = 1, tally.seconds + 100
                progress.step(step, 1.234e-5, tally)
    lines = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", screen.getvalue())]
    assert any(re.search(rf"━ {steps}/{steps} loss 123.4560 ", line) for line in lines), lines
    assert max(map(len, lines)) <= 80 and "…" not in screen.getvalue()


@pytest.mark.parametrize(
    "row, fourth", [({"accuracy": 31.6, "consensus_distance": 1.0}, "accuracy 31.60"), ({"consensus_distance": 0.5}, "distance 0.5")]
)
def test_an_evaluation_is_one_line_of_five_columns(row, fourth, capsys):
    progress = Progress(1_200_000, True)
    progress.row(ROW | row)
    progress.row(ROW | row | {"train_loss": None, "validation_loss": 1.23456e12, "seconds": 7384})
    head, first, second = capsys.readouterr().out.splitlines()
    name, number = fourth.split()
    assert re.split(r"\s{2,}", head.strip()) == ["step", "train loss", "val. loss", name, "time"]
    assert first.split() == ["96/1200000", "2.1636", "2.0943", number, "1:15"]
    assert second.split() == ["96/1200000", "-", "1.23e+12", number, "2:03:04"]
    assert len(head) == len(first) == len(second) <= 80 - 17  # the quickstart puts a name before it


# ---- files


def test_the_log_goes_on_where_the_run_does(tmp_path):
    done = command(*RUN, cwd=tmp_path, before=signal_at_step(24, signal.SIGTERM))
    assert done.code == 128 + signal.SIGTERM
    folder = finished(*RUN, cwd=tmp_path)
    text = (folder / "log.txt").read_text()
    assert "SIGTERM: saved at step 24" in text and "resumed at step 24" in text and text.endswith("/result.json\n")
    assert list(logged(folder)) == [10, 20, 30, 40] and re.search(r"  46/46 ", text)


def test_losses_are_the_means_of_all_workers(tmp_path):
    """Between two evaluations with one log in between: the row's mean loss is that of the parts; the same on two processes."""
    words = (*RUN, "log_every=5", "evaluate.every=10", "steps=20")
    one, two = finished(*words, cwd=tmp_path, processes=1), finished(*words, "runs=two", cwd=tmp_path, processes=2)
    losses = logged(one)
    assert list(losses) == [5, 10, 15, 20]
    for row in rows(one):
        assert row["train_loss"] == pytest.approx((losses[row["step"]] + losses[row["step"] - 5]) / 2, rel=1e-5)
    assert logged(two) == pytest.approx(losses, rel=1e-5) and two.parent.name == one.parent.name


@pytest.mark.parametrize("make", [lambda log, other: log.symlink_to(other), lambda log, other: log.mkdir()])
def test_a_log_that_cannot_be_written_ends_no_run(make, tmp_path):
    folder = finished(*RUN, cwd=tmp_path)
    for path in (folder / "log.txt", folder / "result.json"):
        path.unlink()
    (tmp_path / "other").write_text("theirs")
    make(folder / "log.txt", tmp_path / "other")
    done = command(*RUN, cwd=tmp_path)
    assert done.code == 0 and "no log: " in done.out and (tmp_path / "other").read_text() == "theirs"


@pytest.mark.skipif(not installed["tensorboard"], reason="the extra `logging` is not installed")
def test_tensorboard_has_what_the_files_have(tmp_path):
    plain = finished(*RUN, "runs=plain", cwd=tmp_path)
    done = command(*RUN, "logger=tensorboard", cwd=tmp_path, before=signal_at_step(24, signal.SIGTERM), processes=2)
    assert done.code == 128 + signal.SIGTERM, done.text
    folder = finished(*RUN, "logger=tensorboard", cwd=tmp_path)
    assert folder.relative_to(tmp_path / "runs") == plain.relative_to(tmp_path / "plain")  # the same run, wherever it is shown
    found = events(folder)
    losses = logged(plain)
    # the one after the resume is the mean since then
    assert found["loss"] == pytest.approx(losses | {30: logged(folder)[30]}, rel=1e-5)
    assert found["lr"] == pytest.approx(dict.fromkeys((10, 20, 30, 40, 15, 45, 46), 0.1))
    for name in ("train_loss", "validation_loss", "consensus_distance", "slow_momentum_norm"):
        assert found[name] == pytest.approx({row["step"]: row[name] for row in rows(plain)}, rel=1e-5)
    assert "step" not in found and "evaluated" not in found
    again, before = arrays(folder), arrays(plain)
    assert all(np.allclose(again[name], before[name], rtol=1e-12) for name in before)


@pytest.mark.skipif(not all(installed.values()), reason="the extra `logging` is not installed")
def test_both_at_once_offline(tmp_path):
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONFIG_DIR": tmp_path, "WANDB_CACHE_DIR": tmp_path,
                   "HOME": tmp_path}  # fmt: skip
    folder = finished(*RUN, "logger=[tensorboard,wandb]", cwd=tmp_path, environment=environment)
    name = (folder / "wandb-id").read_text()
    (written,) = folder.glob(f"wandb/offline-run-*/run-{name}.wandb")
    assert written.stat().st_size > 1000 and set(events(folder)["loss"]) == {10, 20, 30, 40}


def boundary(answer):
    """A `before` that puts a recorder in wandb's place: its calls go to wandb.json."""

    def before(rank):
        calls = []

        class Run:
            def __getattr__(self, name):
                def call(*args, **kwargs):
                    calls.append([name, args, kwargs])
                    with open("wandb.json", "w") as file:
                        json.dump(calls, file)

                return call

        def init(**kwargs):
            calls.append(["init", [], kwargs])
            if answer:
                raise RuntimeError(answer)
            return Run()

        module = types.ModuleType("wandb")
        module.init, module.__spec__ = init, importlib.util.spec_from_loader("wandb", None)
        sys.modules["wandb"] = module

    return before


def test_wandb_is_told_all_and_goes_on_with_one_run(tmp_path):
    words = (*RUN, "logger=wandb", "logger.wandb.project=ours")
    folder = finished(*words, cwd=tmp_path, before=boundary(None))
    calls = json.loads((tmp_path / "wandb.json").read_text())
    ((_, _, start),) = (call for call in calls if call[0] == "init")
    assert (start["project"], start["resume"], start["id"]) == ("ours", "allow", (folder / "wandb-id").read_text())
    assert start["config"]["outer"]["tau"] == 4 and start["name"] == f"{folder.parent.name}/seed1"
    told = [args[0] for name, args, _ in calls if name == "log"]
    assert [values["step"] for values in told if "loss" in values] == [10, 20, 30, 40]
    assert [values["consensus_distance"] for values in told if "consensus_distance" in values] == [
        row["consensus_distance"] for row in rows(folder)
    ]
    assert calls[-1] == ["finish", [], {"exit_code": 0}]
    (folder / "result.json").unlink()
    finished(*words, cwd=tmp_path, before=boundary(None))
    assert json.loads((tmp_path / "wandb.json").read_text())[0][2]["id"] == start["id"]


def test_a_logger_that_cannot_start_is_one_line_on_all_processes(tmp_path):
    done = command(*RUN, "logger=wandb", cwd=tmp_path, processes=2, before=boundary("api_key not configured\nat length"))
    assert done.codes == [2, 2], done.text
    assert "error: a logger cannot start: api_key not configured\n" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_names_the_extra(name, tmp_path):
    def before(rank):
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda package, *more: None if package == name else real(package, *more)

    done = command(*RUN, f"logger={name}", cwd=tmp_path, before=before)
    assert done.code == 2 and done.err == f'error: logger={name} wants the package {name}: pip install -e ".[logging]"\n'
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        ("log_every=0", "log_every=0: a whole number >= 1"),
        ("+logger.other=1", "unknown key logger.other"),
        ("logger.wandb.projekt=a", "logger.wandb.projekt"),
    ],
)
def test_nonsense_is_refused(words, said, tmp_path):
    done = command(*RUN, words, cwd=tmp_path)
    assert done.code and said in done.err and not (tmp_path / "runs").exists()
