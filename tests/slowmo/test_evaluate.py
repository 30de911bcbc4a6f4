"""What is measured, and that measuring changes nothing."""

import math

import pytest
import torch
from helpers import BASES, Several, assert_same_state, average, build, copied, quadratic, sgd
from helpers import slow as slow_rows
from normed import Normal
from processes import spawn
from test_train import adam, meter_for, nesterov, slow, trained

from slowmo.cluster import Cluster
from slowmo.evaluate import BATCHNORM, evaluate, evaluate_workers
from slowmo.outer import Average, SlowMo
from slowmo.state import state_dict
from slowmo.train import train

# --- changes nothing ---


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("optimizer", [nesterov, adam])
@pytest.mark.parametrize("base", BASES)
def test_evaluations_change_nothing(base, optimizer, overlap):
    plain = copied(state_dict(trained(base=base, optimizer=optimizer, overlap=overlap)[1]))
    assert_same_state(state_dict(trained(BATCHNORM, base=base, optimizer=optimizer, overlap=overlap)[1]), plain)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_measuring_workers_changes_nothing_even_just_before_an_average(base, vectorize):
    states = []
    for measured in (False, True):
        task = Normal(0.0)
        replicas, algorithm = build(task, 3, base, nesterov, slow)
        meter, rows = meter_for(replicas), []
        look = lambda step: rows.append(evaluate_workers(task, replicas, algorithm, band=True))
        for _ in train(task, replicas, algorithm, lambda step: 0.1, 5, 0, meter, vectorize, look if measured else None):
            if measured:
                look(0)
        states.append(copied(state_dict(algorithm)))
        assert len(rows) == 7 * measured
    assert_same_state(*states)


class PartlyFrozen(Normal):
    """Fine-tuning: BatchNorm keeps the statistics it came with."""

    def model(self):
        model = super().model()
        model.norm.eval()
        return model


def test_evaluations_leave_the_mode_of_each_module():
    plain = copied(state_dict(trained(task=PartlyFrozen())[1]))
    replicas, algorithm, *_ = trained(["average"], task=PartlyFrozen())
    assert_same_state(state_dict(algorithm), plain)
    evaluate_workers(PartlyFrozen(), replicas, algorithm, band=True)
    assert all(model.training and not model.norm.training and model.dropout.training for model in replicas.models)


def on_ranks(m, measured):
    """The state of this rank after five steps."""
    task = Normal(0.0)
    replicas, algorithm = build(task, m, "sgp", nesterov, slow)
    look = (lambda step: evaluate_workers(task, replicas, algorithm, band=True)) if measured else None
    meter = meter_for(replicas)
    for _ in train(task, replicas, algorithm, lambda step: 0.1, 5, 0, meter, False, look):
        if measured:
            [evaluate(task, replicas, algorithm, meter, norms) for norms in BATCHNORM]
    return copied(state_dict(algorithm))


@pytest.mark.parametrize("processes, m", [(2, 4), (4, 2)])
def test_evaluations_change_nothing_on_ranks(processes, m):
    for measured, plain in zip(spawn(on_ranks, processes, m, True), spawn(on_ranks, processes, m, False)):
        assert_same_state(measured, plain)


# --- the averaged model ---


@pytest.mark.parametrize("norms", BATCHNORM)
def test_a_second_evaluation_gives_the_same_row(norms):
    task = Normal()
    replicas, algorithm, meter, _ = trained(task=task)
    first, second = (evaluate(task, replicas, algorithm, meter, norms)[0] for _ in range(2))
    assert first.pop("train_loss") > 0 and second.pop("train_loss") is None  # losses are counted anew
    assert first == second and norms in first["evaluated"] and "3 workers" in first["evaluated"]


def judged(task, model):
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        value = (model(task.x).squeeze(1) - task.x.sum(1)).square().mean().item()
    for module, training in modes:
        module.training = training
    return value


