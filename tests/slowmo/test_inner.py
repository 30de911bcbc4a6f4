"""The user's optimizer over segments: as if each worker had its own, as if there were no buckets, or as it is."""

import copy
import warnings

import pytest
import torch
from branches import Shuffled, biases_apart
from helpers import BASES, Several, buffers, build, copied, quadratic, restart, run, sgd, two_groups
from processes import spawn
from test_base import push, scattered

import slowmo
from slowmo.cluster import Cluster
from slowmo.inner import ELEMENTWISE, SegmentOptimizer, WholeOptimizer
from slowmo.outer import SlowMo
from slowmo.replicas import Replicas
from slowmo.state import load_state_dict, state_dict

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "nesterov": lambda parameters: sgd(parameters, momentum=0.9, nesterov=True, weight_decay=0.01),
    "dampened": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "adam-fused": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.5, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, initial_accumulator_value=2.0),
    "radam": lambda parameters: torch.optim.RAdam(parameters, lr=0.1),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.1),
    "adadelta": lambda parameters: torch.optim.Adadelta(parameters, lr=0.1),
    "adamax": lambda parameters: torch.optim.Adamax(parameters, lr=0.1),
    "rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.1),
    "asgd": lambda parameters: torch.optim.ASGD(parameters, lr=0.1, t0=2),
}
names = pytest.mark.parametrize("name", OPTIMIZERS)


def test_every_optimizer_of_the_list_is_tried_here():
    made = {type(make([torch.nn.Parameter(torch.zeros(1))])) for make in OPTIMIZERS.values()}
    assert made == set(ELEMENTWISE)


def everything(algorithm):
    """The optimizer's state by segment and name, cloned."""
    inner = algorithm.base.inner
    return {(k, name): torch.as_tensor(value).clone() for k, segment in enumerate(algorithm.replicas.segments)
            for name, value in inner.state.get(segment.x, {}).items()}  # fmt: skip


@names
@pytest.mark.parametrize("m", [1, 3])
def test_rows_are_trained_as_if_alone(name, m):
    """m rows, two segments and one twin step as m optimizers of their own over three parameters each."""
    replicas, algorithm = scattered(m, "local_sgd", OPTIMIZERS[name])
    assert type(algorithm.inner) is SegmentOptimizer
    alone = [[torch.nn.Parameter(part.clone()) for part in row.split([2, 1, 3])] for row in replicas.rows()]
    optimizers = [two_groups(OPTIMIZERS[name])(parts) for parts in alone]
    generator = torch.Generator().manual_seed(1)
    for step, _ in enumerate(push(replicas, algorithm, 4, lr=0.1)):
        gradients = torch.randn(m, 6, dtype=torch.float64, generator=generator)
        for parts, row, optimizer in zip(alone, gradients, optimizers):
            for p, g in zip(parts, row.split([2, 1, 3])):
                p.grad = g.clone()
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
            optimizer.step()
        expected = torch.stack([torch.cat([p.detach() for p in parts]) for parts in alone])
        torch.testing.assert_close(replicas.rows(), expected, rtol=1e-12, atol=1e-12)


@names
def test_reset_is_a_fresh_optimizer(name):
    replicas, algorithm = scattered(3, "local_sgd", OPTIMIZERS[name])
    list(push(replicas, algorithm, 3, lr=0.1))
    x = algorithm.average()
    restart(algorithm, x, "reset")
    others, fresh = scattered(3, "local_sgd", OPTIMIZERS[name])
    restart(fresh, x)
    for _ in zip(push(replicas, algorithm, 3, 0.1, seed=7), push(others, fresh, 3, 0.1, seed=7), strict=True):
        assert torch.equal(replicas.rows(), others.rows())
    assert algorithm.steps == 6  # the global step never restarts


@names
def test_maintain_touches_nothing_and_average_averages_every_buffer(name):
    replicas, algorithm = scattered(3, "local_sgd", OPTIMIZERS[name])
    list(push(replicas, algorithm, 3, lr=0.1))
    before = everything(algorithm)
    assert name == "sgd" or buffers(algorithm)
    restart(algorithm, algorithm.average(), "maintain")
    after = everything(algorithm)
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    restart(algorithm, algorithm.average(), "average")
    after = everything(algorithm)
    for key, value in before.items():
        if key[1] in buffers(algorithm):
            assert value.shape == replicas.segments[key[0]].x.shape and not torch.equal(value[0], value[1])
            torch.testing.assert_close(after[key], value.mean(0, keepdim=True).expand(3, -1), rtol=1e-14, atol=0)
        else:
            assert torch.equal(after[key], value), key  # counters


