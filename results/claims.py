"""The paper's claims, each judged by runs: supported, contradicted, or not enough runs.

Every test is paired over seeds and says its interval (95%, Student's t, two-sided). A claim over several bases is supported when each
of its parts is, contradicted when one part is. "Equal" needs a margin: the interval must lie inside it (two one-sided tests).
"""

import itertools
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from results.store import COLUMNS as LISTS
from results.store import NETWORK, Runs, Store
from results.tables import ACCURACY, BLEU, LOSS, NLL, TEXT, TITLES, change, interval, sweep, varied

SUPPORTED, CONTRADICTED, OPEN = "supported", "contradicted", "not enough runs"
PACE = 5.0  # per cent of an iteration
ROOT = Path(__file__).parent.parent
COLUMNS = LISTS["claims"]


def main(store: Store, again: bool = True) -> None:
    """Judge every claim on every data set, write data/claims.csv, print the verdicts.

    again: compute what needs no runs even if its verdicts stand there already.
    """
    judged = stored(Runs(store))
    if again or not (judged["data"] == "quadratic").any():
        judged = pd.concat([judged[judged["data"] != "quadratic"], computed(), speedup()], ignore_index=True)
    store.write("claims", judged)
    for line in decided(judged)[0].itertuples():
        print(f"{line.verdict:16}{line.claim} [{line.data}]: {line.evidence}")


def on_runs(runs: Runs) -> pd.DataFrame:
    """The claims that runs decide: a line for each, and each data set."""
    lines = []
    for data in TITLES:
        lines += [dict(zip(COLUMNS, (claim, data, *judge(parts)))) for claim, parts in claims(data, runs)]
    return pd.DataFrame(lines, columns=COLUMNS)


def on_links(lines: pd.DataFrame) -> pd.DataFrame:
    """What was measured over links decides on cost: changes of an iteration in per cent, paired by round. lines: of data/links.csv."""
    judged = []
    for network, part in lines.groupby(NETWORK, sort=False):
        where = f"{network[0]} on {'links' if network[1] == 'emulated' else network[1]}"
        times = part.pivot(index="round", columns="row", values="milliseconds")
        slow = [row for row in times if row.startswith("slowmo_") and "," not in row]  # with the paper's τ

        def change(row, other, least, most):
            changes = 100 * (times[row] / times[other] - 1)
            return row, changes.mean(), interval(changes), least, most, f"{len(changes)} rounds, {network[2]} hosts, {network[4]}"

        claims = [(f"an iteration with SlowMo costs what its base's does (within {PACE:g}%)",
                   [change(row, row.removeprefix("slowmo_"), -PACE, PACE) for row in slow])]  # fmt: skip
        for every in (row for row in times if row.startswith("ar_")):
            when = "after" if every.endswith("_after") else "during"
            claims.append((f"an iteration with SlowMo costs less than that of AllReduce {when} backward",
                           [change(row, every, -math.inf, 0) for row in slow]))  # fmt: skip
        judged += [dict(zip(COLUMNS, (claim, where, *judge(parts)))) for claim, parts in claims if parts]
    return pd.DataFrame(judged, columns=COLUMNS)


def stored(runs: Runs) -> pd.DataFrame:
    """The verdicts on `runs`, with the computed ones as they were last written down."""
    written = runs.store.find("claims").fillna("")
    links = on_links(runs.store.find("links"))
    return pd.concat([on_runs(runs), links, written[written["data"] == "quadratic"]], ignore_index=True)


