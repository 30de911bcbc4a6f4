"""Run a share of the published runs again, drawn by a seed, each from its command, and compare them to the last digit that is published.

    python scripts/rerun.py cifar10_small_loss                  a tenth of them
    python scripts/rerun.py cifar10_small_loss --share 0.5 --seed 7

Everything must be equal but seconds, commit and versions: the last and best values in full, the curves to six digits. The same arithmetic
takes the same machine type and torch; elsewhere the last digits may differ, which is said. Runs go to trials/again/; asked again, those
that have ended are compared and not run.
"""

import argparse
import math
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from results import collect  # noqa: E402
from results.store import PUBLISHED, RunId, Store  # noqa: E402
from results.tables import TITLES  # noqa: E402

FREE = ("seconds", "seconds_per_iteration", "commit", "torch", "device", "threads", "clock")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=TITLES)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args()
    if not 0 < options.share <= 1:
        parser.error(f"--share {options.share}: above 0, at most 1")
    lines = PUBLISHED.find("runs")
    ids = sorted((run, seed) for run, seed, status in zip(lines["run"], lines["seed"], lines["status"])
                 if status == "done" and of(run) == options.data)  # fmt: skip
    if not ids:
        parser.error(f"nothing of {options.data} is published")
    drawn = random.Random(options.seed).sample(ids, math.ceil(options.share * len(ids)))
    print(f"{len(drawn)} of {len(ids)} runs: {', '.join(f'{run} seed {seed}' for run, seed in drawn)}", flush=True)
    different = 0
    for run, seed in drawn:
        said = compared(run, seed)
        different += bool(said)
        print(f"{run} seed {seed}: {said or 'equal'}", flush=True)
    print(f"{len(drawn) - different} of {len(drawn)} equal")
    return int(different > 0)


def of(run: str) -> str:
    """The data set whose experiment a run is of: the longest name that it begins with."""
    return max((data for data in TITLES if run.startswith(f"{data}_")), key=len, default="")


def compared(run: str, seed: int) -> str:
    """What differs between a published run and the same run now; nothing where all is equal."""
    experiment, overrides = RunId.parse(run)
    words = [f"experiment={experiment}", *overrides, f"seed={seed}", "runs=trials/again"]
    code = subprocess.run([sys.executable, "run.py", *words], cwd=ROOT).returncode
    if code:
        return f"run.py ended with {code}"
    said, own = [], lambda lines: lines[(lines["run"] == run) & (lines["seed"] == seed)]
    commit = own(PUBLISHED.read("runs"))["commit"].iloc[-1]
    with tempfile.TemporaryDirectory() as folder:
        new = Store(Path(folder))
        collect.main(ROOT / "trials/again" / run / f"seed{seed}", new)
        for name in ("runs", "curves"):
            before = own(PUBLISHED.read(name))
            before = before[before["commit"] == commit].reset_index(drop=True)
            now = new.read(name)
            if len(before) != len(now):
                said.append(f"{len(now)} lines in {name} instead of {len(before)}")
                continue
            for column in (column for column in now if column not in FREE):
                other = ~((before[column] == now[column]) | (before[column].isna() & now[column].isna()))
                if other.any():
                    said.append(f"{column} of {name}: {now[column][other].iloc[0]}, published {before[column][other].iloc[0]}")
    return "; ".join(said)


if __name__ == "__main__":
    sys.exit(main())
