"""python -m results collect | tables | figures | runtime | claims | report | docs | all

What your runs give goes to results/mine/, which git ignores, and stands beside what is published: yours, ours, the paper's. With
--publish it becomes what is published: results/data and all that is made from it.
"""

import argparse
import sys
from pathlib import Path

from results import blocks, claims, collect, cost_model, figures, report, tables, timing
from results.store import MINE, PUBLISHED, Runs, Store, save


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m results", description=__doc__.partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    about = {
        "collect": "run folders -> data/runs.csv, a line a run, and data/curves.csv",
        "tables": "the paper's tables, yours and ours: tables/tables.md, .tex, .csv",
        "figures": "the paper's figures from these runs: figures/*.pdf, *.png",
        "runtime": "Table 2 and data/links.csv beside a model, and what other clusters would take: tables/runtime.md",
        "claims": "the paper's claims and the verdicts on these runs: data/claims.csv; computes those that need no runs, a minute",
        "report": "all of it in one page for a browser: report.html",
        "docs": "the blocks of README.md and docs/, of the published runs (--publish)",
        "all": "collect where there is a folder of runs, then the others; claims are computed only where they are not yet",
    }
    for name, text in about.items():
        one = commands.add_parser(name, help=text)
        where = one.add_mutually_exclusive_group()
        where.add_argument("--publish", action="store_true", help="read and write what is committed, in results/")
        where.add_argument("--out", type=Path, help="another folder of results than results/mine")
        if name == "runtime":
            one.add_argument("--nodes", type=_numbers(int), help="of other clusters, printed and drawn in clusters/, like 8,16,32")
            one.add_argument("--rate", type=_numbers(float), help="rates of their links in Gbit/s, like 10,25")
        if name in ("collect", "all"):
            one.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of all runs")
    options = parser.parse_args()
    if options.command == "docs" and not options.publish:
        parser.error("README.md and docs/ show published runs alone: add --publish")
    store = Store(options.out) if options.out else PUBLISHED if options.publish else MINE
    wanted = list(about)[:-1] if options.command == "all" else [options.command]
    if options.command == "all":
        wanted = [name for name in wanted if (name != "collect" or options.runs.is_dir()) and (name != "docs" or options.publish)]
    try:
        for name in wanted:
            if name == "collect":
                collect.main(options.runs, store)
            elif name == "docs":
                runs = Runs(store)
                pages = {page: blocks.filled(page, runs) for page in blocks.pages()}  # all of them, or none
                for page, text in pages.items():
                    save(page, text)
                print(f"wrote {', '.join(str(page.relative_to(blocks.ROOT)) for page in pages)}")
            elif name == "runtime":
                if options.command == name and (options.nodes or options.rate):
                    chosen = options.nodes or cost_model.NODES, options.rate or cost_model.RATES
                    print("\n\n".join(timing.clusters(data, *chosen) for data in cost_model.TASKS))
                    figures.clusters(Path("clusters"), *chosen)
                    continue
                timing.main(store)
                figures.clusters(store.folder / "figures")
                if store.has("scaling"):
                    figures.scaling(store.read("scaling"), store.folder / "figures")
            elif name == "claims":
                claims.main(store, again=options.command == "claims")
            elif name == "figures":
                figures.main(store)
            else:
                {"tables": tables, "report": report}[name].main(store, tables.beside(store))
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