def test_a_row_is_what_it_says():
    task = Normal(dropout=0.0)
    replicas, algorithm, meter, _ = trained(m=4, task=task)
    losses = meter.losses.clone()
    row, model = evaluate(task, replicas, algorithm, meter)
    expected = replicas.materialize(algorithm.base.average(), replicas.mean_buffers())
    assert model is expected and not model.training
    assert row["validation_loss"] == pytest.approx(judged(task, expected), rel=1e-12)
    assert row["train_loss"] == pytest.approx(losses.sum().item() / (4 * 5), rel=1e-12)
    assert row["slow_momentum_norm"] == pytest.approx(slow_rows(algorithm, "u").norm().item(), rel=1e-12)
    assert meter.count == 0 and not meter.losses.any()


def test_without_exact_averages_the_slow_momentum_norm_is_the_root_of_the_mean_square():
    task = Several(3)
    replicas, algorithm = build(task, 3, "sgp", sgd, lambda base: SlowMo(base, tau=2, exact=False))
    meter = meter_for(replicas)
    for _ in train(task, replicas, algorithm, lambda step: 0.1, 5, 0, meter):
        pass
    row, _ = evaluate(task, replicas, algorithm, meter)
    assert row["slow_momentum_norm"] == pytest.approx(slow_rows(algorithm, "u").square().sum(1).mean().sqrt().item(), rel=1e-12)


def test_a_row_without_slow_momentum_or_training():
    task = quadratic(2)
    replicas, algorithm = build(task, 2, "sgp")
    row, _ = evaluate(task, replicas, algorithm, meter_for(replicas))
    assert row["slow_momentum_norm"] is None and row["train_loss"] is None and row["seconds"] == 0
    assert evaluate_workers(task, replicas, algorithm) == {"consensus_distance": 0}


def test_an_optimizer_without_epsilon_is_measured():
    task = quadratic(2, d=3)
    replicas, algorithm = build(task, 2, "sgp", lambda parameters: torch.optim.Adam(parameters, lr=0.1, eps=0.0), slow)
    for _ in train(task, replicas, algorithm, lambda step: 0.1, 3, 0, meter_for(replicas)):
        pass
    assert torch.isfinite(replicas.rows()).all()  # what fills up a row divides 0 by 0, and nobody sees it
    assert math.isfinite(evaluate_workers(task, replicas, algorithm)["consensus_distance"])
    assert math.isfinite(evaluate(task, replicas, algorithm, meter_for(replicas))[0]["slow_momentum_norm"])


# --- the workers ---


def distance(replicas, algorithm):
    return math.sqrt((replicas.rows() - average(algorithm)).square().sum(1).mean())


@pytest.mark.parametrize("base", ["local_sgd", "sgp", "osgp_irregular"])
def test_the_consensus_distance_is_measured_before_an_average(base):
    """Just after one workers are equal, which says nothing."""
    task = Several(4)
    replicas, algorithm = build(task, 4, base, nesterov, lambda b: Average(b, 3))
    before, expected, after = [], [], []

    def look(step):
        before.append(evaluate_workers(task, replicas, algorithm)["consensus_distance"])
        w = getattr(algorithm.base, "w", torch.ones(4, 1))
        expected.append(distance(replicas, algorithm))
        assert (w == 1).all() or base == "osgp_irregular"

    for step in train(task, replicas, algorithm, lambda step: 0.1, 7, 0, meter_for(replicas), before_average=look):
        after.append(evaluate_workers(task, replicas, algorithm)["consensus_distance"])
    assert before == pytest.approx(expected, rel=1e-12) and len(before) == 2 and min(before) > 1e-2
    assert after[2] < 1e-12 and after[5] < 1e-12 and after[0] > 1e-3


def test_before_an_average_rows_are_steps_of_their_own_and_their_mean_is_the_average_to_come():
    """Gossip is dropped there, so the distance is that of the paper's line 5: after the step, before the mean."""
    task = Several(4)
    replicas, algorithm = build(task, 4, "sgp", nesterov, lambda b: Average(b, 3))
    seen = []
    look = lambda step: seen.append(average(algorithm))
    for step in train(task, replicas, algorithm, lambda step: 0.1, 6, 0, meter_for(replicas), before_average=look):
        if step % 3 == 0:
            torch.testing.assert_close(replicas.rows(), seen.pop().expand(4, -1), rtol=1e-14, atol=1e-14)


