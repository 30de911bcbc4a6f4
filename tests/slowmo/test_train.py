"""The loop: the clock counts training alone, random numbers belong to (seed, step, worker, micro-batch)."""

import math
import types

import pytest
import torch
from helpers import Several, average, build, copied, sgd
from normed import Normal
from processes import spawn

import slowmo.train
from slowmo.evaluate import BATCHNORM, evaluate
from slowmo.outer import SlowMo
from slowmo.state import state_dict
from slowmo.train import TrainingMeter, train


def nesterov(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.1)


def slow(base):
    return SlowMo(base, tau=2, buffers="maintain")


def meter_for(replicas):
    return TrainingMeter(len(replicas.models), torch.device("cpu"))


def trained(evaluations=(), m=3, base="sgp", optimizer=adam, steps=5, seed=0, task=None, vectorize=False, **more):
    """(replicas, algorithm, meter, rows) after `steps`; each of `evaluations` is made before the first and after every step."""
    task = task or Normal()
    replicas, algorithm = build(task, m, base, optimizer, slow, **more)
    meter = meter_for(replicas)
    measure = lambda: [evaluate(task, replicas, algorithm, meter, norms)[0] for norms in evaluations]
    rows = measure()
    for _ in train(task, replicas, algorithm, lambda step: 0.1, steps, seed, meter, vectorize):
        rows += measure()
    return replicas, algorithm, meter, rows


# --- the clock ---


