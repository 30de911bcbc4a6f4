"""A claim of one's own, judged by your runs: block momentum ends at a lower loss than plain averages."""

from scipy import stats

from results.store import MINE, Runs

WITH, WITHOUT = "spirals_block_momentum", "spirals_block_momentum,outer=average"


def judge(runs: Runs) -> str:
    slow, plain = (runs.values(run, "validation_loss_last") for run in (WITH, WITHOUT))
    change = (slow - plain).dropna()  # paired by seed
    if len(change) < 2:
        return "not run: two seeds of each are needed"
    low, high = stats.t.interval(0.95, len(change) - 1, change.mean(), change.sem())
    verdict = "supported" if high < 0 else "contradicted" if low > 0 else "undecided"
    return f"{verdict}: {change.mean():+.3f}, 95% interval {low:+.3f} to {high:+.3f}, {len(change)} seeds"


if __name__ == "__main__":
    print(judge(Runs(MINE)))
