"""A run saved anywhere goes on bitwise: under other buckets and on other ranks too, where no sum comes in another order."""

import io
import itertools

import pytest
import torch
from branches import Shuffled, biases_apart
from helpers import BASES, Scalars, Several, assert_same_state, build, copied, quadratic, run, sgd, slow, two_groups
from processes import spawn
from test_outer import OUTERS, adam, make, nesterov, rate

import slowmo
from slowmo.cluster import Cluster
from slowmo.outer import Average, SlowMo
from slowmo.replicas import Replicas
from slowmo.state import load_state_dict, state_dict
from slowmo.train import TrainingMeter, train


@pytest.mark.parametrize("base, outer", list(itertools.product(BASES, OUTERS)))
@pytest.mark.parametrize("optimizer", [nesterov, adam])
def test_a_run_saved_anywhere_goes_on_bitwise(base, outer, optimizer):
    m, tau, steps = 3, 3, 8
    task, vectorize = Several(m), optimizer is adam
    replicas, algorithm = make(m, base, outer, optimizer, tau)
    states = [copied(state_dict(algorithm))]
    for _ in train(task, replicas, algorithm, rate, steps, task.seed, TrainingMeter(m, torch.device("cpu")), vectorize):
        states.append(copied(state_dict(algorithm)))
    assert not torch.equal(states[-1]["workers"][0]["model.a"], states[-2]["workers"][0]["model.a"])
    for stop in (0, 1, 3, 4, 5):  # before, inside the first round, at its end, and inside the second
        others, fresh = make(m, base, outer, optimizer, tau)
        saved = copied(states[stop])
        load_state_dict(fresh, saved)
        assert_same_state(saved, states[stop])  # loading leaves the caller's tensors alone
        assert_same_state(state_dict(fresh), states[stop])
        for model, worker in zip(others.models, saved["workers"]):
            assert all(torch.equal(p, worker[f"model.{name}"]) for name, p in model.named_parameters())
        run(task, others, fresh, min(stop + 4, steps), rate, vectorize)
        assert_same_state(state_dict(fresh), states[min(stop + 4, steps)])
        assert_same_state(saved, states[stop])


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "RAdam", "Adadelta", "Adamax", "NAdam", "AdamW", "Rprop", "ASGD"])
def test_other_optimizers_go_on_bitwise(name):
    optimizer = lambda parameters: getattr(torch.optim, name)(parameters, lr=0.1)
    made = lambda: build(Several(2), 2, "sgp", two_groups(optimizer), lambda b: SlowMo(b, 3, buffers="maintain"))
    replicas, algorithm = made()
    run(Several(2), replicas, algorithm, 5, rate)
    others, fresh = made()
    load_state_dict(fresh, copied(state_dict(algorithm)))
    run(Several(2), replicas, algorithm, 9, rate)
    run(Several(2), others, fresh, 9, rate)
    assert_same_state(state_dict(fresh), state_dict(algorithm))


def test_hyperparameters_are_part_of_the_state():
    replicas, algorithm = build(Several(2), 2, "local_sgd", two_groups(adam))
    algorithm.optimizer.param_groups[1] |= {"betas": (0.5, 0.6), "weight_decay": 0.3}
    run(Several(2), replicas, algorithm, 2, 0.07)
    _, fresh = build(Several(2), 2, "local_sgd", two_groups(adam))
    load_state_dict(fresh, copied(state_dict(algorithm)))
    first, second = fresh.optimizer.param_groups
    assert first["lr"] == second["lr"] == 0.07 and first["betas"] == (0.9, 0.999) and first["weight_decay"] == 0
    assert second["betas"] == (0.5, 0.6) and second["weight_decay"] == 0.3 and isinstance(second["betas"], tuple)


# --- by name, whatever the buckets, groups and ranks ---

