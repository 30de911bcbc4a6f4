"""Before any work: what makes no sense is refused with its remedy, leaving nothing; `dry_run=true` tells the price."""

import contextlib
import importlib.util
import json
import pathlib
import pickle
import re
import sys

import hydra
import numpy as np
import pytest
import torch
from commands import ROOT, command, finished, planned, problem
from omegaconf import OmegaConf
from support.nonsense import START, nonsense

import run
from experiments.runner import build, cli, config, plan

BETA = OmegaConf.load(ROOT / "configs/experiment/cifar10_small_slowmo_sgp.yaml").outer.beta  # as it was tuned
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
        (("worker=3",), "unknown key worker: did you mean workers"),
        (("+outer.taw=3",), "unknown key outer.taw: did you mean outer.tau"),
        (("+optimizer.dampning=0.1",), "unknown key optimizer.dampning: did you mean optimizer.dampening"),
        (("~outer",), "no value for outer"),
        (("launch.name=slurm",), "choose launch=slurm"),
        (("data.name=cifar10",), "choose data=cifar10"),
        (("seed=${nope}",), "seed=.*nope.*not found"),
        (("base=3",), "given by its name.*base=3"),
        (("outer.beta=[",), r"cannot read 'outer.beta=\['"),
        (("base/graph=rng", "base=sgp"), "no base/graph=rng: choose one of complete, .*did you mean ring"),
        (("runs=~/runs",), r"cannot read 'runs=~/runs'.* your home folder is \$HOME"),
        (("runs='~/runs'",), r"runs=~/runs: .*write runs=\$HOME/runs"),
        (("outer=none", "outer.beta=0.4"), "outer.beta does not fit the options that are chosen"),
        (("+optimizer.betas=[0.9,0.99]",), "unknown key optimizer.betas"),  # Adam's, to SGD
        (("optimizer=adam", "+optimizer.momentum=0.9"), "unknown key optimizer.momentum"),
        (("epochs=1",), "one of steps=K.*and epochs=E"),
        (("steps=null",), "one of steps=K.*and epochs=E"),
        (("steps=0",), "steps=0: a whole number >= 1"),
        (("steps=1.5",), "steps=1.5: a whole number >= 1"),
        (("steps=null", "epochs=-1"), "epochs=-1: a positive number"),
        (("workers=0",), "workers=0: a whole number >= 1"),
        (("seed=-2",), "seed=-2: a whole number from -1 to 2147483647"),
        (("seed=2147483648",), "seed=2147483648: a whole number from -1 to 2147483647"),
        (("seed=1,2",), "seed=1,2: several values are a sweep, python run.py -m"),
        (("steps=1e3",), "steps=1000.0: a whole number >= 1, written without a point or an exponent"),
        (("cluster.threads=100000",), "cluster.threads=100000: a whole number from 1 to 1024"),
        (("optimizer.maximize=true",), r"unknown key optimizer.maximize.*, or write \+optimizer.maximize"),
        (("outer=null",), "none as outer=none: see task=quadratic .*outer=null"),
        (("task._target_=nowhere_at_all.Task",), "name the folder of your modules in PYTHONPATH"),
        (("evaluate.every=0",), "evaluate.every=0: a whole number >= 1"),
        (("cluster.vectorize=maybe",), "cluster.vectorize=maybe: choose auto, true or false"),
        (("cluster.compile=yes",), "cluster.compile=yes: give true or false"),
        (("cluster.graph=true",), "cluster.graph captures a GPU's kernels, .*: set cluster.graph=false"),
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


