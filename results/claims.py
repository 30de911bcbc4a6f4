"""The paper's claims, each judged by runs: supported, contradicted, equivalent within a margin, undecided, or not run.

The rules are results/protocol.md's, the arithmetic is inference.py's. A claim of several parts is supported when each part is, and
contradicted when one is.
"""

import dataclasses
import functools
import itertools
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from results import cost_model, inference, timing
from results.store import COLUMNS as LISTS
from results.store import NETWORK, Runs, Store
from results.tables import (
    BLEU,
    BLEU_TEST,
    LABELS,
    LAST,
    LOSS_LAST,
    LOSS_TIERS,
    NLL,
    SMALL,
    TEXT,
    TITLES,
    estimate,
    format_estimate,
    over_allreduce,
    run_name,
    sweep,
    table1,
)

SUPPORTED, CONTRADICTED, EQUIVALENT, UNDECIDED, NOT_RUN = "supported", "contradicted", "equivalent", "undecided", "not run"
NO_RUNS = "no runs"  # the evidence of what is not run; else it has too few seeds
PRIMARY, SECONDARY = "primary", "secondary"
COST, OURS = "cost", "question of ours"
COMPUTED = "computed"
PACE = 5.0  # per cent of an iteration
HOLDS = 1.25  # an AllReduce that takes so many times what the model says is slowed by the machine that emulates the hosts
# what counts as on par: per cent, BLEU, a tenth of a training loss, NLL; losses that the paper's SlowMo changes by less, by data
MARGINS = {LAST.name: 1.0, BLEU.name: 0.5, BLEU_TEST.name: 0.5, LOSS_LAST.name: math.log(1.1), NLL[True][0].name: 0.03}
LOSS_MARGINS = {"wmt16": math.log(1.01), "imagenet": math.log(1.03)}
ROOT = Path(__file__).parent.parent
COLUMNS = LISTS["claims"]


def main(store: Store, again: bool = True) -> None:
    """Judge every claim on every data set, write data/claims.csv, print the verdicts.

    again: compute what needs no runs even if its verdicts stand there already.
    """
    judged = stored(Runs(store))
    if again or not (judged["data"] == "quadratic").any():
        judged = pd.concat([judged[judged["data"] != "quadratic"], computed(), speedup(), drift(), momentum()], ignore_index=True)
    store.write("claims", judged)
    for line in decided(judged)[0].itertuples():
        print(f"{line.verdict:16}{line.claim} [{line.data}]: {line.evidence}")


@dataclasses.dataclass(frozen=True)
class Part:
    """A difference of cells, `terms` of (sign, run), that a claim says to lie between `low` and `high`."""

    what: str
    terms: tuple
    metric: str
    low: float
    high: float

    @property
    def runs(self) -> str:
        return " ".join(f"{'+' if sign > 0 else '−'} {run}" for sign, run in self.terms)[2:]


@dataclasses.dataclass(frozen=True)
class Claim:
    text: str
    kind: str
    parts: tuple
    turns: bool = False  # of a sweep: that it is not monotone; the parts are neighbours


def on_runs(runs: Runs) -> pd.DataFrame:
    """The claims that runs decide: a line for each, and each data set."""
    lines = []
    for data in TITLES:
        for found in judgements(data, runs):
            sources = "; ".join(part.runs for part in found.claim.parts)
            lines.append((found.claim.text, data, found.claim.kind, found.verdict, found.evidence(), sources))
    return pd.DataFrame(lines, columns=COLUMNS)


def judgements(data: str, runs: Runs) -> list["Judgement"]:
    """Of each claim on one data set, look by look: at each, Holm's levels over all its primary claims, those that have not reached it
    too. What a look decided stays."""
    made = [Judgement(claim, runs, data) for claim in claims(data)]
    primary = [found for found in made if found.claim.kind == PRIMARY]
    for look in inference.LOOKS:
        held = dict(zip(map(id, primary), inference.holm([found.p(look) for found in primary])))
        for found in made:
            found.decide(look, held.get(id(found), inference.NOMINAL))
    left = [found for found in primary if not found.decided]
    for found in left:
        found.level = inference.NOMINAL / len(left)  # the least that Holm will hold it to
    return made


