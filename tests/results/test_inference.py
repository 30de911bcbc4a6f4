"""The arithmetic of verdicts, on numbers whose answer is known by hand, and the promises of the protocol, simulated."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from results.inference import LEVEL, LOOKS, NOMINAL, Estimate, holm, levels, paired, pooled


def series(*values, first=1):
    return pd.Series(values, index=range(first, first + len(values)), dtype=float)


def test_a_paired_difference_is_scipy_s():
    run, against = series(5.0, 7.0, 6.5, 8.0), series(4.0, 6.5, 6.0, 6.0)
    e = paired([(1, run), (-1, against)])
    by_scipy = stats.ttest_rel(run, against)
    assert e.mean == 1.0 and min(1, 2 * e.above(0)) == pytest.approx(by_scipy.pvalue)
    assert e.half() == pytest.approx((by_scipy.confidence_interval().high - by_scipy.confidence_interval().low) / 2)
    shifted = pd.concat([run, series(99.0, first=9)])  # a seed without its fellow is no pair
    assert paired([(1, shifted), (-1, against)]) == e


def test_two_cells_that_pool_are_scipy_s():
    run, against = series(5.0, 7.0, 6.5, 8.0), series(4.0, 6.5, 6.0, 6.0)
    e = pooled([(1, run), (-1, against)], [run, against])
    assert 2 * e.above(0) == pytest.approx(stats.ttest_ind(run, against).pvalue) and e.freedom == 6


def test_the_pooled_deviation_by_hand():
    """Variances 2 and 8 with one and two degrees of freedom: (2 + 16) / 3 = 6; a difference of two cells of four: sqrt(6 (1/4 + 1/4))."""
    cells = [series(1, 3), series(0, 2.0, 2 + 2 * math.sqrt(3) - 1.0)]
    cells[1] = series(-math.sqrt(8), 0, math.sqrt(8))
    four = series(0, 0, 1, 1)
    e = pooled([(1, four + 5), (-1, four)], [*cells, series(7)])  # a cell of one seed knows no deviation
    assert e.mean == 5 and e.freedom == 3 and e.error == pytest.approx(math.sqrt(6 * 0.5))
    double = pooled([(1, four), (-1, four), (-1, four), (1, four)], cells)
    assert double.error == pytest.approx(math.sqrt(6))


def test_two_one_sided_tests():
    """A difference of 0.2, error 0.1, 10 degrees: within ±0.5 by the nearer bound, three errors away."""
    e = Estimate(0.2, 0.3, 9, 10)
    assert e.within(-0.5, 0.5) == pytest.approx(stats.t.sf(3, 10))
    assert e.within(0, math.inf) == pytest.approx(2 * stats.t.sf(2, 10)) and e.within(-math.inf, 0) == 1
    assert e.outside(-math.inf, 0) == pytest.approx(2 * stats.t.sf(2, 10)) and e.outside(0, math.inf) == 1
    assert e.outside(-0.1, 0.1) == pytest.approx(2 * stats.t.sf(1, 10))
    assert Estimate(1, 0, 5, 4).within(0, math.inf) == 0 and Estimate(-1, 0, 5, 4).within(0, math.inf) == 1


def test_seeds_that_a_claim_would_take():
    """By scipy's noncentral t, of pairs: the first number with a power of 80%."""
    gain, deviation = 0.42, 0.85

    def power(n):
        return stats.nct.sf(stats.t.isf(NOMINAL / 2, n - 1), n - 1, gain / deviation * math.sqrt(n))

    exact = next(n for n in range(5, 100) if power(n) >= 0.8)
    assert Estimate(gain, deviation, 5, 4).seeds_for(0, math.inf) == exact == 48
    assert Estimate(4.0, 0.85, 5, 8).seeds_for(0, math.inf) == LOOKS[0]
    assert Estimate(0.0, 1.0, 5, 8).seeds_for(0, math.inf) == 10**6 and Estimate(1.0, 0.0, 5, 8).seeds_for(0, math.inf) == LOOKS[0]
    assert Estimate(3.0, 1.0, 5, 8).seeds_for(-1, 1) == Estimate(2.0, 1.0, 5, 8).seeds_for(-math.inf, 0)  # beyond the nearer bound


@pytest.mark.parametrize("truth", [0.0, 0.3, 0.9])
def test_seeds_that_equivalence_would_take(truth):
    """Of simulated studies with so many pairs both one-sided tests pass in 80%, in fewer with four fifths of the pairs."""
    rng = np.random.default_rng(0)
    wanted = Estimate(truth, 2.0, 5, 4).seeds_for(-1, 1)

    def power(n):
        values = rng.normal(truth, 2.0, (4000, n))
        mean, error, reach = values.mean(1), values.std(1, ddof=1) / math.sqrt(n), stats.t.isf(NOMINAL, n - 1)
        return np.mean((mean - reach * error > -1) & (mean + reach * error < 1))

    assert power(wanted) == pytest.approx(0.8, abs=0.03) and power(wanted * 4 // 5) < 0.75


def test_holm_by_hand():
    assert holm([0.001, 0.02, 0.03, 0.9], 0.05) == [0.0125, pytest.approx(0.05 / 3), 0, 0]  # 0.02 fails, so 0.03 is not asked
    assert holm([0.024, 0.001], 0.05) == [0.05, 0.025] and holm([]) == []


@pytest.mark.parametrize("cells", [1, 7])
@pytest.mark.parametrize("sides", [1, 2])
def test_the_looks_together_have_their_level(cells, sides):
    """Of 40,000 studies without any difference; the simulation's own error is 0.001. The four looks alone would be 0.056."""
    found = levels(cells=cells, sides=sides)
    assert NOMINAL * 0.8 < found[0] < NOMINAL * 1.2 and 0.038 < found[-1] < LEVEL + 0.001
    assert found == sorted(found)


def test_an_uncorrected_level_would_fail():
    assert levels(nominal=LEVEL)[-1] > 0.12


def test_the_power_that_the_protocol_promises():
    shares = levels(0.42, 0.85, cells=7)
    assert shares[0] < 0.12 and 0.74 < shares[-1] < 0.82
    assert levels(0.42, 0.85, nominal=LEVEL, looks=(35,))[-1] == pytest.approx(0.8, abs=0.02)  # about 35 pairs at a single look