def test_names_that_do_not_exist(tmp_path):
    """One line, with the name that was meant, or with all there are."""
    assert (
        refused(tmp_path, "experiment=cifar10_slowmo_spg") == "error: no experiment=cifar10_slowmo_spg: did you mean cifar10_slowmo_sgp?\n"
    )
    for old, new in (("experiment=photos_sgp", "experiment=cifar10_small_sgp"), ("experiment=ende_sgp", "experiment=wmt16_small_sgp"),
                     ("schedule=paper", "schedule=cifar10"), ("data=scripts", "data=glyphs")):  # fmt: skip
        assert refused(tmp_path, old) == f"error: no {old}: since version 0.2 it is {new}\n"
    assert refused(tmp_path, "experiment=zzz") == "error: no experiment=zzz: python run.py --help lists what there is\n"
    message = refused(tmp_path, *QUADRATIC, "base=sgpp")
    assert message == "error: no base=sgpp: choose one of allreduce, dpsgd, local_sgd, osgp, sgp; did you mean sgp?\n"


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
    assert message.count("32 workers do not fit on 5 ranks") == 1
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
    # where an exact average follows, gossip is dropped
    "base=sgp outer=slowmo outer.tau=4": 3 / 4 + RING / 4,
    "base=osgp outer=slowmo outer.tau=12": 11 / 12 + RING / 12,
    "base=dpsgd outer=slowmo outer.tau=7": 2 * 6 / 7 + RING / 7,
    "base=local_sgd outer=average outer.tau=12": RING / 12,
    "base=local_sgd outer=slowmo outer.tau=5": RING / 5,
    "base=allreduce outer=slowmo outer.tau=4": RING + RING / 4,
    "base=sgp outer=slowmo outer.tau=4 outer.exact=false": np.array([1, 1]),
    "base=sgp outer=none base.gossip_buffers=true optimizer.momentum=0.9": np.array([2, 2]),
    "base=local_sgd outer=double_averaging outer.tau=4 optimizer.momentum=0.9": 2 * RING / 4,
    "base=local_sgd optimizer=adam outer.tau=4 outer.buffers=average": 3 * RING / 4,
}


@pytest.mark.parametrize("words", PRICES)
def test_the_plan_counts_messages_and_bytes(words):
    dtype, size = ("float64", 8) if "osgp" in words else ("float32", 4)
    summary, *_ = planned("task=quadratic", "workers=8", "steps=24", f"dtype={dtype}", *words.split())
    messages, rows = PRICES[words]
    assert summary["messages"] == pytest.approx(messages, rel=1e-9)
    assert summary["sent"] == pytest.approx(rows * 16 * size, rel=1e-9)


@pytest.mark.parametrize(
    "words, messages",
    [("base=sgp outer=none base.gossip_buffers=true", 1), ("base=local_sgd outer=double_averaging outer.tau=7", 2)],
)
def test_buffers_that_do_not_exist_are_not_sent(words, messages):
    summary, *_ = planned("task=quadratic", "workers=8", "steps=24", "optimizer.momentum=0", *words.split())
    assert summary["messages"] == pytest.approx(messages)


def test_the_plan_of_several_processes_and_of_one_worker(tmp_path):
    """One process prints; memory: rows, gradients, the optimizer's block, then x0 and u; messages arrive in the gradients."""
    words = ("task=quadratic", "workers=4", "steps=9", "base=sgp", "outer.tau=3", "optimizer.momentum=0.9", "dry_run=true")
    done = command(*words, cwd=tmp_path, processes=2)
    assert done.codes == [0, 0] and done.out.count("iterations") == 1 and done.fact("slow steps") == "3"
    assert done.fact("title") == (
        "m = 4, processes = 2 (2 per process), steps = 9, slow steps = 3, seed = 1, base = sgp (exponential), "
        "outer = slowmo (tau = 3, alpha = 1.0, beta = 0.7, buffers = reset, exact = true)"
    )
    assert done.fact("memory").startswith(f"{(2 * 3 + 2) * 16 * 4} bytes per process")
    done = command(*words, "workers=1", cwd=tmp_path)
    assert done.fact("messages") == "nothing is sent"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "number, text", [(999, "999 bytes"), (106_123_123, "106 MB"), (28.53e9, "28.5 GB"), (999_800, "1,000 kB"), (5e12, "5,000 GB")]
)
def test_amounts_for_people(number, text):
    assert plan.amount(number) == text


def test_the_plan_is_for_people(tmp_path):
    """The paper's ImageNet run: ResNet-50's 102 MB, a message an iteration and a slow step in 48."""
    done = command("experiment=imagenet_slowmo_sgp", "dry_run=true", "cluster.device=cpu", cwd=tmp_path)
    assert done.code == 0, done.text
    assert done.fact("messages") == "104 MB sent per worker and iteration, in 2.271 messages, within this process"
    assert re.match(r"\d+(\.\d)? GB per process", done.fact("memory")) and done.fact("device") == "cpu"
    assert done.fact("data") == "not there: data/imagenet/train and data/imagenet/val"
    assert done.fact("cost") == "14,040 iterations of 8192 pictures through ResNet-50"
    assert not list(tmp_path.glob("[!l]*"))  # but the test's log