def test_the_clock_counts_training_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(slowmo.train, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(Normal):
        def loss(self, model, batch):
            now[0] += 1.0 if model.training else 1000.0  # recalibration asks for losses too
            return super().loss(model, batch)

        def evaluate(self, model, part):
            now[0] += 1000.0
            return super().evaluate(model, part)

    *_, meter, rows = trained(BATCHNORM, m=3, steps=4, task=Slow())
    assert meter.seconds == 12.0
    assert [row["seconds"] for row in rows[:: len(BATCHNORM)]] == [0.0, 3.0, 6.0, 9.0, 12.0]


def test_trying_out_whether_replicas_go_together_is_not_training(monkeypatch):
    now, vectorized = [0.0], slowmo.train.vectorized

    def slowly(*a):
        now[0] += 1000.0
        return vectorized(*a)

    monkeypatch.setattr(slowmo.train, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(slowmo.train, "vectorized", slowly)
    for mode in (True, False, "auto"):
        *_, meter, _ = trained(steps=3, task=Normal(0.0), vectorize=mode)
        assert meter.seconds == 0.0 and now[0] > 0


def test_time_between_two_steps_and_before_an_average_is_the_caller_s(monkeypatch):
    now, called = [0.0], []
    monkeypatch.setattr(slowmo.train, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def before_average(step):
        called.append(step)
        now[0] += 50.0

    task = Normal()
    replicas, algorithm = build(task, 2, "sgp", adam, slow)
    meter = meter_for(replicas)
    for _ in train(task, replicas, algorithm, lambda step: 0.1, 5, 0, meter, before_average=before_average):
        now[0] += 50.0  # saving, printing
    assert meter.seconds == 0.0 and called == [2, 4]


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
    meter = meter_for(replicas)
    seen = [meter.diverged() for _ in train(task, replicas, algorithm, lambda step: 0.1, 4, 0, meter)]
    assert seen == [False, False, True, True]


def test_it_yields_from_where_the_algorithm_stands_to_where_it_shall():
    task = Several(2)
    replicas, algorithm = build(task, 2, "sgp", sgd, slow)
    go = lambda steps: list(train(task, replicas, algorithm, lambda step: 0.1, steps, 0, meter_for(replicas)))
    assert (go(3), go(3), go(5)) == ([1, 2, 3], [], [4, 5]) and algorithm.steps == 5


def test_the_schedule_is_asked_for_each_step():
    task, asked = Several(2), []
    replicas, algorithm = build(task, 2, "sgp", sgd)
    for _ in train(task, replicas, algorithm, lambda step: asked.append(step) or 0.1 / (step + 1), 3, 0, meter_for(replicas)):
        assert algorithm.optimizer.param_groups[0]["lr"] == 0.1 / len(asked)
    assert asked == [0, 1, 2]


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
    for _ in train(task, replicas, algorithm, lambda step: 0.1, steps, seed, meter_for(replicas)):
        pass
    return task.masks, replicas.rows(), replicas.cluster.local_workers


def test_dropout_differs_between_workers_steps_and_seeds():
    seen, _, _ = masks(4, 3)
    seen |= {("seed 1", *key): mask for key, mask in masks(4, 3, seed=1)[0].items()}
    assert len(seen) == 24 and len({tuple(mask.tolist()) for mask in seen.values()}) == 24
    assert all(10 < mask.sum() < 54 for mask in seen.values())
    resumed, _, _ = masks(4, 3, start=2)  # a run that goes on draws what it would have drawn
    assert all(torch.equal(mask, seen[key]) for key, mask in resumed.items()) and len(resumed) == 4


class Pieces(Normal):
    """Four micro-batches a worker and step, wherever they are computed; keeps the mask of each."""

    def __init__(self, accumulate):
        super().__init__()
        self.accumulate, self.masks = accumulate, {}

    def batches(self, step, workers, part):
        return [(step, i, k) for i in workers for k in range(part[0], 4, part[1])]

    def loss(self, model, batch):
        step, i, k = batch
        self.masks[batch] = model.dropout(torch.ones(1, 64, dtype=torch.float64))[0] != 0
        # only the norm's statistics would tell which micro-batches came before
        return (model.last(model.first(self.draw(10 * step + k, i))).squeeze(1) - 1).square().mean() / self.accumulate


def micro_batches(m):
    ranks = slowmo.Cluster(m)
    task = Pieces(4 // ranks.worker_size)
    replicas, algorithm = build(task, m, "sgp", nesterov, slow, ranks, accumulate=task.accumulate)
    for _ in train(task, replicas, algorithm, lambda step: 0.1, 3, 0, meter_for(replicas)):
        pass
    return task.masks, average(algorithm)


def test_a_micro_batch_draws_the_same_whichever_rank_of_its_worker_has_it():
    whole, mean = micro_batches(2)
    assert len(whole) == 24 and len({tuple(mask.tolist()) for mask in whole.values()}) == 24
    for processes in (2, 4, 8):
        seen = {}
        for part, other in spawn(micro_batches, processes, 2):
            seen |= part
            torch.testing.assert_close(other, mean, rtol=1e-11, atol=1e-11)
        assert seen.keys() == whole.keys() and all(torch.equal(mask, whole[key]) for key, mask in seen.items())


def on_ranks(m):
    # not Adam: the bias before BatchNorm has gradient 0 but for rounding, which Adam would blow up to whole steps
    *_, rows = trained(BATCHNORM, m=m, optimizer=nesterov, steps=3)
    return masks(m, 3), rows


def test_layouts_draw_the_same_and_measure_the_same():
    (whole, z, _), rows = on_ranks(4)
    first, second = spawn(on_ranks, 2, 4)
    for (seen, part, workers), measured in (first, second):
        assert all(torch.equal(mask, whole[key]) for key, mask in seen.items()) and len(seen) == 6
        torch.testing.assert_close(part, z[list(workers)], rtol=1e-12, atol=1e-12)
        for row, expected in zip(measured, rows, strict=True):
            assert row.pop("seconds") >= 0  # each process has its own clock
            for name, value in row.items():
                same = pytest.approx(expected[name], rel=1e-9) if isinstance(value, float) else expected[name]
                assert value == same, name
    assert first[1] == second[1]  # every rank gets the same row, to the last bit


@pytest.mark.parametrize("seed", [0, 2**16, 20_240_101])
def test_any_seed_trains(seed):
    trained(seed=seed, steps=1)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_is_repeatable_to_the_last_bit(overlap):
    rows = [copied(state_dict(trained(overlap=overlap)[1]))["workers"][2]["model.last.weight"] for _ in range(2)]
    assert torch.equal(*rows)