def test_reset_gives_back_what_an_optimizer_starts_with():
    """Adagrad fills its state when it is built; not every version of torch would build it again."""
    task = quadratic(2)
    replicas, algorithm = build(task, 2, "local_sgd", OPTIMIZERS["adagrad"])
    for _ in range(2):  # the second reset must not find what the first one's steps left
        run(task, replicas, algorithm, algorithm.steps + 2, 0.1)
        restart(algorithm, algorithm.average(), "reset")
        assert (buffers(algorithm)["sum"] == 2).all()


@names
def test_a_reset_keeps_the_memory_where_zeros_are_a_fresh_state(name):
    replicas, algorithm = scattered(2, "local_sgd", OPTIMIZERS[name])
    list(push(replicas, algorithm, 2, 0.1))
    memory = lambda: [block.data_ptr() for segment in replicas.segments for block in algorithm.inner.blocks(segment).values()]
    before = memory()
    restart(algorithm, algorithm.average(), "reset")
    kept = bool(memory()) and memory() == before
    # SGD's first step with dampening takes the whole gradient; Rprop starts from lr, Adagrad from what it is told, NAdam and ASGD count
    assert kept == (name not in ("sgd", "dampened", "rprop", "adagrad", "nadam", "asgd"))


# --- groups and counters ---


def test_each_group_has_its_own_values_and_a_schedule_moves_them():
    task = Shuffled()
    make = biases_apart(lambda groups: torch.optim.AdamW(groups, lr=0.1))
    replicas, algorithm = build(task, 1, "local_sgd", make)
    plain = task.model()
    optimizer = make(plain.parameters())
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (algorithm.optimizer, optimizer)]
    for step in range(4):
        (batch,) = task.batches(step, [0], (0, 1))
        for group in (algorithm.optimizer.param_groups[1], optimizer.param_groups[1]):
            group["betas"] = (0.5, 0.9 - step / 10)
        algorithm.start()
        task.loss(replicas.models[0], batch).backward()
        algorithm.step()
        optimizer.zero_grad()
        task.loss(plain, batch).backward()
        optimizer.step()
        with warnings.catch_warnings():  # it looks for a step of the optimizer that it was given
            warnings.simplefilter("ignore")
            for schedule in schedules:
                schedule.step()
        for p, q in zip(replicas.models[0].parameters(), plain.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert algorithm.optimizer.param_groups[0]["lr"] == 0.1 / 16


def test_a_scheduler_that_was_built_before_wrapping_steps_no_other_optimizer():
    """It puts a wrapper of its own in the place of `step`, bound to the optimizer that it was given."""
    results = []
    for early in (False, True):
        model = Several(2).model()
        optimizer = two_groups(OPTIMIZERS["adam"])(model.parameters())
        if early:
            torch.optim.lr_scheduler.StepLR(optimizer, 1)
        replicas = Replicas(model, Cluster(2), optimizer.param_groups)
        results.append(run(Several(2), replicas, slowmo.LocalSGD(replicas, optimizer), 3, 0.1))
    assert torch.equal(*results) and results[0].any()


class Counted(torch.optim.SGD):
    """Keeps a counter in its groups, as schedule-free optimizers do; takes a step of lr divided by it."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"] / group["k"])


def counted():
    replicas, algorithm = build(Several(2), 2, "sgp", two_groups(lambda groups: Counted(groups, lr=0.5)), bucket_cap_mb=1e-6,
                                elementwise=True, overlap=True)  # fmt: skip
    x = run(Several(2), replicas, algorithm, 3, 0.5, vectorize=False)
    return x, [group["k"] for group in algorithm.optimizer.param_groups], len(replicas.buckets)


def test_a_counter_in_a_group_counts_once_a_step_however_many_buckets():
    replicas, algorithm = build(Several(2), 2, "sgp", two_groups(sgd))
    expected = run(Several(2), replicas, algorithm, 3, lambda step: 0.5 / (step + 1))
    (first, counts, buckets), (second, *_) = spawn(counted, 2)
    assert counts == [3, 3] and buckets == 3
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=1e-12, atol=1e-12)


def test_hooks_of_the_user_see_whole_steps_and_no_bucket():
    model = Several(1).model()
    optimizer = sgd(model.parameters())
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    replicas = Replicas(model, Cluster(1), optimizer.param_groups)
    run(Several(1), replicas, slowmo.LocalSGD(replicas, optimizer), 3, 0.1)
    assert len(seen) in (0, 3)  # SlowMo's own object calls them, the engine underneath does not


def test_state_from_before_wrapping_is_taken_over():
    task = Several(1)
    model = task.model()
    optimizer = OPTIMIZERS["adam"](model.parameters())

    def step(k):
        optimizer.zero_grad()
        task.loss(model, next(task.batches(k, [0], (0, 1)))).backward()
        optimizer.step()

    step(0)
    twin, twins = copy.deepcopy(model), None
    twins = OPTIMIZERS["adam"](twin.parameters())
    twins.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    replicas = Replicas(twin, Cluster(1), twins.param_groups)
    algorithm = slowmo.LocalSGD(replicas, twins)
    assert not twins.state  # no second copy
    for k in range(1, 4):
        step(k)
        algorithm.start()
        task.loss(twin, next(task.batches(k, [0], (0, 1)))).backward()
        algorithm.step()
        for p, q in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_a_segment_without_a_gradient_has_gradient_zero_and_for_a_stranger_is_left_alone():
    """torch skips a parameter whose gradient is None; a layer that this worker's data never reach must not decay then."""
    for skips in (False, True):
        replicas, algorithm = scattered(1, "local_sgd", lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.5))
        algorithm.inner.skip_missing = skips
        before = replicas.rows()
        algorithm.start(0.1)
        replicas.models[0].a.sum().backward()  # the first group; nothing reaches the second
        algorithm.step()
        expected = before * 0.95
        expected[:, :2] -= 0.1
        if skips:
            expected[:, 2:] = before[:, 2:]
        torch.testing.assert_close(replicas.rows(), expected, rtol=1e-14, atol=1e-14)