def decided(judged: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The lines of data sets that have any verdict, and a sentence about the others."""
    some = [data for data, part in judged.groupby("data", sort=False) if (part["verdict"] != OPEN).any()]
    others = [data for data in dict.fromkeys(judged["data"]) if data not in some]
    return judged[judged["data"].isin(some)], f"{', '.join(others)}: {OPEN} for any claim." * bool(others)


def markdown(judged: pd.DataFrame) -> str:
    lines, rest = decided(judged)
    text = ["| claim | data | verdict | evidence |", "|---|---|---|---|"]
    text += [f"| {line.claim} | `{line.data}` | {line.verdict} | {line.evidence} |" for line in lines.itertuples()]
    return "\n".join(text) + "\n" + f"\n{rest}\n" * bool(rest)


def claims(data: str, runs: Runs):
    """(claim, its parts). A part is (what, mean, half an interval, least, most, runs): supported where mean ± half lies within
    (least, most), contradicted where it lies outside."""
    text = data in TEXT
    metric = BLEU if text else ACCURACY
    bases = ("local_adam", "sgp") if text else ("local_sgd", "osgp", "sgp")
    name = lambda cell: f"{data}_{cell}"
    slow, local = name("slowmo_sgp"), name(f"slowmo_{bases[0]}")

    def paired(what, run, against, metric, least, most):
        changes = change(runs, run, against, metric)
        source = f"{run} / {against}, seeds {', '.join(map(str, changes.index)) or 'none'}"
        return what, changes.mean(), interval(changes), least, most, source

    yield "SlowMo lowers the training loss of each base", [
        paired(base, name(f"slowmo_{base}"), name(base), LOSS.name, -math.inf, 0) for base in bases]  # fmt: skip
    yield f"SlowMo raises the {'BLEU' if text else 'accuracy'} of each base", [
        paired(base, name(f"slowmo_{base}"), name(base), metric.name, 0, math.inf) for base in bases]  # fmt: skip
    yield f"an iteration with SlowMo costs what its base's does (within {PACE:g}%)", [
        paired(base, name(f"slowmo_{base}"), name(base), "milliseconds", -PACE, PACE) for base in bases]  # fmt: skip
    # as good as: no further away than half of what SlowMo gained in the paper
    margin, near = (0.03, NLL[True][0]) if text else (0.3, ACCURACY)
    yield f"noaverage matches SGP with SlowMo (within {margin} of {near.title})", [
        paired("noaverage", name("sgp_noaverage"), slow, near.name, -margin, margin)]  # fmt: skip
    if not text:
        gains = {base: change(runs, name(f"slowmo_{base}"), name(base), metric.name) for base in bases}
        parts = []
        for base in bases[1:]:
            more, other = gains[bases[0]].align(gains[base], join="inner")
            more = more - other
            parts.append((f"over {base}", more.mean(), interval(more), 0, math.inf, f"{local}, {name(f'slowmo_{base}')}, their bases"))
        yield "the gain in accuracy is largest for Local SGD", parts
    others = [(value, run) for value, run in sweep(data, "alpha") if run != slow]
    yield "α = 1 is best", [
        paired(f"α = 1 over {value:g}", slow, run, metric.name, 0, math.inf) for value, run in others]  # fmt: skip
    yield "τ is not monotone for SGP with SlowMo", list(turns(data, runs, metric))
    yield f"larger τ than 12 hurts {'Local Adam' if text else 'Local SGD'} with SlowMo", [
        paired("τ = 48 over 12", varied(local, "tau", 48), varied(local, "tau", 12), metric.name, -math.inf, 0)]  # fmt: skip
    longest, run = sweep(data, "tau")[-1]
    yield f"τ = {longest} still beats SGP alone", [
        paired(f"τ = {longest} over SGP", run, name("sgp"), metric.name, 0, math.inf)]  # fmt: skip
    reduce, little = name("ar_adam" if text else "ar_sgd"), 0.2 if text else margin
    yield f"AllReduce gains nothing from SlowMo (no more than {little:g})", [
        paired("β = 0.4", f"{reduce},outer=slowmo,outer.beta=0.4", reduce, metric.name, -math.inf, little)]  # fmt: skip


def turns(data: str, runs: Runs, metric):
    """Not monotone: among the τ some larger one is better than a smaller, and some larger one worse. Two parts, each the clearest pair."""
    slow = f"{data}_slowmo_sgp"
    pairs = list(itertools.combinations(sweep(data, "tau"), 2))
    for word, sign in (("better", 1), ("worse", -1)):
        best = None
        for (low, less), (high, more) in pairs:
            changes = sign * change(runs, more, less, metric.name)
            # clearest: furthest from zero in units of its interval, which many pairs make wider (Bonferroni)
            half = interval(changes, 1 - 0.05 / len(pairs))
            score = changes.mean() / half if half else -math.inf
            if len(changes) > 1 and (best is None or score > best[0]):
                best = score, (f"τ = {high} {word} than {low}", changes.mean(), half, 0, math.inf, f"{slow} at τ = {low}, {high}")
        yield best[1] if best else (f"a larger τ {word}", math.nan, math.nan, 0, math.inf, "none")


def judge(parts) -> tuple[str, str, str]:
    """(verdict, evidence, runs) from a claim's parts."""
    verdicts, said = [], []
    for what, mean, half, least, most, _ in parts:
        low, high = mean - half, mean + half
        if math.isnan(low):
            verdicts.append(OPEN)
        else:
            verdicts.append(SUPPORTED if least < low and high < most else CONTRADICTED if high < least or low > most else OPEN)
        said.append(f"{what} {mean:+.3g} ± {half:.2g}" if not math.isnan(low) else f"{what}: fewer than two pairs")
    if not parts:
        return OPEN, "no runs", ""
    verdict = CONTRADICTED if CONTRADICTED in verdicts else OPEN if OPEN in verdicts else SUPPORTED
    return verdict, "; ".join(said).replace("-", "−"), "; ".join(part[-1] for part in parts)


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
                lines.append((claim, "quadratic", OPEN, "run.py gave no iterates", ""))
                continue
            gap = float(np.abs(np.load(finals[0] / "final.npz")["mean"] - method(A[:workers], b[:workers])).max())
            verdict = SUPPORTED if gap < 1e-12 else CONTRADICTED
            lines.append((claim, "quadratic", verdict, f"by computation: iterates differ by at most {gap:.1e} after {steps} steps",
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
    points = pd.DataFrame(points, columns=["seed", "m", "error"])
    slopes = points.groupby("seed")[["m", "error"]].apply(lambda part: np.polyfit(part["m"], part["error"], 1)[0])
    what = f"slope of log ‖∇f‖² in log m, m = 1 to 16, τ = {tau}, {steps} steps"
    parts = [
        (what, slopes.mean(), interval(slopes), -0.6, -0.4, f"run.py task=quadratic task.noise=1.0, seeds {', '.join(map(str, seeds))}")
    ]
    return pd.DataFrame([(claim, "quadratic", *judge(parts))], columns=COLUMNS)


def quadratic(problem: Path, runs: Path, workers: int, steps: int, lr: float, *words: str, seeds=(1,)) -> list[Path]:
    """Folders of finished runs of plain SGD workers on a quadratic problem."""
    overrides = ["task=quadratic", f"task.problem={problem}", f"workers={workers}", f"steps={steps}", f"optimizer.lr={lr}",
                 "optimizer.momentum=0.0", "optimizer.nesterov=false", "optimizer.weight_decay=0.0", "base=local_sgd", "dtype=float64",
                 f"runs={runs}", *words, f"seed={','.join(map(str, seeds))}"]  # fmt: skip
    done = subprocess.run([sys.executable, "run.py", *["-m"] * (len(seeds) > 1), *overrides], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr.strip()[-500:], file=sys.stderr)
    return [path.parent for path in sorted(runs.glob("*/*/result.json"))]