class Judgement:
    """What the runs of one data set say about a claim.

    seeds: 1 to this number have ended in all its cells. looks: of each that is reached, before a seed that diverged, the three p-values
    of `tests`.
    """

    def __init__(self, claim: Claim, runs: Runs, data: str):
        self.claim, self.data = claim, data
        self.cells = {run: seeds_of(runs, run, part.metric) for part in claim.parts for _, run in part.terms}
        self.seeds = next(n for n in itertools.count() if any(n + 1 not in cell.index for cell in self.cells.values()))
        gone = [(seed, run) for run, cell in self.cells.items() for seed in cell.index[cell["status"] == "diverged"] if seed <= self.seeds]
        self.diverged = "{1} diverged with seed {0}".format(*min(gone)) if gone else ""
        whole = min(gone)[0] - 1 if gone else self.seeds
        self.estimates = [self.estimate(part, runs, data, whole) for part in claim.parts] if whole > 1 else []
        reached = [look for look in inference.LOOKS if look <= whole]
        self.looks = {look: self.tests([self.estimate(part, runs, data, look) for part in claim.parts]) for look in reached}
        self.verdict = UNDECIDED if reached or gone else NOT_RUN
        self.level, self._p = inference.NOMINAL, 1.0

    def p(self, look: int) -> float:
        """For Holm: of the look that decided, or of this one."""
        return self._p if self.decided else min(self.looks.get(look, (1.0,)))

    @property
    def decided(self) -> bool:
        return self.verdict not in (UNDECIDED, NOT_RUN)

    def decide(self, look: int, level: float) -> None:
        """level: Holm's, 0 where a smaller p has failed."""
        if self.verdict != UNDECIDED or look not in self.looks:
            return
        found = zip(self.looks[look], (SUPPORTED, CONTRADICTED, EQUIVALENT))
        self._p, self.verdict = next(((p, word) for p, word in found if p < level), (1.0, UNDECIDED))

    def estimate(self, part: Part, runs: Runs, data: str, seeds: int) -> inference.Estimate:
        """With the first so many seeds of each cell. Losses are paired, and training losses compared as ratios. The others have the
        deviation of all the data set's cells."""
        terms = [(sign, self.cells[run][part.metric].loc[1:seeds]) for sign, run in part.terms]
        return estimate(terms, part.metric, [runs.values(f"{data}_{cell}", part.metric).loc[1:seeds] for cell in table1(data)])

    def tests(self, estimates) -> tuple[float, float, float]:
        """p that the claim holds, that it does not, that there is no difference to speak of."""
        parts = self.claim.parts
        if self.claim.turns:
            up, down = [e.above(0) for e in estimates], [e.below(0) for e in estimates]
            return min(1.0, 2 * max(min(up), min(down)) * len(parts)), 2 * min(max(up), max(down)), 1.0
        support = max(e.within(part.low, part.high) for e, part in zip(estimates, parts))
        against = len(parts) * min(e.outside(part.low, part.high) for e, part in zip(estimates, parts))
        same = max(e.within(-(most := margin(self.data, part.metric)), most) for e, part in zip(estimates, parts))
        return support, min(1.0, against), same if self.directed else 1.0

    @property
    def directed(self) -> bool:
        """Whether the claim is that something is more, not that it is alike."""
        return all(math.isinf(part.low) or math.isinf(part.high) for part in self.claim.parts)

    def evidence(self) -> str:
        if self.diverged and self.verdict == UNDECIDED:
            return self.diverged
        if not self.looks:
            some = "seed 1 is missing" if all(len(cell) for cell in self.cells.values()) else NO_RUNS
            return f"{self.seeds} seed{'s' * (self.seeds > 1)}" if self.seeds else some
        said = "; ".join(f"{part.what} {format_estimate(e, part.metric)}" for e, part in zip(self.estimates, self.claim.parts))
        wanted = f"; then {self.diverged}" if self.diverged else ""
        if self.verdict == UNDECIDED:
            most = self.wanted()
            wanted = f"; would take about {most} seeds" if most <= 1000 else "; would take over 1000 seeds"
        elif self.verdict == EQUIVALENT:
            wanted = f"; within ±{margin(self.data, self.claim.parts[0].metric):.2g}" + wanted
        return f"{said} ({self.seeds} seeds{wanted})"

    def wanted(self) -> int:
        """Seeds that would probably decide, were the estimates the truth: either way, or that there is no difference to speak of."""
        later = next((look for look in inference.LOOKS if look > self.seeds), inference.LOOKS[-1])
        pairs = list(zip(self.estimates, self.claim.parts))
        if self.claim.turns:
            ways = [[e for e in self.estimates if e.mean * sign > 0] for sign in (1, -1)]
            least = lambda e, share: e.seeds_for(0, math.inf, self.level / share, later)
            if all(ways):  # one change each way is enough
                return max(min(least(e, len(pairs)) for e in way) for way in ways)
            return max(least(e, 1) for e in self.estimates)
        beyond = [(e, part) for e, part in pairs if not part.low <= e.mean <= part.high]  # one is enough, at p times the parts
        count, level = (min, self.level / len(pairs)) if beyond else (max, self.level)
        either = count(e.seeds_for(part.low, part.high, level, later) for e, part in beyond or pairs)
        margins = [margin(self.data, part.metric) for part in self.claim.parts]
        if not self.directed or any(abs(e.mean) >= most for e, most in zip(self.estimates, margins)):
            return either
        return min(either, max(e.seeds_for(-most, most, self.level, later) for e, most in zip(self.estimates, margins)))


