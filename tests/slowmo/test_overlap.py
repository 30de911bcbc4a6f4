"""A bucket that is stepped and sent in backward gives the bits of one that is stepped late, whatever the order of its gradients."""

import itertools

import pytest
import torch
import torch.distributed as dist
from branches import Shuffled, biases_apart
from helpers import BASES as EVERY
from helpers import average, build, irregular, run, sgd
from processes import spawn

import slowmo
from slowmo.cluster import Cluster
from slowmo.outer import Average, NesterovOuter, SlowMo, Streaming

STEPS, TAU = 5, 2  # two slow steps and a part of a round
SMALL = 1e-5  # MiB: every parameter is a bucket; with the default all of them are one
OPTIMIZERS = {
    "nesterov": lambda parameters: sgd(parameters, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": biases_apart(lambda groups: torch.optim.AdamW(groups, lr=0.02)),
}
BASES = EVERY | {
    "sgp_rounded": lambda replicas, optimizer, **more: slowmo.SGP(replicas, optimizer, comm_dtype="bfloat16", **more),
    "osgp_in_turn": lambda replicas, optimizer, **more: slowmo.OSGP(
        replicas, optimizer, irregular(replicas.cluster.num_workers, in_turn=True), comm_dtype="float16", **more
    ),
}
OUTERS = {
    "none": None,
    "average": lambda base: Average(base, TAU),
    "slowmo-reset": lambda base: SlowMo(base, TAU, beta=0.6),
    "slowmo-maintain": lambda base: SlowMo(base, TAU, alpha=0.9, beta=0.6, buffers="maintain"),
    "slowmo-average": lambda base: SlowMo(base, TAU, beta=0.6, buffers="average"),
    "noaverage": lambda base: SlowMo(base, TAU, beta=0.6, exact=False),
    "diloco": lambda base: NesterovOuter(base, TAU, alpha=0.7, beta=0.9, buffers="maintain"),
    "streaming": lambda base: Streaming(base, TAU, alpha=0.7),
}


def cases(m):
    """Every base with every outer; bucket sizes and numbers of backward passes take turns, with two workers the optimizers too."""
    for (i, base), (j, outer), (k, optimizer) in itertools.product(*(enumerate(part) for part in (BASES, OUTERS, OPTIMIZERS))):
        if (outer != "streaming" or base == "local_sgd") and (m > 2 or k == (i + j) // 3 % 2):
            yield base, outer, optimizer, *((SMALL, 1), (SMALL, 2), (25.0, 1))[(i + j + k) % 3]


def rate(step):
    return 0.05 / (1 + step // 2)


def trained(cluster, base, outer, optimizer, size, accumulate, overlap):
    """(rows, u, w, how many buckets advanced before `step`, over all steps)."""
    task = Shuffled(accumulate)
    replicas, algorithm = build(task, cluster.num_workers, BASES[base], OPTIMIZERS[optimizer], OUTERS[outer], cluster, size, accumulate,
                                num_fragments=2 if outer == "streaming" else 1, overlap=overlap)  # fmt: skip
    early, finish = [], algorithm.base.handover.finish
    algorithm.base.handover.finish = lambda *a: early.append(algorithm.base.handover.first_waiting) or finish(*a)
    rows = run(task, replicas, algorithm, STEPS, rate, vectorize=False)
    slow = [block for blocks in (algorithm.slow or {}).values() for block in blocks]
    return [rows, *slow, getattr(algorithm.base, "w", torch.ones(1))], early, len(replicas.buckets)


def compared(m):
    """On each rank: the workers here, and of each case (the bits are the same, rows, buckets advanced in backward, buckets)."""
    cluster, results = Cluster(m), {}
    for case in cases(m):
        (late, none, _), (early, some, buckets) = (trained(cluster, *case, overlap) for overlap in (False, True))
        same = len(late) == len(early) and all(torch.equal(a, b) for a, b in zip(late, early))
        results[case] = same, early[0], sum(none), some, buckets
    return cluster.local_workers, results


def alone(m):
    cluster = Cluster(m)
    return {case: trained(cluster, *case, False)[0][0] for case in cases(m) if case[3] == SMALL}


@pytest.mark.parametrize("processes, m", [(2, 2), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((2, 4), (4, 2)))])
def test_in_backward_is_late_to_the_last_bit(processes, m):
    whole = alone(m)
    for workers, results in spawn(compared, processes, m, timeout=250):
        for case, (same, rows, none, some, buckets) in results.items():
            base, outer, optimizer, size, _ = case
            assert same, case
            assert none == 0, case
            assert buckets == (8 if size == SMALL else 1), case
            # not a test of nothing: where something can be stepped in backward, it is
            exact_at = {TAU - 1, 2 * TAU - 1} if outer not in ("none", "noaverage") else set()
            for step, advanced in enumerate(some):
                if base.startswith(("osgp", "dpsgd")):
                    # their messages have until `step`; they send nothing where an exact average follows
                    expected = buckets - (processes > m) if step in exact_at else 0
                elif base == "allreduce":
                    expected = 0 if step in exact_at else None  # as many as there was time for
                else:
                    expected = buckets - (processes > m)  # the youngest mean inside a worker is not waited for
                assert expected is None or advanced == expected, (case, step)
            if size == SMALL:  # rows of one process, but for the order of sums; Adam divides by roots of what may be small
                tolerance = 1e-11 if optimizer == "nesterov" else 1e-6
                torch.testing.assert_close(rows, whole[case][list(workers)], rtol=tolerance, atol=tolerance, msg=lambda t: f"{case}: {t}")


def issued(m):
    """Of each base: the collectives of this rank in the order in which it starts them, each with its group's name."""
    cluster, calls = Cluster(m), []
    groups = {cluster._inside: "inside", cluster._across: "across"}

    def recorded(name):
        real = getattr(dist, name)

        def call(*arguments, **options):
            group = arguments[0][0].group if name == "batch_isend_irecv" else options.get("group")
            calls.append((name, groups.get(group, "all")))
            return real(*arguments, **options)

        setattr(dist, name, call)

    for name in ("all_reduce", "broadcast", "batch_isend_irecv"):
        recorded(name)
    found = {}
    for base in BASES:
        calls.clear()
        trained(cluster, base, "slowmo-reset", "nesterov", SMALL, 1, True)
        found[base] = list(calls)
    return found


def test_ranks_of_a_worker_start_collectives_of_all_groups_in_one_order():
    """Whatever the order of gradients: nccl can wait for ever where one rank starts two groups' the other way around."""
    first, second, *others = spawn(issued, 4, 2)
    assert others == [first, second]
    for base, calls in first.items():  # a worker's second rank has no part of a mean of one number
        left = iter(calls)
        assert all(call in left for call in second[base]), base
    assert {"inside", "across"} <= {group for _, group in first["allreduce"] + first["osgp"]}
    sends = [k for k, (name, _) in enumerate(first["osgp"]) if name == "batch_isend_irecv"]
    inside = [k for k, (_, group) in enumerate(first["osgp"]) if group == "inside"]
    assert len(sends) > 8 and min(inside) < max(sends)  # both are under way in a step


@pytest.mark.parametrize("base", BASES)
def test_in_one_process_too(base):
    for outer, optimizer, accumulate in [("none", "nesterov", 1), ("slowmo-average", "adamw", 3)]:
        late, early = (trained(Cluster(3), base, outer, optimizer, 25.0, accumulate, overlap) for overlap in (False, True))
        assert all(torch.equal(a, b) for a, b in zip(late[0], early[0], strict=True)), (outer, optimizer, accumulate)
        assert sum(early[1]) > 0 or base.startswith(("osgp", "dpsgd")) and outer in ("none", "noaverage")


def test_average_sees_what_a_step_left():
    replicas, algorithm = build(Shuffled(), 3, "sgp", OPTIMIZERS["adamw"], OUTERS["slowmo-reset"], overlap=True)
    rows = run(Shuffled(), replicas, algorithm, 4, rate)
    torch.testing.assert_close(average(algorithm), rows.mean(0, keepdim=True), rtol=1e-14, atol=1e-14)