BITWISE = {  # no sum over ranks: gossip between two workers at a time, or none
    "sgp": ("sgp", None),
    "osgp": ("osgp", None),
    "sgp noaverage": ("sgp", lambda base: SlowMo(base, 2, beta=0.6, buffers="maintain", exact=False)),
    "local": ("local_sgd", None),
}
SUMS = {
    "slowmo": ("sgp", lambda base: SlowMo(base, 2, beta=0.6, buffers="maintain")),
    "average": ("local_sgd", lambda base: Average(base, 2, "average")),
    "allreduce": ("allreduce", None),
    "irregular": ("osgp_irregular", lambda base: SlowMo(base, 4, beta=0.6)),
}
SMALL, LARGE = 1e-5, 25.0


def made_for(case, m, cap, cluster=None, groups=biases_apart):
    base, outer = (BITWISE | SUMS)[case]
    return build(Shuffled(), m, base, groups(lambda g: torch.optim.AdamW(g, lr=0.05)), outer, cluster, cap, overlap=cap == SMALL)


def goes_on(m, states, cap, steps=6):
    """Every case, loaded from `states` (all workers) and gone on with to `steps`: the workers here, and their states."""
    cluster, results = Cluster(m), {}
    for case, state in states.items():
        replicas, algorithm = made_for(case, m, cap, cluster)
        load_state_dict(algorithm, state | {"workers": [state["workers"][i] for i in cluster.local_workers]})
        # dropout or not: ranks of one worker share out samples, and two workers on a rank go one after another
        run(Shuffled(), replicas, algorithm, steps, rate, vectorize=False)
        results[case] = copied(state_dict(algorithm)), len(replicas.buckets)
    return cluster.local_workers, results


def begins(m, cap):
    """Every case trained for three steps from the start: the states of the workers here."""
    cluster, states = Cluster(m), {}
    for case in BITWISE | SUMS:
        replicas, algorithm = made_for(case, m, cap, cluster)
        run(Shuffled(), replicas, algorithm, 3, rate, vectorize=False)
        states[case] = copied(state_dict(algorithm))
    return states


def assembled(parts):
    """One state of all workers from those of the ranks."""
    return {case: parts[0][case] | {"workers": [worker for part in parts for worker in part[case]["workers"]]} for case in parts[0]}


def test_a_run_goes_on_under_other_buckets_and_on_other_ranks():
    """Saved on 4 ranks with tiny buckets, loaded with one bucket on 1, 2 and 4 ranks; and the other way around."""
    m = 4
    for saved in (assembled(spawn(begins, 4, m, SMALL)), begins(m, LARGE)):
        whole = goes_on(m, saved, LARGE)[1]
        for processes, cap in ((4, LARGE), (4, SMALL), (2, SMALL)):
            for workers, results in spawn(goes_on, processes, m, saved, cap):
                for case, (state, buckets) in results.items():
                    assert buckets == (8 if cap == SMALL else 1)
                    expected = whole[case][0]
                    expected = expected | {"workers": [expected["workers"][i] for i in workers]}
                    if case in BITWISE:
                        assert_same_state(state, expected)
                        continue
                    for a, b in zip([*state["workers"], state["shared"]], [*expected["workers"], expected["shared"]], strict=True):
                        assert a.keys() == b.keys()
                        for name in a:
                            torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-6)


def test_names_do_not_depend_on_buckets_and_nothing_is_padding():
    state = begins(2, LARGE)["slowmo"]
    parts = spawn(begins, 2, 2, SMALL)
    model = Shuffled().model()
    names = [name for name, _ in model.named_parameters()]
    for part in (state, *(part["slowmo"] for part in parts)):
        assert part["workers"][0].keys() == {"push_sum_weight", *(f"model.{n}" for n in names),
                                             *(f"optimizer.{k}.{n}" for n in names for k in ("exp_avg", "exp_avg_sq"))}  # fmt: skip
        assert part["shared"].keys() == {*(f"slow.{k}.{n}" for n in names for k in ("x0", "u")), *(f"optimizer.step.{n}" for n in names)}
        for name, p in model.named_parameters():
            for key in (f"model.{name}", f"optimizer.exp_avg.{name}"):
                assert part["workers"][0][key].shape == p.shape
            assert part["shared"][f"slow.u.{name}"].shape == p.shape


