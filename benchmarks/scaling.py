"""How an algorithm's own cost grows: `python -m benchmarks.scaling` in some minutes, to results/mine/data/scaling.csv; figures draw it.

    step       seconds of SGP + SlowMo's step (optimizer, gossip, SlowMo at every 12th) against m at d = 1e6, and against d at m = 2
    memory     the process's peak against m at d = 1e6
    start      seconds from `run.py task=quadratic` to its end after one step, warm

Nothing grows faster than m d when no exponent (results/timing.py) exceeds 1.
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

from benchmarks import ranks, single_process
from benchmarks.table2 import machine
from experiments.files import commit
from results.store import MINE, write
from results.timing import exponents

WORKERS, PARAMETERS = (1, 2, 4, 8, 16, 32, 64), (10**4, 10**5, 10**6, 10**7, 10**8, 2 * 10**8)


def step(m: int, d: int) -> float:
    """Median seconds of a step; a round is 12, one of them with SlowMo."""
    torch.set_num_threads(1)
    algorithm = single_process.built("sgp", m, d, tau=12, nesterov=True, buffers="maintain")
    times, begun = [], time.perf_counter()
    while len(times) < 4 or time.perf_counter() - begun < 2:
        start = time.perf_counter()
        for _ in range(12):
            algorithm.start()
            algorithm.step()
        times.append((time.perf_counter() - start) / 12)
    return statistics.median(times[1:])


def start() -> float:
    """Seconds of a whole run of one step on the quadratic; the second time, so that files are cached."""
    run = Path(__file__).parent.parent / "run.py"
    times = []
    for _ in range(4):
        with tempfile.TemporaryDirectory() as out:
            begun = time.perf_counter()
            subprocess.run([sys.executable, run, "task=quadratic", "steps=1", f"runs={out}"], check=True, capture_output=True)
            times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=MINE.path("scaling"))
    options = parser.parse_args()
    lines = [{"what": "start", "m": 8, "d": 0, "value": start()}]
    print(f"start-up to the end of one step: {lines[0]['value']:.2f} s", flush=True)
    cases = [("step", m, 10**6) for m in WORKERS] + [("step", 2, d) for d in PARAMETERS] + [("memory", m, 10**6) for m in WORKERS]
    for what, m, d in dict.fromkeys(cases):
        value = ranks.spawn(lambda: step(m, d) if what == "step" else single_process.held("sgp", m, d), 1, "loopback")
        lines.append({"what": what, "m": m, "d": d, "value": value})
        print(f"{what:7} m = {m:3} d = {d:11,}: {f'{1e3 * value:.3f} ms' if what == 'step' else f'{value / 1e6:.0f} MB'}", flush=True)
    lines = pd.DataFrame(lines).assign(commit=commit(), machine=machine())
    write(options.out, "scaling", lines)
    print(exponents(lines))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
