"""python -m results collect | tables | figures | runtime | claims | report | readme | all"""

import argparse
import sys
from pathlib import Path

from results import claims, collect, figures, report, runtime, seconds, tables

README = Path(__file__).parent.parent / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m results", description="What the runs gave, beside the paper.")
    commands = parser.add_subparsers(dest="command", required=True)
    about = {
        "collect": "run folders -> results/runs.csv, a line a run, and curves.csv",
        "tables": "the paper's tables and ours: results/tables.md, .tex, .csv",
        "figures": "the paper's figures from our runs: results/figures/*.pdf, *.png",
        "runtime": "Table 2 and runtime.csv beside a model, and what other clusters would take: results/runtime.md",
        "claims": "the paper's claims and our verdicts: results/claims.csv; computes those that need no runs, a minute",
        "report": "all of it in one page for a browser: results/report.html",
        "readme": "the README's blocks",
        "all": "collect where there is a folder of runs, then the others; claims are computed only where they are not yet",
    }
    for name, text in about.items():
        one = commands.add_parser(name, help=text)
        one.add_argument("--out", type=Path, default=tables.HERE / "runs.csv", help="the list of runs; what is made lies beside it")
        if name == "runtime":
            one.add_argument("--nodes", type=_numbers(int), help="of other clusters, printed and drawn in clusters/, like 8,16,32")
            one.add_argument("--rate", type=_numbers(float), help="rates of their links in Gbit/s, like 10,25")
        if name in ("collect", "all"):
            one.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of all runs")
    options = parser.parse_args()
    wanted, out = list(about)[:-1] if options.command == "all" else [options.command], options.out
    if options.command == "all" and not options.runs.is_dir():
        wanted.remove("collect")
    try:
        for name in wanted:
            if name == "collect":
                collect.main(options.runs, out)
            elif name == "readme":
                collect.write(README, report.readme(README, tables.Runs(out)))
                print(f"wrote {README}")
            elif name == "runtime":
                if options.command == name and (options.nodes or options.rate):
                    chosen = options.nodes or runtime.NODES, options.rate or runtime.RATES
                    print("\n\n".join(seconds.clusters(data, *chosen) for data in runtime.TASKS))
                    figures.clusters(Path("clusters"), *chosen)
                    continue
                seconds.main(out.parent)
                figures.clusters(out.parent / "figures")
                if (grown := out.parent / "benchmarks/growth.csv").exists():
                    figures.growth(grown, out.parent / "figures")
            elif name == "claims":
                claims.main(out, out.parent, again=options.command == "claims")
            else:
                {"tables": tables, "figures": figures, "report": report}[name].main(out, out.parent)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _numbers(kind):
    def read(text: str) -> tuple:
        numbers = tuple(kind(word) for word in text.split(","))
        if min(numbers) < 2 * (kind is int) or not all(number > 0 for number in numbers):
            raise argparse.ArgumentTypeError(f"{text}: two nodes at least, rates above 0")
        return numbers

    read.__name__ = "list"
    return read


if __name__ == "__main__":
    main()