def one_group(make):
    return make


def test_a_state_moves_between_cuts_into_groups():
    """The names of tensors know nothing of segments; only hyperparameters belong to groups, and their number must agree."""
    by_first, by_kind = (lambda make: two_groups(make)), biases_apart
    replicas, algorithm = made_for("slowmo", 3, LARGE, groups=by_first)
    run(Shuffled(), replicas, algorithm, 3, rate)
    saved = copied(state_dict(algorithm))
    others, fresh = made_for("slowmo", 3, LARGE, groups=by_kind)
    assert [len(s.places) for s in replicas.segments] != [len(s.places) for s in others.segments]
    load_state_dict(fresh, saved)
    assert_same_state(state_dict(fresh), saved)
    rows = [run(Shuffled(), r, a, 6, rate) for r, a in ((replicas, algorithm), (others, fresh))]
    torch.testing.assert_close(*rows, rtol=1e-12, atol=1e-12)
    _, single = made_for("slowmo", 3, LARGE, groups=one_group)
    with pytest.raises(ValueError, match="the state has 2 parameter groups, the optimizer 1"):
        load_state_dict(single, saved)


# --- refusals, before anything is written ---


def damaged(kind):
    replicas, algorithm = build(Several(3), 3, "sgp", two_groups(nesterov), lambda b: SlowMo(b, 3, exact=kind != "own slow"))
    run(Several(3), replicas, algorithm, 4, rate)
    state = copied(state_dict(algorithm))
    worker, shared = state["workers"][2], state["shared"]  # the last worker: nothing may be written to the first before
    remedy = "another model's"
    if kind == "missing":
        del worker["model.b"]
        remedy = "the state lacks model.b and 0 more"
    elif kind == "missing slow":
        del shared["slow.u.c"]
        remedy = "the state lacks slow.u.c"
    elif kind == "own slow":
        worker["slow.x0.c"] = worker["slow.x0.c"][:2]
        remedy = r"slow.x0.c has shape \[2\] in the state, and \[3\]"
    elif kind == "weight":
        del worker["push_sum_weight"]
        remedy = "the state lacks push_sum_weight"
    elif kind == "shape":
        worker["model.c"] = torch.zeros(4)
        remedy = r"model.c has shape \[4\] in the state, and \[3\] in the model"
    elif kind == "optimizer shape":
        worker["optimizer.momentum_buffer.c"] = torch.zeros(2, 2)
        remedy = r"momentum_buffer.c has shape \[2, 2\]"
    elif kind == "another name":
        worker["model.d"] = torch.zeros(1)
        remedy = "the state has model.d, and the model no d"
    elif kind == "another state's name":
        worker["optimizer.momentum_buffer.d"] = torch.zeros(1)
        remedy = "the state has optimizer.momentum_buffer.d"
    elif kind == "groups":
        state["groups"] = state["groups"][:1]
        remedy = "the state has 1 parameter groups, the optimizer 2"
    return state, remedy, kind == "own slow"


@pytest.mark.parametrize("kind", [
    "missing", "missing slow", "own slow", "weight", "shape", "optimizer shape", "another name", "another state's name", "groups",
])  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_written(kind):
    state, remedy, own = damaged(kind)
    replicas, algorithm = build(Several(3), 3, "sgp", two_groups(nesterov), lambda b: SlowMo(b, 3, exact=not own))
    run(Several(3), replicas, algorithm, 2, rate)
    before = copied(state_dict(algorithm))
    with pytest.raises(ValueError, match=remedy):
        load_state_dict(algorithm, state)
    assert_same_state(state_dict(algorithm), before)


def test_another_algorithm_s_state_is_refused():
    _, plain = build(Several(2), 2, "local_sgd", nesterov)
    run(Several(2), plain.replicas, plain, 2, rate)
    _, ours = build(Several(2), 2, "sgp", nesterov, lambda b: SlowMo(b, 3))
    with pytest.raises(ValueError, match="the state lacks push_sum_weight and 6 more: it is another model's or another algorithm's"):
        load_state_dict(ours, state_dict(plain))
    assert_same_state(state_dict(ours), state_dict(build(Several(2), 2, "sgp", nesterov, lambda b: SlowMo(b, 3))[1]))


