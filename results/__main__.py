"""python -m results collect [--runs runs] [--out results/runs.csv]"""

import argparse
import sys
from pathlib import Path

from results import collect


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m results", description="What the runs gave.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("collect", help="run folders -> results/runs.csv, a line a run")
    one.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of all runs")
    one.add_argument("--out", type=Path, default=Path("results/runs.csv"))
    options = parser.parse_args()
    try:
        collect.main(options.runs, options.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