def seeds_of(runs: Runs, run: str, metric: str) -> pd.DataFrame:
    """A cell's runs by seed, those that diverged or have the metric."""
    lines = runs.of(run)
    return lines if lines.empty else lines[(lines["status"] == "diverged") | lines[metric].notna()]


def on_links(lines: pd.DataFrame) -> pd.DataFrame:
    """What was measured over links between equal hosts decides on cost: changes of an iteration in per cent, paired by round, rows that are
    sent during backward with each other, rows that are sent after it too; none over an AllReduce that the model does not know (HOLDS).
    lines: of data/links.csv."""
    judged = []
    for network, part in lines[timing.equal(lines)].groupby(NETWORK, sort=False):
        where = f"{network[0]} on {'links' if network[1] == 'emulated' else network[1]}, {network[2]} hosts"
        where += f", {network[5]}" if network[1] == "emulated" and cost_model.number(network[5]) else ""
        times = part.pivot(index="round", columns="row", values="milliseconds")
        slow = [row for row in times if row.startswith("slowmo_") and "," not in row]  # with the paper's τ

        def base(row):
            plain, overlap = cost_model.way(row.removeprefix("slowmo_"))
            return plain if overlap or not cost_model.two_ways(f"{network[0]}_{plain}") else f"{plain}_after"  # OSGP has one way

        def change(row, other, least, most):
            source = f"{len(times)} rounds, {network[2]} hosts, {network[4]}, {network[5]}"
            return row, 100 * (times[row] / times[other] - 1), least, most, source

        claims = [(COST, f"an iteration with SlowMo costs what its base's does (within {PACE:g}%)",
                   [change(row, base(row), -PACE, PACE) for row in slow if base(row) in times])]  # fmt: skip
        modelled = cost_model.model(part) if network[1] == "emulated" and "compute" in times else {}
        for every in (row for row in times if row.startswith("ar_") and times[row].median() <= HOLDS * modelled.get(row, math.inf)):
            when = "after" if every.endswith("_after") else "during"
            claims.append((OURS, f"an iteration with SlowMo costs less than that of AllReduce, both {when} backward",
                           [change(row, every, -math.inf, 0) for row in slow if row.endswith("_after") == (when == "after")]))  # fmt: skip
        for kind, claim, parts in (one for one in claims if one[2]):
            verdict, said, sources = judge(parts)
            judged.append((claim, where, kind, verdict, f"{said} ({len(times)} rounds)", sources))
    return pd.DataFrame(judged, columns=COLUMNS)


def stored(runs: Runs) -> pd.DataFrame:
    """The verdicts on `runs`, with the computed ones as they were last written down."""
    written = runs.store.find("claims").fillna("")
    links = on_links(runs.store.find("links"))
    return pd.concat([on_runs(runs), links, written[written["data"] == "quadratic"]], ignore_index=True)