# --- what is not known to be elementwise ---


class Own(torch.optim.SGD):
    """Somebody's own: of an allowed class's blood, and still not known."""


UNKNOWN = {
    "Muon": lambda parameters: torch.optim.Muon(parameters, lr=0.1),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    "Own": lambda parameters: Own(parameters, lr=0.1, momentum=0.9),
}
unknown = pytest.mark.parametrize("name", [name for name in UNKNOWN if name == "Own" or hasattr(torch.optim, name)])


class Matrices:
    """Two matrices and nothing else: what Muon takes. Worker i has its own targets."""

    seed = 0

    def model(self):
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.Tanh(), torch.nn.Linear(4, 2, bias=False)).double()

    def batches(self, step, workers, part):
        for i in workers:
            x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * i + step))
            yield x, torch.sin((i + 1) * x[:, :2])

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()


@unknown
@pytest.mark.parametrize("m", [2, 3])
def test_an_unknown_optimizer_is_refused_for_several_workers_on_a_rank(name, m):
    with pytest.raises(ValueError, match=f"{name} is not known to be elementwise.*give each of the {m} workers a rank of its own"):
        build(Matrices(), m, "local_sgd", UNKNOWN[name])


@unknown
def test_an_unknown_optimizer_is_refused_in_backward(name):
    with pytest.raises(ValueError, match=f"overlap=True.*{name} is not known to be elementwise: choose overlap=False"):
        build(Matrices(), 1, "local_sgd", UNKNOWN[name], overlap=True)


@pytest.mark.parametrize("overlap", [False, True])
def test_what_its_author_vouches_for_is_stepped_in_rows(overlap):
    rows = [run(Matrices(), *build(Matrices(), 3, "sgp", make, overlap=overlap, elementwise=vouched), 4, 0.1)
            for make, vouched in ((UNKNOWN["Own"], True), (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), None))]  # fmt: skip
    assert torch.equal(*rows)


@unknown
def test_alone_an_unknown_optimizer_is_torch_s(name):
    """One worker a rank: over the model's own parameters, all at once, after backward, to the last bit."""
    task = Matrices()
    replicas, algorithm = build(task, 1, "sgp", UNKNOWN[name])
    assert type(algorithm.inner) is WholeOptimizer
    plain = task.model()
    optimizer = UNKNOWN[name](plain.parameters())
    for step in range(4):
        (batch,) = task.batches(step, [0], (0, 1))
        for model, each in ((replicas.models[0], algorithm), (plain, None)):
            algorithm.start(0.1 / (step + 1)) if each else optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            (each or optimizer).step()
        assert all(torch.equal(p, q) for p, q in zip(replicas.models[0].parameters(), plain.parameters()))


def whole_on_ranks(name, kind):
    """Five steps of SGP + SlowMo; saved after three of them, and gone on with from there elsewhere."""
    make = lambda: build(Matrices(), 2, "sgp", UNKNOWN[name], lambda b: SlowMo(b, 2, beta=0.5, buffers=kind), bucket_cap_mb=1e-5)
    replicas, algorithm = make()
    run(Matrices(), replicas, algorithm, 3, 0.1)
    saved = copied(state_dict(algorithm))
    others, fresh = make()
    load_state_dict(fresh, saved)
    return run(Matrices(), replicas, algorithm, 5, 0.1), run(Matrices(), others, fresh, 5, 0.1), len(replicas.buckets)


