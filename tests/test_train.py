"""The loop: evaluations change nothing, the clock counts training alone, random numbers belong to (seed, step, worker)."""

import math
import types

import pytest
import torch
from helpers import BASES, build, quadratic
from normed import Normal
from processes import spawn

import slowmo
import slowmo.train
from slowmo.train import BATCHNORM, TrainingMeter, evaluate, train


def nesterov(rows):
    return torch.optim.SGD([rows], lr=0.1, momentum=0.9, nesterov=True)


def adam(rows):
    return torch.optim.Adam([rows], lr=0.1)


def slow(base):
    return slowmo.SlowMo(base, tau=2, buffers="maintain")


def whole_state(replicas, algorithm):
    rows, shared = algorithm.state()
    return {k: v.detach().clone() for k, v in (rows | shared).items()} | {"buffers": replicas.buffers()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def trained(evaluations=(), m=3, base="sgp", optimizer=adam, steps=5, seed=0, task=None):
    """(replicas, algorithm, tally, rows) after `steps`; each of `evaluations` is made before the first and after every step."""
    task = task or Normal()
    replicas, algorithm = build(task, m, base, optimizer, slow)
    tally = TrainingMeter(len(replicas.models), torch.device("cpu"))
    measure = lambda: [evaluate(task, replicas, algorithm, tally, norms, samples=4)[0] for norms in evaluations]
    rows = measure()
    for _ in train(task, replicas, algorithm, lambda step: 0.1, steps, seed, tally):
        rows += measure()
    return replicas, algorithm, tally, rows


@pytest.mark.parametrize("optimizer", [nesterov, adam])
@pytest.mark.parametrize("base", BASES)
def test_evaluations_change_nothing(base, optimizer):
    plain = whole_state(*trained(base=base, optimizer=optimizer)[:2])
    assert_same(whole_state(*trained(BATCHNORM, base=base, optimizer=optimizer)[:2]), plain)


class PartlyFrozen(Normal):
    """Fine-tuning: BatchNorm keeps the statistics it came with."""

    def model(self):
        model = super().model()
        model.norm.eval()
        return model


def test_evaluations_leave_the_mode_of_each_module():
    plain = whole_state(*trained(task=PartlyFrozen())[:2])
    assert_same(whole_state(*trained(["average"], task=PartlyFrozen())[:2]), plain)


@pytest.mark.parametrize("norms", BATCHNORM)
def test_a_second_evaluation_gives_the_same_row(norms):
    task = Normal()
    replicas, algorithm, tally, _ = trained(task=task)
    first, second = (evaluate(task, replicas, algorithm, tally, norms)[0] for _ in range(2))
    assert first.pop("train_loss") > 0 and second.pop("train_loss") is None  # losses are counted anew
    assert first == second and norms in first["evaluated"] and "3 workers" in first["evaluated"]


def test_a_row_is_what_it_says():
    task = Normal(dropout=0.0)
    replicas, algorithm, tally, _ = trained(m=4, task=task)
    losses = tally.losses.clone()
    row, _ = evaluate(task, replicas, algorithm, tally, samples=4)
    x, models = algorithm.average(), replicas.models

    def loss(model, count):
        model.eval()
        with torch.no_grad():
            value = (model(task.x[:count]).squeeze(1) - task.x[:count].sum(1)).square().mean().item()
        model.train()
        return value

    own = [loss(model, 4) for model in models]
    average = replicas.snapshot(x, replicas.buffers().mean(0, keepdim=True))
    assert row["validation_loss"] == pytest.approx(loss(average, 6), rel=1e-12)
    assert (row["validation_loss_min"], row["validation_loss_max"]) == pytest.approx((min(own), max(own)), rel=1e-12)
    assert row["train_loss"] == pytest.approx(losses.sum().item() / (4 * 5), rel=1e-12)
    assert row["spread"] == pytest.approx(math.sqrt((replicas.rows.detach() - x).square().sum(1).mean()), rel=1e-12)
    assert row["u_norm"] == pytest.approx(algorithm.u.norm().item(), rel=1e-12)
    assert tally.count == 0 and not tally.losses.any()


def test_a_row_without_slow_momentum_or_training():
    task = quadratic(2)
    replicas, algorithm = build(task, 2, "sgp")
    row, _ = evaluate(task, replicas, algorithm, TrainingMeter(2, torch.device("cpu")))
    assert row["u_norm"] is None and row["train_loss"] is None and row["seconds"] == 0 and row["spread"] == 0


def test_an_optimizer_without_epsilon_is_measured():
    task = quadratic(2, d=3)
    replicas, algorithm = build(task, 2, "sgp", lambda rows: torch.optim.Adam([rows], lr=0.1, eps=0.0), slow)
    tally = TrainingMeter(2, torch.device("cpu"))
    for _ in train(task, replicas, algorithm, lambda step: 0.1, 3, 0, tally):
        pass
    assert torch.isfinite(replicas.models[0].x).all()
    assert math.isfinite(evaluate(task, replicas, algorithm, tally)[0]["spread"])


def test_the_clock_counts_training_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(slowmo.train, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(slowmo.train, "where_it_pays", lambda *_: None)  # a loss a worker

    class Slow(Normal):
        def loss(self, model, batch):
            now[0] += 1.0 if model.training else 1000.0  # recalibration asks for losses too
            return super().loss(model, batch)

        def evaluate(self, model, part, samples):
            now[0] += 1000.0
            return super().evaluate(model, part, samples)

    *_, tally, rows = trained(BATCHNORM, m=3, steps=4, task=Slow())
    assert tally.seconds == 12.0
    assert [row["seconds"] for row in rows[:: len(BATCHNORM)]] == [0.0, 3.0, 6.0, 9.0, 12.0]


def test_time_between_two_steps_is_the_caller_s(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(slowmo.train, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    task = Normal()
    replicas, algorithm = build(task, 2, "sgp", adam)
    tally = TrainingMeter(2, torch.device("cpu"))
    for _ in train(task, replicas, algorithm, lambda step: 0.1, 3, 0, tally):
        now[0] += 50.0  # saving, printing
    assert tally.seconds == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("worker", [0, 2])
def test_diverged(bad, worker):
    class Bad(Normal):
        def batches(self, step, workers, part):
            return [(i, step, x) for i, x in zip(workers, super().batches(step, workers, part))]

        def loss(self, model, batch):
            i, step, x = batch
            return super().loss(model, x) * (bad if i == worker and step == 2 else 1.0)

    task = Bad()
    replicas, algorithm = build(task, 3, "local_sgd", nesterov)
    tally = TrainingMeter(3, torch.device("cpu"))
    seen = [tally.diverged() for _ in train(task, replicas, algorithm, lambda step: 0.1, 4, 0, tally)]
    assert seen == [False, False, True, True]


# --- random numbers ---


class Masks(Normal):
    """Keeps the dropout mask of every (step, worker)."""

    def __init__(self):
        super().__init__()
        self.masks = {}

    def batches(self, step, workers, part):
        return [(step, i) for i in workers]

    def loss(self, model, batch):
        x = torch.ones(1, 64, dtype=torch.float64)
        self.masks[batch] = model.dropout(x)[0] != 0
        return super().loss(model, self.draw(*batch))


def masks(m, steps, seed=0, start=0):
    task = Masks()
    replicas, algorithm = build(task, m, "sgp", nesterov, slow)
    algorithm.base.steps = start
    for _ in train(task, replicas, algorithm, lambda step: 0.1, steps, seed, TrainingMeter(len(replicas.models), torch.device("cpu"))):
        pass
    return task.masks, whole_state(replicas, algorithm)["z"], replicas.cluster.local_workers


def test_dropout_differs_between_workers_steps_and_seeds():
    seen, _, _ = masks(4, 3)
    seen |= {("seed 1", *key): mask for key, mask in masks(4, 3, seed=1)[0].items()}
    assert len(seen) == 24 and len({tuple(mask.tolist()) for mask in seen.values()}) == 24
    assert all(10 < mask.sum() < 54 for mask in seen.values())
    resumed, _, _ = masks(4, 3, start=2)  # a run that goes on draws what it would have drawn
    assert all(torch.equal(mask, seen[key]) for key, mask in resumed.items()) and len(resumed) == 4


def on_processes(m):
    # not Adam: the bias before BatchNorm has gradient 0 but for rounding, which Adam would blow up to whole steps
    *_, rows = trained(BATCHNORM, m=m, optimizer=nesterov, steps=3)
    return masks(m, 3), rows


def test_foldings_draw_the_same_and_measure_the_same():
    (whole, z, _), rows = on_processes(4)
    first, second = spawn(on_processes, 2, 4)
    for (seen, part, ranks), measured in (first, second):
        assert all(torch.equal(mask, whole[key]) for key, mask in seen.items()) and len(seen) == 6
        assert torch.allclose(part, z[list(ranks)], rtol=1e-12, atol=1e-12)
        for row, expected in zip(measured, rows, strict=True):
            assert row.pop("seconds") >= 0  # each process has its own clock
            for name, value in row.items():
                same = pytest.approx(expected[name], rel=1e-9) if isinstance(value, float) else expected[name]
                assert value == same, name
    assert first[1] == second[1]  # every process gets the same row, to the last bit


@pytest.mark.parametrize("seed", [0, 2**16, 20_240_101])
def test_any_seed_trains(seed):
    trained(seed=seed, steps=1)


def band(m):
    """One worker's own model, judged by the processes of its node together."""
    task = Normal(dropout=0.0)
    replicas, algorithm, tally, _ = trained(m=m, steps=0, task=task)
    row, _ = evaluate(task, replicas, algorithm, tally, samples=5)
    return row["validation_loss_min"], row["validation_loss_max"], len(task.seen)


def test_the_processes_of_a_node_share_out_the_band():
    low, high, _ = band(2)
    for processes in (2, 4, 12):  # the last with six for each worker's five samples
        for result in spawn(band, processes, 2):
            assert result == (pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12), 2)