def decided(judged: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The lines of what was run, and a sentence about the data sets of which nothing was."""
    some = judged[judged["verdict"] != NOT_RUN]
    others = judged[~judged["data"].isin(some["data"])]
    few = dict.fromkeys(others[others["evidence"] != NO_RUNS]["data"])
    none = [data for data in dict.fromkeys(others["data"]) if data not in few]
    said = [f"{', '.join(names)}: {words}." for names, words in ((none, NOT_RUN), (few, "too few seeds to judge")) if names]
    return some, " ".join(said)


def markdown(judged: pd.DataFrame) -> str:
    """What the paper claims, apart from it what runs cost, and apart from that what it does not ask."""
    lines, rest = decided(judged)
    cost, ours = lines["kind"] == COST, lines["kind"] == OURS
    text = []
    for part in (lines[~cost & ~ours], lines[cost], lines[ours]):
        if len(part):
            text += ["| claim | data | kind | verdict | evidence |", "|---|---|---|---|---|"]
            text += [f"| {line.claim} | `{line.data}` | {line.kind} | {line.verdict} | {line.evidence} |" for line in part.itertuples()]
            text += [""]
    return "\n".join([*text, *([rest, ""] if rest else [])])


def matrix(judged: pd.DataFrame) -> str:
    """The paper's claims against the stand-ins that have runs: a verdict each, primary ones in bold."""
    judged = judged[judged["kind"].isin((PRIMARY, SECONDARY))]
    ran = {*judged[judged["verdict"] != NOT_RUN]["data"]}
    columns = [data for data in SMALL if data in ran]
    rows = {}  # translation's words for the same claims
    for line in judged[judged["data"].isin(columns)].itertuples():
        text = functools.reduce(lambda text, pair: text.replace(*pair), (("Adam", "SGD"), ("BLEU", "accuracy")), line.claim)
        row = rows.setdefault(re.sub(r" \(within .*\)", "", text), {})
        row[line.data] = f"**{line.verdict}**" if line.kind == PRIMARY else line.verdict
    lines = [["claim", *(f"`{data}`" for data in columns)], ["---"] * (len(columns) + 1)]
    lines += [[text, *(found.get(data, "") for data in columns)] for text, found in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def claims(data: str):
    """The paper's claims on a data set. Primary is what its tier is there for, by the last evaluation."""
    text = data in TEXT
    bases = ("local_adam", "sgp") if text else ("local_sgd", "osgp", "sgp")
    name = lambda cell: f"{data}_{cell}"
    slow, reduce, local = name("slowmo_sgp"), name("ar_adam" if text else "ar_sgd"), name(f"slowmo_{bases[0]}")
    quality = (BLEU_TEST if data in SMALL else BLEU) if text else LAST  # BLEU on data that tuning has not seen
    word = "BLEU" if text else "accuracy"
    loss_tier = data in LOSS_TIERS
    loss_kind, quality_kind = (SECONDARY if data == "cifar10_small" else PRIMARY), (SECONDARY if loss_tier else PRIMARY)
    main = LOSS_LAST if loss_tier else quality

    def better(what, run, against, metric=main):
        return Part(what, ((1, run), (-1, against)), metric.name, *((0, math.inf) if metric.more else (-math.inf, 0)))

    def same(what, run, against, metric):
        margin = MARGINS[metric.name]
        return Part(what, ((1, run), (-1, against)), metric.name, -margin, margin)

    for base in bases:
        one = f"slowmo_{base}", name(f"slowmo_{base}"), name(base)
        yield Claim(f"SlowMo lowers the training loss of {LABELS[base]}", loss_kind, (better(*one, LOSS_LAST),))
        yield Claim(f"SlowMo raises the {word} of {LABELS[base]}", quality_kind, (better(*one, quality),))
    if not text:
        parts = []
        for base in bases[1:]:
            terms = (1, local), (-1, name(bases[0])), (-1, name(f"slowmo_{base}")), (1, name(base))
            parts.append(Part(f"over {base}", terms, LAST.name, 0, math.inf))
        yield Claim("the gain in accuracy is largest for Local SGD", quality_kind, tuple(parts))
    if SMALL.get(data, data).startswith("cifar10"):  # on ImageNet the paper has AllReduce ahead
        yield Claim("AR-SGD is behind SGP in accuracy", quality_kind, (better("SGP over AR-SGD", name("sgp"), reduce, LAST),))
    if not SMALL.get(data, data).startswith("imagenet"):
        yield Claim(f"SGP with SlowMo is ahead of {LABELS['ar_adam' if text else 'ar_sgd']} in {word}", quality_kind,
                    (better("SGP + SlowMo over AllReduce", slow, reduce, quality),))  # fmt: skip
    near = NLL[True][0] if text else main
    yield Claim(f"noaverage matches SGP with SlowMo (within {within(near)})", SECONDARY,
                (same("noaverage", name("sgp_noaverage"), slow, near),))  # fmt: skip
    if not text:
        yield Claim("SlowMo is ahead of double-averaging", SECONDARY, tuple(
            better(base, name(f"slowmo_{base}"), name(f"double_averaging_{base}")) for base in ("sgp", "local_sgd")))  # fmt: skip
    yield Claim("α = 1 is best", SECONDARY, tuple(
        better(f"α = 1 over {value:g}", slow, run) for value, run in sweep(data, "alpha") if run != slow))  # fmt: skip
    steps = sweep(data, "tau")
    yield Claim("τ is not monotone for SGP with SlowMo", SECONDARY, tuple(
        better(f"τ = {high} over {low}", more, less) for (low, less), (high, more) in itertools.pairwise(steps)), turns=True)  # fmt: skip
    yield Claim(f"larger τ than 12 hurts {LABELS[bases[0]]} with SlowMo", SECONDARY,
                (better("τ = 12 over 48", run_name(local, tau=12), run_name(local, tau=48)),))  # fmt: skip
    longest, run = steps[-1]
    yield Claim(f"τ = {longest} still beats SGP alone", SECONDARY, (better(f"τ = {longest} over SGP", run, name("sgp")),))
    yield Claim(f"AllReduce gains nothing from SlowMo (within {within(main)})", SECONDARY,
                (same("β = 0.4", over_allreduce(data), reduce, main),))  # fmt: skip


def margin(data: str, metric: str) -> float:
    """What counts as on par; of training losses in logarithms."""
    return LOSS_MARGINS.get(SMALL.get(data, data), MARGINS[metric]) if metric == LOSS_LAST.name else MARGINS[metric]


def within(metric) -> str:
    """A margin in words."""
    if metric is LOSS_LAST:
        return "a tenth of the training loss"
    return f"{MARGINS[metric.name]:g} of {metric.title.removesuffix(', last')}"


def judge(parts, level: float = inference.LEVEL) -> tuple[str, str, str]:
    """(verdict, evidence, runs) of a claim that does not rest on seeds and looks. parts: (what, values, low, high, source)."""
    p, said = [], []
    for what, values, low, high, _ in parts:
        if len(values) < 2:
            return NOT_RUN, f"{what}: fewer than two measurements", ""
        e = inference.paired([(1, values)])
        p.append((e.within(low, high), e.outside(low, high)))
        # of two one-sided tests at a level: what lies within the margin
        said.append(f"{what} {format_estimate(e, '', 1 - 2 * level if math.isfinite(low) and math.isfinite(high) else 0.95)}")
    support, against = max(one for one, _ in p), len(p) * min(other for _, other in p)
    verdict = SUPPORTED if support < level else CONTRADICTED if against < level else UNDECIDED
    return verdict, "; ".join(said), "; ".join(part[-1] for part in parts)


def computed() -> pd.DataFrame:
    """The special cases of Algorithm 1, computed: run.py's iterates against each method's own recursion, written here in numpy."""
    lines = []
    rng = np.random.default_rng(0)
    m, d, steps, tau, lr = 4, 6, 24, 4, 0.1
    q = np.linalg.qr(rng.standard_normal((m, d, d)))[0]
    A, b, x0 = np.einsum("wij,wj,wkj->wik", q, rng.uniform(0.5, 1.5, (m, d)), q), rng.standard_normal((m, d)), np.zeros(d)

    def local(x, A, b):
        for _ in range(tau):
            x = x - lr * np.einsum("wij,wj->wi", A, x - b)
        return x

    def averaging(A, b):
        x = x0
        for _ in range(steps // tau):
            x = local(np.repeat(x[None], len(A), 0), A, b).mean(0)
        return x

    def bmuf(A, b, eta=0.6):  # Chen & Huo 2016, classical block momentum
        x, delta = x0, np.zeros(d)
        for _ in range(steps // tau):
            delta = eta * delta + local(np.repeat(x[None], len(A), 0), A, b).mean(0) - x
            x = x + delta
        return x

    def lookahead(A, b, alpha=0.5):  # Zhang et al. 2019
        x = x0
        for _ in range(steps // tau):
            x = x + alpha * (local(x[None], A, b)[0] - x)
        return x

    slow = ("outer=slowmo", "outer.buffers=reset")
    cases = (("Local SGD is SlowMo with α = 1, β = 0", averaging, m, (*slow, "outer.alpha=1.0", "outer.beta=0.0")),
             ("BMUF is SlowMo with α = 1, β > 0 over SGD", bmuf, m, (*slow, "outer.alpha=1.0", "outer.beta=0.6")),
             ("Lookahead is SlowMo with m = 1, β = 0, α < 1", lookahead, 1, (*slow, "outer.alpha=0.5", "outer.beta=0.0")))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for claim, method, workers, words in cases:
            problem = Path(folder) / f"{workers}.npz"
            np.savez(problem, A=A[:workers], b=b[:workers], x0=x0)
            finals = quadratic(problem, Path(folder) / f"runs{len(lines)}", workers, steps, lr, *words, f"outer.tau={tau}")
            if len(finals) != 1:
                lines.append((claim, "quadratic", COMPUTED, NOT_RUN, "run.py gave no iterates", ""))
                continue
            gap = float(np.abs(np.load(finals[0] / "final.npz")["mean"] - method(A[:workers], b[:workers])).max())
            verdict = SUPPORTED if gap < 1e-12 else CONTRADICTED
            # not the gap itself where it is rounding, which differs between machines
            said = f"by computation: iterates differ by {'no more than 1e-12' if gap < 1e-12 else f'up to {gap:.1e}'} after {steps} steps"
            lines.append((claim, "quadratic", COMPUTED, verdict, said,
                          f"run.py task=quadratic workers={workers} {' '.join(words)} outer.tau={tau}"))  # fmt: skip
    return pd.DataFrame(lines, columns=COLUMNS)


def speedup() -> pd.DataFrame:
    """The bound, computed: SlowMo over Local SGD on noisy quadratics at the bound's step size αγ/(1 - β) = sqrt(m / (τ T)), τ T fixed.

    m and τ are small against T, so that the bound's other terms, which fall as 1 / T alone, do not hide the first. All workers have
    f(x) = 1/2 |x - b|^2, so the squared gradient norm is 2 f. The bound falls as m^-1/2; to need 1/m of the steps for the same error is
    the linear speed-up. Judged: the slope of log(mean squared gradient norm) in log m, over seeds.
    """
    claim, d, steps, tau, beta, seeds = "linear speed-up in m: the bound's exponent −1/2 (within 0.1)", 16, 2400, 4, 0.6, (1, 2, 3)
    points = []
    with tempfile.TemporaryDirectory() as folder:
        for m in (1, 2, 4, 8, 16):
            problem, runs = Path(folder) / f"{m}.npz", Path(folder) / f"runs{m}"
            np.savez(problem, A=np.repeat(np.eye(d)[None], m, 0), b=np.ones((m, d)), x0=np.zeros(d))
            lr = (1 - beta) * math.sqrt(m / steps)
            for path in quadratic(problem, runs, m, steps, lr, "outer=slowmo", f"outer.tau={tau}", f"outer.beta={beta}", "task.noise=1.0",
                                  f"evaluate.every={tau}", seeds=seeds):  # fmt: skip
                rows = pd.read_json(path / "metrics.jsonl", lines=True)
                points.append((path.name, math.log(m), math.log(2 * rows["validation_loss"].mean())))
    what = f"slope of log ‖∇f‖² in log m, m = 1 to 16, τ = {tau}, {steps} steps"
    parts = [(what, slopes(points), -0.6, -0.4, f"run.py task=quadratic task.noise=1.0, seeds {', '.join(map(str, seeds))}")]
    return pd.DataFrame([(claim, "quadratic", COMPUTED, *judge(parts))], columns=COLUMNS)


def drift() -> pd.DataFrame:
    """What the bound leaves to its base, computed for Local SGD: how far workers are apart just before an average.

    The error of its direction is at most L² times the mean of ‖xᵢ − x̄‖². With a step size small against 1 / (τ L) this mean grows with
    k, the steps since the last average: as k where gradients are noisy, as k² where workers have data of their own. Judged: the slope of
    its logarithm in log k, k = τ − 1, over seeds.
    """
    m, d, lr, begin, seeds = 16, 256, 5e-4, 64, (1, 2, 3)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        alike = Path(folder) / "alike.npz"
        np.savez(alike, A=np.repeat(np.eye(d)[None], m, 0), b=np.ones((m, d)), x0=np.zeros(d))
        for why, problem, noise, power in (("under noise", alike, 1.0, 1), ("where their data differ", None, 0.0, 2)):
            points = []
            for tau in (4, 8, 16, 32):
                words = ("outer=slowmo", f"outer.tau={tau}", "outer.beta=0.6", f"task.noise={noise}")
                for path in quadratic(problem, Path(folder) / f"{power}-{tau}", m, begin + tau - 1, lr, *words, seeds=seeds):
                    last = pd.read_json(path / "metrics.jsonl", lines=True)["consensus_distance"].iloc[-1]
                    points.append((path.name, math.log(tau - 1), 2 * math.log(last)))
            claim = f"between averages workers drift apart {why}: the exponent {power} of ‖xᵢ − x̄‖² (within 0.1)"
            what = f"slope in log k, m = {m}, τ = 4 to 32"
            source = f"run.py task=quadratic task.noise={noise:g}, seeds {', '.join(map(str, seeds))}"
            verdict = judge([(what, slopes(points), power - 0.1, power + 0.1, source)])
            lines.append((claim, "quadratic", COMPUTED, *verdict))
    return pd.DataFrame(lines, columns=COLUMNS)


def momentum() -> pd.DataFrame:
    """The bound's term of β, computed: how far the slow momentum carries x0 from the path that the analysis follows.

    That path is z = x0 + β / (1 − β) (x0 − the x0 before), so the distance is αγβ / (1 − β) ‖u‖. Where gradients are noise alone, u is a
    sum of independent rounds with weights β^s, and the mean of the square is (αγ / (1 − β))² τ V β² / (1 − β²), the term but for L².
    Judged at one αγ / (1 − β): the slope of its logarithm in log β² / (1 − β²), over seeds.
    """
    m, d, tau, pace, rounds, seeds = 4, 256, 4, 1e-3, 80, (1, 2, 3)
    points = []
    with tempfile.TemporaryDirectory() as folder:
        problem = Path(folder) / "still.npz"
        np.savez(problem, A=np.repeat(np.eye(d)[None], m, 0), b=np.zeros((m, d)), x0=np.zeros(d))
        for beta in (0.2, 0.4, 0.6, 0.8):
            words = ("outer=slowmo", f"outer.tau={tau}", f"outer.beta={beta}", "task.noise=1.0", f"evaluate.every={tau}")
            for path in quadratic(problem, Path(folder) / str(beta), m, rounds * tau, pace * (1 - beta), *words, seeds=seeds):
                u = pd.read_json(path / "metrics.jsonl", lines=True)["slow_momentum_norm"].iloc[rounds // 2 :]
                points.append((path.name, math.log(beta**2 / (1 - beta**2)), math.log(beta**2 * (u**2).mean())))
    claim = "the slow momentum carries x0 off its path: the exponent 1 of ‖z − x0‖² in β² / (1 − β²) (within 0.1)"
    what = f"slope in log β² / (1 − β²), β = 0.2 to 0.8, m = {m}, τ = {tau}"
    source = f"run.py task=quadratic task.noise=1, seeds {', '.join(map(str, seeds))}"
    return pd.DataFrame([(claim, "quadratic", COMPUTED, *judge([(what, slopes(points), 0.9, 1.1, source)]))], columns=COLUMNS)


def slopes(points: list[tuple]) -> pd.Series:
    """Of the straight line through each seed's points (seed, x, y)."""
    return pd.DataFrame(points, columns=["seed", "x", "y"]).groupby("seed")[["x", "y"]].apply(lambda p: np.polyfit(p["x"], p["y"], 1)[0])


def quadratic(problem: Path | None, runs: Path, workers: int, steps: int, lr: float, *words: str, seeds=(1,)) -> list[Path]:
    """Folders of finished runs of plain SGD workers on a quadratic problem; None: each seed's own."""
    print(f"running: {' '.join(words)} workers={workers} steps={steps} seeds {', '.join(map(str, seeds))}", file=sys.stderr, flush=True)
    overrides = ["task=quadratic", f"task.problem={problem or 'null'}", f"workers={workers}", f"steps={steps}", f"optimizer.lr={lr}",
                 "optimizer.momentum=0.0", "optimizer.nesterov=false", "optimizer.weight_decay=0.0", "base=local_sgd", "dtype=float64",
                 f"runs={runs}", *words, f"seed={','.join(map(str, seeds))}"]  # fmt: skip
    done = subprocess.run([sys.executable, "run.py", *["-m"] * (len(seeds) > 1), *overrides], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr.strip()[-500:], file=sys.stderr)
    return [path.parent for path in sorted(runs.glob("*/*/result.json"))]
