"""How an algorithm's own cost grows: `python -m benchmarks.scaling` in some minutes, to results/mine/data/scaling.csv; figures draw it.

    step       seconds of SGP + SlowMo's step (optimizer, gossip, SlowMo at every τ-th) against m at d = 1e6, against d at m = 2, both at
               τ = 12, and against τ at m = 8
    buckets    seconds of an iteration of two processes on loopback whose model computes next to nothing, against the number of buckets
    memory     the process's peak against m at d = 1e6
    import     seconds of `import slowmo`, torch included, warm
    start      seconds from `run.py task=quadratic` to its end after one step, warm

What grows faster than m d has an exponent (results/timing.py) above 1.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

import slowmo
from benchmarks import ranks, single_process
from benchmarks.table2 import machine
from experiments.files import commit
from results.store import COLUMNS as LISTS
from results.store import MINE, write
from results.timing import exponents
from slowmo import outer

WORKERS, PARAMETERS = (1, 2, 4, 8, 16, 32, 64), (10**4, 10**5, 10**6, 10**7, 10**8, 2 * 10**8)
TAUS, CAPS = (3, 12, 48, 192), (100.0, 2.0, 0.5, 0.12)  # MiB
ROOT = Path(__file__).parent.parent
TENSORS = 64  # of the model that is cut into buckets


def step(m: int, d: int, tau: int = 12) -> float:
    """Median seconds of a step; a round is τ, one of them with SlowMo."""
    torch.set_num_threads(1)
    algorithm = single_process.built("sgp", m, d, tau=tau, nesterov=True, buffers="maintain")

    def one():
        algorithm.start()
        algorithm.step()

    return per_step(one, tau)


def in_buckets(cap: float, d: int) -> tuple[float, int]:
    """(seconds, how many buckets) of an iteration of this process's worker, τ = 12; cap: bucket_cap_mb."""
    torch.set_num_threads(1)
    model = torch.nn.ParameterList(torch.zeros(d // TENSORS) for _ in range(TENSORS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    replicas = slowmo.Replicas(model, slowmo.Cluster(), optimizer.param_groups, bucket_cap_mb=cap)
    base = slowmo.SGP(replicas, optimizer, slowmo.Exponential(replicas.cluster.num_workers), overlap=True)
    algorithm = outer.SlowMo(base, tau=12, beta=0.6)

    def one():
        algorithm.start()
        sum(part.sum() for part in model).backward()
        algorithm.step()

    return per_step(one, 12, rounds=20), len(replicas.buckets)


def per_step(one, tau: int, rounds: int | None = None) -> float:
    """Seconds: the median over whole rounds after one that warms up. rounds: as many as other processes do; else two seconds of them."""
    times, begun = [], time.perf_counter()
    while len(times) < rounds if rounds else len(times) < 4 or time.perf_counter() - begun < 2:
        start = time.perf_counter()
        for _ in range(tau):
            one()
        times.append((time.perf_counter() - start) / tau)
    return statistics.median(times[1:])


def start(*command: str) -> float:
    """Seconds of a Python process; from the second time on, so that files are cached."""
    times = []
    for _ in range(4):
        with tempfile.TemporaryDirectory() as out:
            begun = time.perf_counter()
            subprocess.run([sys.executable, *(word.format(out=out) for word in command)], check=True, capture_output=True, cwd=ROOT)
            times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=MINE.path("scaling"))
    options = parser.parse_args()
    lines = [{"what": "import", "value": start("-c", "import slowmo")},
             {"what": "start", "m": 8, "value": start("run.py", "task=quadratic", "steps=1", "runs={out}")}]  # fmt: skip
    print("import {:.2f} s, start-up to the end of one step {:.2f} s".format(*(line["value"] for line in lines)), flush=True)
    cases = [(m, 10**6, 12) for m in WORKERS] + [(2, d, 12) for d in PARAMETERS] + [(8, 10**6, tau) for tau in TAUS]
    for m, d, tau in dict.fromkeys(cases):
        value = ranks.spawn(lambda: step(m, d, tau), 1, "loopback")
        lines.append({"what": "step", "m": m, "d": d, "tau": tau, "value": value})
        print(f"step    m = {m:3} d = {d:11,} τ = {tau:3}: {1e3 * value:.3f} ms", flush=True)
    for cap in CAPS:
        value, buckets = ranks.spawn(lambda: in_buckets(cap, 10**6), 2, "loopback")
        lines.append({"what": "buckets", "m": 2, "d": 10**6, "tau": 12, "buckets": buckets, "value": value})
        print(f"buckets m =   2 d =   1,000,000, {buckets:2} of them: {1e3 * value:.3f} ms", flush=True)
    for m in WORKERS:
        value = ranks.spawn(lambda: single_process.held("sgp", m, 10**6), 1, "loopback")
        lines.append({"what": "memory", "m": m, "d": 10**6, "value": value})
        print(f"memory  m = {m:3} d =   1,000,000: {value / 1e6:.0f} MB", flush=True)
    lines = pd.DataFrame(lines, columns=LISTS["scaling"]).assign(commit=commit(), machine=machine())
    write(options.out, "scaling", lines)
    print(exponents(lines))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