@pytest.mark.skipif(importlib.util.find_spec("fairseq") is None, reason="the wmt16 extra is not installed")
@pytest.mark.parametrize(
    "name, steps, parameters, data",
    [
        ("wmt16_slowmo_sgp", "17,000", "209,911,808", "not there: no binarised WMT16 under data/wmt16/data-bin; .*"),
        ("wmt16_small_slowmo_sgp", "1,440", "937,984", "not there: made under data .*"),
    ],
)
def test_plans_need_no_texts(name, steps, parameters, data, tmp_path):
    """Nothing is fetched, nothing is made: published sizes stand in."""
    done = command(f"experiment={name}", "dry_run=true", cwd=tmp_path)
    assert done.code == 0, done.text
    assert (done.fact("iterations"), done.fact("parameters")) == (steps, parameters) and re.fullmatch(data, done.fact("data"))
    assert not list(tmp_path.glob("[!l]*"))


# ---- values of an experiment, and choices on the command line


def composed(*words):
    """A config without a command."""
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return config.compose(list(words))


@pytest.mark.parametrize("mode", ["auto", "true", "false"])
def test_each_mode_of_vectorize_is_accepted(mode):
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config.check(config.compose(["steps=1", f"cluster.vectorize={mode}"]))


@pytest.mark.parametrize("words, remedy", [
    (("graph=0",), "cluster.graph .*: a whole number >= 1"),
    (("graph=often",), "cluster.graph .*: a whole number >= 1"),
    (("graph=true", "device=cpu"), "cluster.device=cpu: set cluster.graph=false or cluster.device=cuda"),
    (("graph=true", "vectorize=true"), "one after another: set it to auto"),
    (("compile=true", "vectorize=true"), "one after another: set it to auto"),
    (("graph=2", "compile=true", "device=cuda"), None),
])  # fmt: skip
def test_what_graphs_and_compiling_go_together_with(words, remedy):
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        one = config.compose(["steps=1", *(f"cluster.{word}" for word in words)])
        with pytest.raises(ValueError, match=remedy) if remedy else contextlib.nullcontext():
            config.check(one)


def test_the_plan_says_how_kernels_are_called_and_when_messages_leave():
    def planned(*words):
        one = composed("task=quadratic", "base=sgp", "steps=10", "cluster.device=cuda", "launch=local", "launch.processes=2", *words)
        task = build.build(OmegaConf.merge(one.cfg.task, {"device": "cpu"}))
        return task, one

    for words, device, when in (
        ((), "cuda", "during backward"),
        (("cluster.compile=true",), "cuda, compiled", "as compiled pieces of backward end"),
        (("cluster.graph=2",), "cuda, a CUDA graph per replica, 2 at a time", "after backward"),
        (("cluster.compile=true", "cluster.overlap=false"), "cuda, compiled", "after backward"),
        (("base=allreduce", "cluster.overlap=false"), "cuda", "during backward"),
    ):
        task, one = planned(*words)
        summary = plan.make(one, task)[0]
        assert (summary["device"], summary["when"]) == (device, when)
    task.same_shapes = False
    with pytest.raises(ValueError, match="batches of one shape, and this task's have many: set cluster.graph=false"):
        plan.make(planned("cluster.graph=true")[1], task)


def test_an_optimizer_that_is_not_elementwise_is_planned_too():
    """An average of two workers sends a row; of Adafactor's state for a matrix nothing is as large as that."""
    options = (
        "task=quadratic",
        "workers=2",
        "steps=8",
        "base=local_sgd",
        "outer.tau=4",
        "outer.buffers=average",
        "cluster.overlap=false",
        "cluster.device=cpu",
    )
    one = composed(*options, "launch=local", "launch.processes=2")
    one.cfg.optimizer = {"_target_": "torch.optim.Adafactor", "_partial_": True, "lr": 0.1}
    summary = plan.make(one, build.build(one.cfg.task))[0]
    assert summary["messages"] == 2 / 4 and summary["sent"] == 4 * 16 / 4
    one.cfg.optimizer = {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.1}
    assert plan.make(one, build.build(one.cfg.task))[0]["sent"] == 3 * 4 * 16 / 4


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs/experiment").glob("*.yaml")))
def test_an_experiment_alone_is_what_hydra_composes(name):
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        assert config.compose([f"experiment={name}"]).cfg == hydra.compose("config", [f"experiment={name}"])


