"""Before any work: what makes no sense is refused with its remedy, leaving nothing; `dry_run=true` tells the price."""

import pathlib
import pickle
import re

import numpy as np
import pytest
from commands import command, problem

QUADRATIC = ("task=quadratic", "steps=4", "workers=4")
PHOTOS = ("experiment=quickstart_slowmo_local_sgd", "workers=8", "task.batch_size=128", "steps=2", "data.train=128", "data.validation=8")


def left(folder) -> list:
    return list((folder / "runs").glob("*/*"))


def refused(folder, *overrides, code=2, **options) -> str:
    """The message of a command that is refused: one or a few lines, no traceback, no run folder."""
    done = command(*overrides, cwd=folder, **options)
    assert done.codes == [code] * len(done.codes), done.text
    assert "Traceback" not in done.text
    assert done.out == "" and not left(folder)
    return done.err


def match(text: str, pattern: str) -> None:
    assert re.search(pattern, text, re.DOTALL), text


@pytest.mark.parametrize(
    "overrides, remedy",
    [
        (("outer.tau=0",), "tau=0.*whole number >= 1"),
        (("outer.tau=2.5",), "tau=2.5.*whole number"),
        (("outer.beta=1.0",), r"beta=1.0.*\[0, 1\)"),
        (("outer.beta=-0.1",), r"beta=-0.1.*\[0, 1\)"),
        (("outer.alpha=0",), "alpha=0.*positive"),
        (("outer.buffers=foo",), "foo.*choose one of reset, maintain, average"),
        (("outer=none",), "never averages: choose outer=average"),
        (("outer.exact=false",), "never averages.*outer.exact=true"),
        (("base=dpsgd", "base/graph=exponential"), "symmetric.*ring"),
        (("base=sgp", "base/graph=mixing"), "base.graph.matrices: give it"),
        (("base=sgp", "base/graph=mixing", "base.graph.matrices=[[1,0],[0,1]]", "workers=4"), r"give \[4, 4\]"),
        (("+worker=3",), "unknown key worker: did you mean workers"),
        (("+outer.taw=3",), "unknown key outer.taw: did you mean outer.tau"),
        (("+optimizer.betas=[0.9,0.99]",), "unknown key optimizer.betas"),  # Adam's, to SGD
        (("optimizer=adam", "+optimizer.momentum=0.9"), "unknown key optimizer.momentum"),
        (("epochs=1",), "one of steps=K.*and epochs=E"),
        (("steps=null",), "one of steps=K.*and epochs=E"),
        (("steps=0",), "steps=0: a whole number >= 1"),
        (("steps=1.5",), "steps=1.5: a whole number >= 1"),
        (("steps=null", "epochs=-1"), "epochs=-1: a positive number"),
        (("workers=0",), "workers=0: a whole number >= 1"),
        (("seed=-1",), "seed=-1: a whole number >= 0"),
        (("evaluate.every=0",), "evaluate.every=0: a whole number >= 1"),
        (("evaluate.batchnorm=batch",), "choose one of average, local, recalibrate"),
        (("dtype=int8",), "float32 or float64"),
        (("optimizer.lr=0",), "optimizer.lr=0: a learning rate is a positive number"),
        (("optimizer.lr=nan",), "optimizer.lr=nan: a learning rate is a positive number"),
        (("cluster.device=tpu_of_mine",), "device"),
        (("schedule=step", "schedule.milestones=[2]", "schedule.factor=0", "outer.tau=4"), "0 at .*slow step.* 4\\b.*above 0"),
        (("schedule=step", "schedule.milestones=[3,2]"), r"schedule: .*\[3, 2\] must"),
        (("schedule=inverse_sqrt", "schedule.warmup=0"), "at least one warm-up step"),
        (("optimizer._target_=torch.optim.Nope",), "Nope"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_refusals(overrides, remedy, tmp_path):
    match(refused(tmp_path, *QUADRATIC, *overrides), remedy)


@pytest.mark.parametrize(
    "overrides, remedy",
    [
        (("task.batch_size=100",), "choose a multiple of 8"),
        (("data.train=100",), "lower task.batch_size"),
        (("task.layers=[1]",), "four stages"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_refusals_of_pictures(overrides, remedy, tmp_path):
    match(refused(tmp_path, *PHOTOS, *overrides), remedy)


def test_refusal_of_absent_pictures(tmp_path):
    """Found before anything is written."""
    done = command("experiment=cifar10_sgp", "data.root=nowhere", "task.width=4", "cluster.threads=1", cwd=tmp_path)
    assert done.code == 2 and "Traceback" not in done.err and not left(tmp_path)
    match(done.err, "no CIFAR-10 under nowhere.*data.root=FOLDER.*data.download=true")


def test_a_schedule_may_be_zero_where_no_slow_step_is(tmp_path):
    """The rate is 0 from the third step on: of the slow steps 2 and 4 the second meets it; tau = 5 has none in four steps."""
    schedule = ("schedule=step", "schedule.milestones=[2]", "schedule.factor=0", "dry_run=true")
    assert command(*QUADRATIC, *schedule, "outer.tau=5", cwd=tmp_path).code == 0
    match(refused(tmp_path, *QUADRATIC, *schedule, "outer.tau=2"), "slow step.* 4\\b")


def test_hydra_refuses_what_it_does_not_know(tmp_path):
    """Its own exit code is 1, and it lists what there is."""
    assert "cifar10_slowmo_sgp" in refused(tmp_path, "experiment=cifar10_slowmo_spg", code=1)
    assert "local_sgd" in refused(tmp_path, *QUADRATIC, "base=sgd", code=1)
    assert "Could not override 'worker'" in refused(tmp_path, *QUADRATIC, "worker=3", code=1)


def test_experiment_files_of_the_user(tmp_path):
    """A misspelt key in one is found like a misspelt key on the command line."""
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /base: sgp\nworkers: 4\nsteps: 6\nouter: {%s: 3}\n"
    (folder / "good.yaml").write_text(text % "tau")
    (folder / "bad.yaml").write_text(text % "taw")
    done = command("--config-dir", "mine", "experiment=good", "dry_run=true", cwd=tmp_path)
    assert done.code == 0 and done.fact("slow steps") == "2" and done.fact("folder") == "runs/good/seed1"
    assert "unknown key outer.taw: did you mean outer.tau?" in refused(tmp_path, "--config-dir", "mine", "experiment=bad")


def test_refusal_of_a_folding(tmp_path):
    """Every process leaves at once, one of them speaks."""
    message = refused(tmp_path, "task=quadratic", "steps=4", "workers=32", processes=5)
    assert message.count("32 workers do not fold onto 5 processes") == 1
    assert "[1, 2, 4, 8, 16, 32]" in message and "multiple of 32" in message


class Planted:
    """Unpickling one writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_refusals_of_problem_files(tmp_path):
    def write(name, **changed):
        whole = {"A": np.ones((4, 2, 2)), "b": np.ones((4, 2)), "x0": np.ones(2)} | changed
        np.savez(tmp_path / name, **{key: value for key, value in whole.items() if value is not None})
        return name

    planted = np.full((4, 2), Planted(tmp_path / "unpickled"), dtype=object)
    pickled = tmp_path / "pickle.npz"
    pickled.write_bytes(pickle.dumps(Planted(tmp_path / "unpickled")))
    text = tmp_path / "text.npz"
    text.write_text("A b x0")
    cases = {
        "absent.npz": "absent.npz",
        text: "is not an .npz with A",
        pickled: "is not an .npz with A",
        write("lacks.npz", x0=None): "is not an .npz with A.*x0",
        write("shapes.npz", b=np.ones((4, 3))): r"\(4, 3\).*are not \[m, d, d\], \[m, d\], \[d\]",
        write("m.npz", A=np.ones((3, 2, 2)), b=np.ones((3, 2))): "holds 3 workers' functions, the run has 4: set workers=3",
        write("nan.npz", b=np.full((4, 2), np.nan)): "must be finite real numbers",
        write("complex.npz", x0=np.full(2, 1j)): "must be finite real numbers",
        write("object.npz", b=planted): "is not an .npz with A",
    }
    for name, remedy in cases.items():
        match(refused(tmp_path, *QUADRATIC, f"task.problem={name}"), remedy)
    assert not (tmp_path / "unpickled").exists()


def test_refusals_of_damaged_problem_files(tmp_path):
    """The message says which file, whatever is wrong inside it."""
    whole = problem(tmp_path / "whole.npz", [1.0, 2.0, 3.0, 4.0]).read_bytes()
    flipped = bytearray(whole)
    flipped[160] ^= 1  # inside A's numbers
    np.save(tmp_path / "array.npy", np.ones(3))
    for name, content in (("cut", whole[:100]), ("flipped", flipped), ("array", (tmp_path / "array.npy").read_bytes())):
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        assert f"{path.name} is not an .npz with A" in refused(tmp_path, *QUADRATIC, f"task.problem={path}")


@pytest.mark.parametrize(
    "overrides",
    ["cluster.threads=-1", "cluster.threads=all", "steps=null epochs=inf", "runs=/dev/null/runs", "task.noise=loud"],
)
def test_nonsense_values_show_no_traceback(overrides, tmp_path):
    done = command(*QUADRATIC, *overrides.split(), cwd=tmp_path)
    assert done.code == 2 and "error: " in done.err and "Traceback" not in done.err and not left(tmp_path)


# what a worker sends an iteration, m = 8, d = 16 numbers: (messages, rows of d numbers)
RING = np.array([14, 7 / 4])  # all-reduce around a ring: 2 (m - 1) messages, 2 (m - 1) / m rows
PRICES = {
    "base=sgp outer=none": np.array([1, 1]),
    "base=osgp outer=none": np.array([1, 1]),
    "base=dpsgd outer=none": np.array([2, 2]),
    "base=sgp base/graph=two_peer outer=none": np.array([2, 2]),
    "base=sgp base/graph=complete outer=none": np.array([7, 7]),
    "base=allreduce outer=none": RING,
    "base=sgp outer=slowmo outer.tau=4": 1 + RING / 4,
    "base=osgp outer=slowmo outer.tau=12": 1 + RING / 12,
    "base=dpsgd outer=slowmo outer.tau=7": 2 + RING / 7,
    "base=local_sgd outer=average outer.tau=12": RING / 12,
    "base=local_sgd outer=slowmo outer.tau=5": RING / 5,
    "base=allreduce outer=slowmo outer.tau=4": RING + RING / 4,
    "base=sgp outer=slowmo outer.tau=4 outer.exact=false": np.array([1, 1]),
    "base=sgp outer=none base.gossip_buffers=true optimizer.momentum=0.9": np.array([2, 2]),
    "base=local_sgd outer=double_averaging outer.tau=4 optimizer.momentum=0.9": 2 * RING / 4,
    "base=local_sgd optimizer=adam outer.tau=4 outer.buffers=average": 3 * RING / 4,
}


@pytest.mark.parametrize("words", PRICES)
def test_the_plan_counts_messages_and_bytes(words, tmp_path):
    dtype, size = ("float64", 8) if "osgp" in words else ("float32", 4)
    done = command("task=quadratic", "workers=8", "steps=24", "dry_run=true", f"dtype={dtype}", *words.split(), cwd=tmp_path)
    assert done.code == 0, done.text
    messages, rows = PRICES[words]
    number = lambda name: float(done.fact(name).replace(",", ""))
    assert number("messages a worker sends an iteration") == pytest.approx(messages, rel=1e-9)
    assert number("bytes a worker sends an iteration") == pytest.approx(rows * 16 * size, rel=1e-9)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words, messages",
    [("base=sgp outer=none base.gossip_buffers=true", 1), ("base=local_sgd outer=double_averaging outer.tau=7", 2)],
)
def test_buffers_that_do_not_exist_are_not_sent(words, messages, tmp_path):
    words = ("task=quadratic", "workers=8", "steps=24", "dry_run=true", "optimizer.momentum=0", *words.split())
    done = command(*words, cwd=tmp_path)
    assert float(done.fact("messages a worker sends an iteration")) == pytest.approx(messages)


def test_the_plan_of_several_processes_and_of_one_worker(tmp_path):
    """One process prints; memory: rows, gradients, the optimizer's block, then x0 and u; messages arrive in the gradients."""
    words = ("task=quadratic", "workers=4", "steps=9", "base=sgp", "outer.tau=3", "optimizer.momentum=0.9", "dry_run=true")
    done = command(*words, cwd=tmp_path, processes=2)
    assert done.codes == [0, 0] and done.out.count("iterations") == 1 and done.fact("slow steps") == "3"
    assert done.fact("title").startswith("m = 4, processes = 2 (2 a process), steps = 9")
    assert done.fact("memory of rows, gradients, optimizer, messages (bytes a process)") == f"{(2 * 3 + 2) * 16 * 4}"
    done = command(*words, "workers=1", cwd=tmp_path)
    assert done.fact("messages a worker sends an iteration") == "0" and done.fact("bytes a worker sends an iteration") == "0"
    assert not (tmp_path / "runs").exists()
