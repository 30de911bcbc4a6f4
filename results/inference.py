"""How runs decide: differences with their errors, tests at looks, equivalence, Holm. The rules are results/protocol.md's.

`python -m results.inference` simulates what the protocol promises: the overall level of the looks, and the power at the paper's gain.
"""

import bisect
import dataclasses
import functools
import math

import numpy as np
import pandas as pd
from scipy import stats

LOOKS = (5, 10, 20, 40)  # seeds of a cell at which a claim is judged
LEVEL, NOMINAL = 0.05, 0.0148  # over all looks; of each, so that all together have LEVEL: see `levels`
POWER = 0.8  # of the number of seeds that an undecided claim is told it would take
MOST = 10**6  # such a number is no larger


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A difference between two cells, by Student's t. deviation: of one seed's difference, so that error = deviation / sqrt(seeds)."""

    mean: float
    deviation: float
    seeds: float
    freedom: int

    @property
    def error(self) -> float:
        return self.deviation / math.sqrt(self.seeds)

    def half(self, level: float = 0.95) -> float:
        """Half the two-sided confidence interval."""
        return float(stats.t.ppf(0.5 + level / 2, self.freedom)) * self.error

    def above(self, bound: float) -> float:
        """One-sided p of "the true difference is not above `bound`"."""
        if math.isinf(bound):
            return 0.0 if bound < 0 else 1.0
        if not self.error:  # all seeds alike
            return 0.0 if self.mean > bound else 1.0
        return float(stats.t.sf((self.mean - bound) / self.error, self.freedom))

    def below(self, bound: float) -> float:
        return dataclasses.replace(self, mean=-self.mean).above(-bound)

    def within(self, low: float, high: float) -> float:
        """p of "the true difference lies within": two one-sided tests where there are two bounds, two-sided where there is one."""
        p = max(self.above(low), self.below(high))
        return p if math.isfinite(low) and math.isfinite(high) else min(1.0, 2 * p)

    def outside(self, low: float, high: float) -> float:
        """p of "the true difference lies beyond a bound", two-sided."""
        return min(1.0, 2 * min(self.below(low), self.above(high)))

    def seeds_for(self, low: float, high: float, level: float = NOMINAL, least: int = LOOKS[0]) -> int:
        """Seeds, from `least` to MOST, after which `within` or `outside` shows at this level with POWER, were the estimate the truth."""
        distances = [abs(self.mean - bound) for bound in (low, high) if math.isfinite(bound)]
        if not self.deviation or not min(distances):
            return least if min(distances) else MOST
        both = math.isfinite(low) and math.isfinite(high) and low < self.mean < high

        def power(seeds: int) -> float:
            freedom = self.freedom * (seeds - 1) / (self.seeds - 1)
            reach = stats.t.isf(level if both else level / 2, freedom)
            found = [stats.nct.sf(reach, freedom, distance * math.sqrt(seeds) / self.deviation) for distance in distances]
            return found[0] + found[1] - 1 if both else min(found)  # both tests have to pass; else the nearer bound

        return bisect.bisect_left(range(MOST), POWER, least, key=power)


def paired(terms: list[tuple[int, pd.Series]]) -> Estimate:
    """Of a sum of cells, each with its sign, seed by seed."""
    seeds = functools.reduce(pd.Index.intersection, (cell.index for _, cell in terms))
    change = sum(sign * cell.loc[seeds] for sign, cell in terms)
    return Estimate(float(change.mean()), float(change.std()), len(change), len(change) - 1)


def pooled(terms: list[tuple[int, pd.Series]], cells: list[pd.Series]) -> Estimate:
    """Of a sum of cells, not paired; the deviation is that of all `cells`, a mean of variances weighted by degrees of freedom."""
    cells = [cell for cell in cells if len(cell) > 1]
    freedom = sum(len(cell) - 1 for cell in cells)
    variance = sum(float(cell.var()) * (len(cell) - 1) for cell in cells) / freedom
    seeds = len(terms) / sum(1 / len(cell) for _, cell in terms)
    return Estimate(sum(sign * float(cell.mean()) for sign, cell in terms), math.sqrt(len(terms) * variance), seeds, freedom)


def holm(p: list[float], level: float = NOMINAL) -> list[float]:
    """What each of these p, one a claim, is held to, so that the chance of any false one is `level`; 0 where a smaller one failed."""
    held, passed = [0.0] * len(p), True
    for rank, k in enumerate(sorted(range(len(p)), key=lambda k: p[k])):
        held[k] = level / (len(p) - rank) * passed
        passed = p[k] < held[k]
    return held


def levels(gain: float = 0.0, deviation: float = 1.0, nominal: float = NOMINAL, cells: int = 1, sides: int = 2, draws: int = 40_000,
           looks=LOOKS) -> list[float]:  # fmt: skip
    """Share of simulated studies that have found a difference by each look, when it is `gain` and one seed's difference has `deviation`.

    cells: 1 for paired differences; more for cells that pool their deviation. sides: 1 counts gains only, as each of two one-sided tests.
    """
    rng, found = np.random.default_rng(1), np.zeros(draws, bool)
    shares = []
    if cells == 1:
        values = rng.normal(gain, deviation, (draws, 1, looks[-1]))
        scale = 1.0
    else:
        values = rng.normal(0, deviation / math.sqrt(2), (draws, cells, looks[-1]))
        values[:, 0] += gain
        scale = 2.0
    for n in looks:
        seen = values[..., :n]
        mean, variance = seen.mean(-1), seen.var(-1, ddof=1).mean(-1)
        difference = mean[:, 0] - (mean[:, 1] if cells > 1 else 0)
        t = difference / np.sqrt(scale * variance / n)
        found |= (np.abs(t) if sides == 2 else t) > stats.t.isf(nominal / sides, cells * (n - 1))
        shares.append(float(found.mean()))
    return shares


def main() -> None:
    print(f"overall level of looks at {', '.join(map(str, LOOKS))} seeds, each at p < {NOMINAL}:")
    for what, cells in (("paired", 1), ("7 cells, pooled deviation", 7)):
        print(f"  {what}: {levels(cells=cells)[-1]:.4f} two-sided, {levels(cells=cells, sides=1)[-1]:.4f} one-sided")
    for claims in (3, 6):
        share = levels(nominal=NOMINAL / claims, draws=200_000)[-1]
        print(f"  first of Holm's {claims}, p < {NOMINAL}/{claims}: {share:.4f}, wanted {LEVEL / claims:.4f}")
    for gain, deviation in ((0.42, 0.85), (1.47, 0.85), (1.47, 1.47)):  # as planned; and as twenty seeds have it
        print(f"power at a gain of {gain}, the deviation of a difference {deviation}, by look:")
        print("  " + ", ".join(f"{share:.2f} at {n}" for n, share in zip(LOOKS, levels(gain, deviation, cells=7))))


if __name__ == "__main__":
    main()