@pytest.mark.parametrize(
    "word, group, own",
    [
        ("outer=lookahead", "outer", {"tau": 5, "alpha": 0.5, "beta": 0.0, "buffers": "maintain"}),
        ("outer=diloco", "outer", {"tau": 12, "alpha": 0.7, "beta": 0.9}),
        ("outer=none", "outer", {"_target_": None}),
        ("outer=average", "outer", {"tau": 12, "buffers": "maintain"}),
        ("outer=double_averaging", "outer", {"tau": 12, "buffers": "average"}),
        ("optimizer=adam", "optimizer", {"lr": 0.001, "betas": [0.9, 0.999], "weight_decay": 0.0}),
        ("optimizer=adamw", "optimizer", {"lr": 0.001, "betas": [0.9, 0.999], "weight_decay": 0.01}),
        ("data=cifar10", "data", {"name": "cifar10", "root": "data", "download": False}),
        ("task=imagenet", "task", {"batch_size": 8192, "model": "resnet50", "layers": None, "width": None}),
    ],
)
def test_another_option_has_its_own_values(word, group, own):
    """Whether the experiment's stand in its own file or in the shape it builds on; the other groups keep the experiment's."""
    plain, found = composed("experiment=cifar10_small_slowmo_sgp"), composed("experiment=cifar10_small_slowmo_sgp", word)
    defaults = composed(*(f"{name}={choice}" for name, choice in found.choices.items()))
    before, now, bare = (OmegaConf.to_container(one.cfg) for one in (plain, found, defaults))
    assert now[group] == bare[group] and own.items() <= now[group].items()
    assert all(now[name] == before[name] for name in before if name != group)
    config_check(found)
    own_words = {"outer": f"outer.beta={BETA}", "data": "data.train=3072, data.validation=20000"}
    said = own_words.get(group, found.dropped[0].rpartition(" (")[0])
    assert found.dropped == [f"{said} ({word}, not {plain.choices[group]})"] and f"{group}." in said


def config_check(found):
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config.check(found)


def test_bleu_of_more_models_than_are_kept_is_refused():
    with pytest.raises(ValueError, match="task.bleu.average=10 models, evaluate.keep=3: .*raise evaluate.keep"):
        config_check(composed("experiment=wmt16_sgp", "evaluate.keep=3"))
    config_check(composed("experiment=wmt16_sgp", "evaluate.keep=3", "task.bleu.subsets=[]"))


def test_what_is_typed_stands():
    found = composed("experiment=cifar10_small_slowmo_sgp", "outer=diloco", "outer.beta=0.3", "optimizer=adam", "optimizer.lr=0.2")
    assert (found.cfg.outer.beta, found.cfg.outer.alpha, found.cfg.optimizer.lr) == (0.3, 0.7, 0.2)
    assert "outer.beta" not in " ".join(found.dropped) and "optimizer.lr" not in " ".join(found.dropped)
    same = composed("experiment=cifar10_small_slowmo_sgp", "outer=slowmo", "base=sgp")  # the experiment's own choices, said
    assert same.cfg == composed("experiment=cifar10_small_slowmo_sgp").cfg and same.dropped == []


def test_another_base_or_graph():
    found = composed("experiment=cifar10_small_double_averaging_sgp", "base=osgp")
    assert "gossip_buffers" not in found.cfg.base and found.dropped == ["base.gossip_buffers=True (base=osgp, not sgp)"]
    found = composed("experiment=cifar10_small_double_averaging_sgp", "base/graph=ring")
    assert found.cfg.base.gossip_buffers and found.cfg.base.graph._target_ == "slowmo.topology.Ring" and found.dropped == []