def by_hand(name, kind):
    """The same with plain torch: two models, the half of each given to the other, and line 7 and 8 every second step."""
    task = Matrices()
    models = [task.model() for _ in range(2)]
    optimizers = [UNKNOWN[name](model.parameters()) for model in models]
    vector = lambda model: torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    x0, u = vector(models[0]), 0.0
    for step in range(5):
        for i, (model, optimizer) in enumerate(zip(models, optimizers)):
            optimizer.zero_grad()
            task.loss(model, next(task.batches(step, [i], (0, 1)))).backward()
            optimizer.step()
        mean = sum(map(vector, models)) / 2  # a round of two workers is their average
        if step % 2:
            u = 0.5 * u + (x0 - mean) / 0.1
            mean = x0 = x0 - 0.1 * u
            if kind == "reset":
                optimizers = [UNKNOWN[name](model.parameters()) for model in models]
            for p, q in zip(*(model.parameters() for model in models)) if kind == "average" else ():
                for key, value in optimizers[0].state[p].items():
                    other = optimizers[1].state[q][key]
                    if value.ndim:
                        value.copy_((value + other) / 2)
                        other.copy_(value)
        for model in models:
            torch.nn.utils.vector_to_parameters(mean.clone(), model.parameters())
    return mean


@unknown
@pytest.mark.parametrize("kind", ["maintain", "reset", "average"])
def test_an_unknown_optimizer_on_ranks_of_their_own(name, kind):
    for rows, resumed, buckets in spawn(whole_on_ranks, 2, name, kind):
        assert torch.equal(rows, resumed) and buckets == 2
        # Muon computes in bfloat16: what differs in the last bit of float64 may round to another number there
        tolerance = {"Muon": 1e-2}.get(name, 1e-11)
        torch.testing.assert_close(rows[0], by_hand(name, kind), rtol=tolerance, atol=tolerance)


def own_and_sgd(base, options):
    """Of each: the rows after five steps, two of them slow."""
    return [
        run(Matrices(), *build(Matrices(), 2, base, make, lambda b: SlowMo(b, 2, beta=0.5), bucket_cap_mb=1e-5, **options), 5, 0.1)
        for make in (UNKNOWN["Own"], lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    ]


@pytest.mark.parametrize("loss_scale", [1.0, 128.0])
@pytest.mark.parametrize("base", [base for base in BASES if base != "sgp_double"])
def test_stepped_whole_is_stepped_bucket_by_bucket(base, loss_scale):
    """A class derived from SGD is SGD: what is mixed is taken before the step, and gradients are unscaled before it."""
    for whole, buckets in spawn(own_and_sgd, 2, base, {"loss_scale": loss_scale}):
        assert torch.equal(whole, buckets)


def test_buffers_of_an_unknown_optimizer_cannot_be_gossiped():
    with pytest.raises(ValueError, match="gossip_buffers=True needs an elementwise optimizer, Own is not known to be one"):
        build(Matrices(), 1, "sgp_double", UNKNOWN["Own"])


def test_an_unknown_optimizer_cannot_step_master_weights():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())
    optimizer = Own(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="cannot step master weights: give all parameters one dtype"):
        slowmo.LocalSGD(Replicas(model, Cluster(1), optimizer.param_groups), optimizer)


def test_an_optimizer_over_something_else_is_refused():
    replicas = Replicas(quadratic(1).model(), Cluster(1))
    with pytest.raises(ValueError, match=r"a str: build a torch\.optim optimizer over model\.parameters\(\)"):
        slowmo.LocalSGD(replicas, "sgd")
    with pytest.raises(ValueError, match="pass it optimizer.param_groups"):
        slowmo.LocalSGD(replicas, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    model = Several(1).model()
    optimizer = two_groups(sgd)(model.parameters())
    with pytest.raises(ValueError, match="other parameters or groups than Replicas was given: pass it optimizer.param_groups"):
        slowmo.LocalSGD(Replicas(model, Cluster(1)), optimizer)  # of one group


def test_groups_of_other_parameters_are_refused():
    model = Several(1).model()
    with pytest.raises(ValueError, match="lacks 1 of the model's trainable parameters and holds 1 that are not"):
        Replicas(model, Cluster(1), [{"params": [model.a, model.b, torch.nn.Parameter(torch.zeros(1))]}])
    model.c.requires_grad_(False)
    Replicas(model, Cluster(1), [{"params": [model.a, model.b, model.c]}])  # a frozen one may stand in a group