def test_workers_are_read_one_after_another():
    """`workers` may be anything that gives one by its row: what was read can be dropped before the next."""

    class Files:
        def __init__(self, workers):
            self.workers, self.read = workers, []

        def __getitem__(self, row):
            self.read.append(row)
            return self.workers[row]

    replicas, algorithm = make(3, "sgp", "slowmo-reset")
    run(Several(3), replicas, algorithm, 4, rate)
    saved = copied(state_dict(algorithm))
    _, fresh = make(3, "sgp", "slowmo-reset")
    files = Files(saved["workers"])
    load_state_dict(fresh, saved | {"workers": files})
    assert_same_state(state_dict(fresh), saved)
    rows = [row for row, _ in itertools.groupby(files.read)]
    assert list(rows[-3:]) == [0, 1, 2]


# --- memory and dtypes ---


def written(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


@pytest.mark.parametrize("vectorize", [False, True])
def test_saving_one_of_32_replicas_writes_its_own_bytes_only(vectorize):
    """Parameters are views of rows, and batched buffers of a stack: each has a storage of its own all the same."""

    class Wide(Scalars):
        def model(self):
            torch.manual_seed(0)
            return torch.nn.Sequential(
                torch.nn.Linear(1000, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1000), torch.nn.BatchNorm1d(1000)
            )

        def batches(self, step, workers, part):
            return [torch.randn(3, 1000, generator=torch.Generator().manual_seed(1000 * step + i)) for i in workers]

        def loss(self, model, batch):
            return model(batch).square().mean()

    task = Wide([0.0] * 32)
    alone = written(task.model().state_dict())
    replicas, algorithm = build(task, 32, "local_sgd")
    run(task, replicas, algorithm, 1, 0.1, vectorize=vectorize)
    for model in (replicas.models[0], replicas.models[31]):
        assert written(model.state_dict()) < 1.1 * alone
    copied_model = torch.load(io.BytesIO(_bytes(replicas.models[3].state_dict())))
    assert all(torch.equal(value, replicas.models[3].state_dict()[name]) for name, value in copied_model.items())


def _bytes(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_master_weights_survive_and_narrow_copies_follow():
    model = lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())

    def made():
        torch.manual_seed(0)
        one = model()
        optimizer = sgd(one.parameters(), momentum=0.9)
        replicas = Replicas(one, Cluster(2), optimizer.param_groups)
        return replicas, slowmo.LocalSGD(replicas, optimizer)

    def step(replicas, algorithm):
        algorithm.start(1e-3)
        for k, one in enumerate(replicas.models):
            one[1](one[0](torch.ones(3, 2) * (k + 1)).bfloat16()).float().square().sum().backward()
        algorithm.step()

    replicas, algorithm = made()
    for _ in range(3):
        step(replicas, algorithm)
    saved = copied(state_dict(algorithm))
    assert saved["workers"][1]["model.1.weight"].dtype == torch.float32  # the master, not its copy
    others, fresh = made()
    load_state_dict(fresh, saved)
    assert torch.equal(others.models[1][1].weight, saved["workers"][1]["model.1.weight"].bfloat16())
    for each in ((replicas, algorithm), (others, fresh)):
        step(*each)
    assert_same_state(state_dict(fresh), state_dict(algorithm))
    assert torch.equal(replicas.rows(), others.rows())


def test_slow_state_is_there_only_once_it_was_taken():
    replicas, algorithm = build(quadratic(2), 2, "local_sgd", outer=lambda b: SlowMo(b, 3))
    assert not any(name.startswith("slow.") for name in state_dict(algorithm)["shared"])
    algorithm.start(0.1)
    assert torch.equal(state_dict(algorithm)["shared"]["slow.x0.x"], slow(algorithm, "x0")[0])