def test_an_experiment_of_the_user_on_a_shape_of_ours(tmp_path):
    """It takes another optimizer than the shape: what the shape says about SGD says nothing about Adam."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text(
        "# @package _global_\ndefaults: [shape/cifar10_small, override /optimizer: adam, override /base/graph: ring, override /base: sgp]\n"
        "optimizer: {lr: 0.01}\nbase: {comm_dtype: bfloat16}\n"
    )
    where = f"hydra.searchpath=[file://{tmp_path}]"
    found = composed(where, "experiment=mine")
    assert (found.cfg.optimizer.lr, found.cfg.base.comm_dtype, found.cfg.task.width) == (0.01, "bfloat16", 16)
    assert "momentum" not in found.cfg.optimizer and found.cfg.optimizer.weight_decay == 0.0
    assert composed(where, "experiment=mine", "optimizer=sgd").cfg.optimizer.momentum == 0.9  # the shape's own choice again


def test_a_replaced_option_from_the_command(tmp_path):
    """The title says what holds, the plan what was left out, the folder which option; an error speaks of a word that was typed."""
    done = command("experiment=cifar10_small_slowmo_sgp", "outer=lookahead", "dry_run=true", cwd=tmp_path)
    assert done.fact("title").endswith("outer = lookahead (tau = 5, alpha = 0.5, beta = 0.0, buffers = maintain, exact = true)")
    assert done.fact("dropped") == f"outer.beta={BETA} (outer=lookahead, not slowmo)"
    assert done.fact("folder") == "runs/cifar10_small_slowmo_sgp,outer=lookahead/seed1"
    for words in (("outer=none",), ("outer=double_averaging",), ("optimizer=adam",), ("data=cifar10",)):
        done = command("experiment=cifar10_small_slowmo_sgp", *words, "dry_run=true", cwd=tmp_path)
        assert done.code == 0 and done.fact("folder") == f"runs/cifar10_small_slowmo_sgp,{words[0]}/seed1", done.text
    message = refused(tmp_path, "experiment=cifar10_small_slowmo_sgp", "task=imagenet")
    assert message == "error: task=imagenet does not read data=photos: choose data=imagenet or data=glyphs\n"
    words = ("experiment=quickstart_slowmo_local_sgd", "steps=2", "data.train=256", "data.validation=8", "outer=average", "outer.tau=1")
    done = command(*words, cwd=tmp_path)
    assert done.code == 0 and "left out of quickstart_slowmo_local_sgd: outer.beta=0.6 (outer=average, not slowmo)\n" in done.out


# ---- the optimizer


def test_an_optimizer_takes_what_its_signature_has():
    _, found, _ = planned(*QUADRATIC, "+optimizer.dampening=0.1", "optimizer.momentum=0.9")
    assert build.build(found.cfg.optimizer, [torch.nn.Parameter(torch.zeros(2))]).defaults["dampening"] == 0.1
    _, found, _ = planned(*QUADRATIC, "optimizer=adamw", "+optimizer.amsgrad=true")
    built = build.build(found.cfg.optimizer, [torch.nn.Parameter(torch.zeros(2))])
    assert type(built) is torch.optim.AdamW and built.defaults["amsgrad"] and built.defaults["weight_decay"] == 0.01


class Net(torch.nn.Module):
    """Each kind of parameter, one of them shared and one frozen."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
        self.layer, self.last = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)
        self.again = torch.nn.Linear(4, 4)
        self.again.weight = self.last.weight
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)


@pytest.mark.parametrize("decay, expected", [
    ({"decay_norms": False, "weight_decay": 0.1}, [["first.weight", "last.weight"],
     ["first.bias", "norm.weight", "norm.bias", "layer.weight", "layer.bias", "last.bias", "again.bias"]]),
    ({"decay_norms": True, "weight_decay": 0.1}, [["first.weight", "first.bias", "norm.weight", "norm.bias", "layer.weight", "layer.bias",
     "last.weight", "last.bias", "again.bias"]]),
    ({"decay_norms": False, "weight_decay": 0.0}, [["first.weight", "first.bias", "norm.weight", "norm.bias", "layer.weight", "layer.bias",
     "last.weight", "last.bias", "again.bias"]]),
])  # fmt: skip
def test_groups_of_parameters(decay, expected):
    model, cfg = Net(), OmegaConf.create({"lr": 0.1} | decay)
    groups = build.optimizer_groups(model, cfg)
    assert "decay_norms" not in cfg
    names = {p: name for name, p in model.named_parameters()}
    assert [[names[p] for p in group["params"]] for group in groups] == expected
    assert [group.get("weight_decay") for group in groups] == [None, 0.0][: len(expected)]
    torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)


# ---- the machine


