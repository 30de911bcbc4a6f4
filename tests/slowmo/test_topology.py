"""Graphs: every round is column-stochastic, and the one-peer exponential graph is the paper's."""

import functools

import pytest
import torch
from helpers import irregular
from hypothesis import given, settings
from hypothesis import strategies as st

from slowmo import Complete, Exponential, Mixing, Ring, mixing_matrix
from slowmo.topology import is_symmetric

GRAPHS = {
    "exponential": Exponential, "two_peer": functools.partial(Exponential, peers=2), "ring": Ring, "complete": Complete,
    "mixing": irregular,
}  # fmt: skip


def rounds(m):
    """Hops of the one-peer graph, counted: 1, 2, 4, ... up to m - 1."""
    count = 0
    while 2**count <= m - 1:
        count += 1
    return count


def steps(name, m):
    return range(rounds(m) + 1) if name in ("exponential", "two_peer") else range(1)


@pytest.mark.parametrize("name", GRAPHS)
def test_every_round_gives_away_exactly_what_there_is(name):
    for m in range(1, 41):
        graph = GRAPHS[name](m)
        for step in steps(name, m):
            matrix = mixing_matrix(graph, step)
            assert matrix.shape == (m, m) and (matrix >= 0).all() and (matrix.diagonal() > 0).all()
            torch.testing.assert_close(matrix.sum(0), torch.ones(m, dtype=torch.float64), rtol=0, atol=1e-14)
            if name != "mixing":  # the regular ones: weights stay 1
                torch.testing.assert_close(matrix.sum(1), torch.ones(m, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", GRAPHS)
def test_mixing_matrix_is_what_the_hops_say(name):
    for m in (1, 2, 3, 7):
        graph = GRAPHS[name](m)
        for step in steps(name, m):
            x, expected = torch.arange(1.0, m + 1, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
            for hop, share in graph(step).items():
                for j in range(m):
                    expected[(j + hop) % m] += x[j] * (share[j] if isinstance(share, tuple) else share)
            torch.testing.assert_close(mixing_matrix(graph, step) @ x, expected)


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("p", range(7))
def test_p_rounds_of_two_to_the_p_workers_are_the_average(p, first):
    m = 2**p
    product = torch.eye(m, dtype=torch.float64)
    for step in range(first, first + p):
        product = mixing_matrix(Exponential(m), step) @ product
    assert (product == 1 / m).all()  # powers of two: no rounding
    assert p == 0 or not (mixing_matrix(Exponential(m), first + p - 1) == 1 / m).all() or p == 1  # and not before


def test_hop_of_a_step():
    for m in range(2, 5001):
        graph, L = Exponential(m), rounds(m)
        assert [graph(k) for k in range(L + 2)] == [{0: 0.5, 2 ** (k % L): 0.5} for k in range(L + 2)]
        assert 2 ** (L - 1) < m  # nobody is its own peer


@pytest.mark.parametrize("m, hops", [
    (2, [1, 1]), (3, [1, 2]), (4, [1, 2]), (5, [1, 2, 4]), (7, [1, 2, 4]), (8, [1, 2, 4]), (9, [1, 2, 4, 8]),
    (31, [1, 2, 4, 8, 16]), (32, [1, 2, 4, 8, 16]), (33, [1, 2, 4, 8, 16, 32]),
])  # fmt: skip
def test_one_cycle_of_hops(m, hops):
    graph = Exponential(m)
    assert [hop for k in range(len(hops)) for hop in graph(k) if hop] == hops
    assert graph(10 * len(hops)) == graph(0) and graph(1_000_000 * len(hops) + 1) == graph(1)


@pytest.mark.parametrize("name", ["exponential", "two_peer", "ring", "complete"])
def test_one_worker_keeps_everything(name):
    assert [GRAPHS[name](1)(step) for step in (0, 1, 7)] == [{0: 1.0}] * 3


@pytest.mark.parametrize("name", ["exponential", "two_peer", "ring", "complete"])
def test_two_and_three_workers_have_no_edge_twice(name):
    assert all(GRAPHS[name](2)(step) == {0: 0.5, 1: 0.5} for step in range(4))
    three = {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}
    if name != "exponential":
        assert all(GRAPHS[name](3)(step) == three for step in range(4))


def test_two_peers_are_consecutive_hops():
    third = 1 / 3
    assert [Exponential(16, peers=2)(step) for step in range(3)] == [
        {0: third, 1: third, 2: third}, {0: third, 4: third, 8: third}, {0: third, 1: third, 2: third}]  # fmt: skip
    # three hops: the pair walks on
    assert [list(Exponential(8, peers=2)(step)) for step in range(4)] == [[0, 1, 2], [0, 4, 1], [0, 2, 4], [0, 1, 2]]
    with pytest.raises(ValueError, match="set peers=1 or 2"):
        Exponential(8, peers=0)


def test_ring_and_complete():
    expected = torch.eye(5, dtype=torch.float64)
    assert torch.equal(mixing_matrix(Ring(5), 3), (expected + expected.roll(1, 0) + expected.roll(-1, 0)) / 3)
    assert (mixing_matrix(Complete(5), 3) == 1 / 5).all()


def symmetric(graph, step):
    matrix = mixing_matrix(graph, step)
    return torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("name", GRAPHS)
def test_is_symmetric(name):
    answers = set()
    for m in range(1, 20):
        graph = GRAPHS[name](m)
        for step in steps(name, m):
            assert is_symmetric(graph, step) == symmetric(graph, step), (m, step)
            answers.add((m > 2, is_symmetric(graph, step)))
    assert (True, True) in answers if name in ("ring", "complete") else (True, False) in answers
    assert (True, False) not in answers or name not in ("ring", "complete")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(m=st.integers(2, 6), seed=st.integers(0, 10_000), even=st.booleans())
def test_is_symmetric_of_any_matrix(m, seed, even):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(m, m, dtype=torch.float64, generator=generator).div(m)
    matrix.masked_fill_(torch.rand(m, m, generator=generator) < 0.4, 0)
    if even:
        matrix = (matrix + matrix.T) / 2
    matrix.fill_diagonal_(0)
    matrix += torch.diag(1 - matrix.sum(0))
    graph = Mixing(m, matrix)
    torch.testing.assert_close(mixing_matrix(graph, 0), matrix, rtol=0, atol=0)
    assert is_symmetric(graph, 0) == symmetric(graph, 0) == torch.equal(matrix, matrix.T)


def test_mixing_takes_its_matrices_in_turn():
    matrices = [[[1.0, 0.25], [0.0, 0.75]], [[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.0], [0.5, 1.0]]]
    graph = Mixing(2, matrices)
    assert [mixing_matrix(graph, step).tolist() for step in range(6)] == matrices * 2
    assert mixing_matrix(Mixing(2, matrices[0]), 5).tolist() == matrices[0]
    assert list(Mixing(3, torch.eye(3))(0)) == [0]  # a round without messages sends none


@pytest.mark.parametrize(
    "matrices, remedy",
    [
        ([[0.5, 0.5, 0.0], [0.5, 0.5, 1.0]], r"give \[2, 2\]"),
        (torch.eye(3), r"\[3, 3\] for 2 workers: give \[2, 2\]"),
        ([[0.5, 0.5], [0.5, 0.6]], "columns that sum to 1"),
        ([[0.5, 0.3], [0.5, 0.3]], "columns that sum to 1"),
        ([[0.5, 0.5], [0.4, 0.5]], "columns that sum to 1"),  # rows may sum to anything, columns may not
        ([[1.5, 0.5], [-0.5, 0.5]], "entries >= 0"),
        ([[0.0, 0.5], [1.0, 0.5]], "positive diagonal"),
        ([[[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.4]]], "columns that sum to 1"),  # the second of two
        ([[float("nan"), 0.5], [0.5, 0.5]], "columns that sum to 1"),
    ],
)
def test_mixing_refuses(matrices, remedy):
    with pytest.raises(ValueError, match=remedy):
        Mixing(2, matrices)