def test_the_band_is_judged_on_the_samples_of_its_line():
    """All of them: with equal workers least, largest and the averaged model's are one number."""
    task = Normal(dropout=0.0, samples=9)
    replicas, algorithm, meter, _ = trained(m=4, task=task)
    own = [judged(task, model) for model in replicas.models]
    row = evaluate_workers(task, replicas, algorithm, band=True)
    assert (row["validation_loss_worker_min"], row["validation_loss_worker_max"]) == pytest.approx((min(own), max(own)), rel=1e-12)
    assert row.keys() == {"consensus_distance", "validation_loss_worker_min", "validation_loss_worker_max"}
    task = Normal(dropout=0.0, samples=9)
    replicas, algorithm, meter, _ = trained(m=4, steps=0, task=task)
    row = evaluate_workers(task, replicas, algorithm, band=True) | evaluate(task, replicas, algorithm, meter)[0]
    assert row["validation_loss_worker_min"] == row["validation_loss_worker_max"] == pytest.approx(row["validation_loss"], rel=1e-12)


def band(m):
    """How far workers are apart after three steps; a worker's ranks share out the samples, and its statistics are their mean."""
    cluster = Cluster(m)

    class Apart(Normal):
        """The ranks of a worker see other samples, so their statistics differ."""

        def batches(self, step, workers, part):
            return [self.draw(step, i, 12)[part[0] :: part[1]] for i in workers]

    task = Apart(dropout=0.0, samples=5)
    replicas, algorithm = build(task, m, "local_sgd", nesterov, None, cluster)
    for _ in train(task, replicas, algorithm, lambda step: 0.01, 3, 0, meter_for(replicas), False):
        pass
    own = [{name: value.clone() for name, value in buffers.items()} for buffers in replicas.buffers()]
    seen = len(task.seen)
    row = evaluate_workers(task, replicas, algorithm, band=True)
    assert all(torch.equal(value, own[k][name]) for k, buffers in enumerate(replicas.buffers()) for name, value in buffers.items())
    # by hand: this worker's model with the mean of its ranks' statistics, on all samples
    mean = replicas.mean_buffers_in_worker() or own[0]
    model = replicas.materialize([segment.x.detach()[:1] for segment in replicas.segments], mean)
    judged_here = judged(task, model)
    return row, judged_here, len(task.seen) - seen, mean["norm.running_mean"], own[0]["norm.running_mean"]


@pytest.mark.parametrize("processes", [2, 4, 12])
def test_the_ranks_of_a_worker_share_out_the_band(processes):
    """The last with six ranks for each worker's five samples."""
    results = spawn(band, processes, 2)
    losses = [loss for _, loss, *_ in results]
    for row, _, seen, mean, own in results:
        assert seen == 1
        assert (row["validation_loss_worker_min"], row["validation_loss_worker_max"]) == pytest.approx(
            (min(losses), max(losses)), rel=1e-10
        )
        assert torch.equal(mean, own) == (processes == 2)  # otherwise its own statistics are of no single model
    assert all(result[0] == results[0][0] for result in results)  # the same row on every rank


def test_distances_are_the_same_under_every_layout():
    def measured(m):
        task = Several(m)
        replicas, algorithm = build(task, m, "sgp", nesterov)
        for _ in train(task, replicas, algorithm, lambda step: 0.1, 3, 0, meter_for(replicas)):
            pass
        return evaluate_workers(task, replicas, algorithm, band=True)

    whole = measured(4)
    for processes in (2, 4, 8):
        for row in spawn(measured, processes, 4):
            assert row == {name: pytest.approx(value, rel=1e-11) for name, value in whole.items()}