@pytest.mark.parametrize("environment, expected", [
    ({}, "8 processes for 1 GPUs"),
    ({"CUDA_VISIBLE_DEVICES": "3"}, "cuda:0"),
    ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "8"}, "cuda:0"),  # --gpus-per-task: each sees its own
    ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"}, "8 processes for 1 GPUs"),
])  # fmt: skip
def test_a_gpu_of_its_own_for_each_process(environment, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "5", **environment}.items():
        monkeypatch.setenv(name, value)
    if expected.startswith("cuda"):
        assert build.device("auto") == expected
    else:
        with pytest.raises(ValueError, match=expected):
            build.device("auto")


def test_arithmetic_is_set_and_recorded(tmp_path):
    recorded = {}
    for words in ((), ("cluster.tf32=true", "cluster.deterministic=true", "runs=other")):
        folder = finished(*QUADRATIC, *words, cwd=tmp_path)
        recorded[words] = json.loads((folder / "result.json").read_text())["arithmetic"]
    assert list(recorded.values()) == [{"tf32": False, "cudnn_benchmark": True, "deterministic": False},
                                       {"tf32": True, "cudnn_benchmark": False, "deterministic": True}]  # fmt: skip


# ---- the command line


@pytest.mark.parametrize("words", [(), ("--help",), ("experiment=cifar10_small_sgp", "-h")])
def test_help(words, tmp_path):
    done = command(*words, cwd=tmp_path)
    assert done.code == 0 and done.err == ""
    assert done.out.count("\n  python run.py ") == 5 and "the quickstart" in done.out
    shown = set(re.findall(r"^  ((?:\w+ ?)+)$", done.out, re.M))
    assert {name for line in shown for name in line.split()} == {path.stem for path in (ROOT / "configs/experiment").glob("*.yaml")}
    assert "cifar10, photos: " in done.out and "outer=      average, bmuf" in done.out and "adamw" in done.out


class TestNonsense:
    """What no run can have ends with exit code 2 and one line, and leaves nothing."""

    def said(self, words, folder, capfd, monkeypatch) -> str:
        """What a command says, run in this process as the job of a sweep is."""
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.setattr(sys, "argv", ["run.py"])
        flag = f"--config-path={ROOT / 'configs'}"  # Hydra looks beside the script, which here is pytest
        outcome = cli._run(run.main, [flag, *words])
        seen = capfd.readouterr()
        text = f"{words}: {outcome.code} {seen.out} {seen.err}"
        assert outcome.code == 2 and seen.out == "" and re.fullmatch(r"error: .+\n", seen.err) and not list(folder.iterdir()), text
        return seen.err

    def test_what_it_begins_with_makes_sense(self, tmp_path):
        """Else everything would be refused."""
        for words in START:
            assert command(*words, "dry_run=true", cwd=tmp_path).code == 0

    @pytest.mark.slow
    def test_a_few_dozen(self, tmp_path, capfd, monkeypatch):
        for words in nonsense(36, seed=0):
            self.said(words, tmp_path, capfd, monkeypatch)

    @pytest.mark.soak
    @pytest.mark.timeout(1200)
    def test_two_hundred(self, tmp_path, capfd, monkeypatch):
        cases = nonsense(200, seed=1)
        for words in cases:
            self.said(words, tmp_path, capfd, monkeypatch)
        with capfd.disabled():
            print(f"\nnonsense: {len(cases)} trials, 0 failures")


@pytest.mark.parametrize(
    "milestone, options, words",
    [
        (11, (), "in the round that ends at step 12: .* u becomes 9.25 times as large; .* each multiple of 12"),
        (18, (), "in the round that ends at step 24: .* u becomes 5.5 times"),
        (12, (), None),  # just after a slow step
        (35, (), None),  # before the last: nothing uses its u again
        (11, ("outer.beta=0",), None),
        (11, ("outer=average", "outer.tau=12"), None),
        (11, ("outer=diloco", "outer.tau=12"), None),  # divides by nothing, so it may also end at 0
        (11, ("outer=diloco", "outer.tau=12", "schedule.factor=0"), None),
    ],
)
def test_a_learning_rate_that_drops_within_a_round_is_warned_of(tmp_path, milestone, options, words):
    given = ("task=quadratic", "steps=36", "workers=4", "outer.tau=12", "schedule=step", f"schedule.milestones=[{milestone}]")
    done = command(*given, *options, "dry_run=true", cwd=tmp_path)
    assert done.codes == [0], done.text
    lines = [line for line in done.out.splitlines() if line.startswith("warning")]
    assert len(lines) == (words is not None)
    if words:
        match(lines[0], words)
