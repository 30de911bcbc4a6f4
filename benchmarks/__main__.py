"""Our iterations against limits and peers: one table of ratios, results/benchmarks/<name>.csv.

    python -m benchmarks [--only WORDS] [--rounds 6] [--out results/benchmarks/cpu.csv]

Emulated links want root (scripts/emulated_network.sh); --only loopback, --only process leave them out. All of it takes half an hour
on two cores, which should have nothing else to do. A ratio is the median of paired rounds, with quartiles.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from experiments import folder, network
from experiments.runtime import machine
from results.collect import write
from results.tables import BENCHMARKS

HOSTS, RATE = 4, "400mbit"
LINK = 400e6


@dataclasses.dataclass(frozen=True)
class Row:
    """what over against, where: links, loopback or process; `least` the ratio it is to stay below; run: module.function(options)."""

    what: str
    against: str
    where: str
    aim: float
    module: str
    function: str
    options: dict = dataclasses.field(default_factory=dict)
    rounds: int | None = None


def rows() -> list[Row]:
    out = []
    for where in ("links", "loopback"):
        peer = functools.partial(Row, where=where, module="peers")
        out.append(peer("AllReduce", "torch's DistributedDataParallel", aim=1.0, function="allreduce"))
        for name, base in (("Local SGD", "localsgd"), ("SGP", "sgp")):
            out.append(peer(f"{name} + SlowMo, τ = 12", "fairscale's SlowMoDistributedDataParallel", aim=0.9, function="fairscale",
                            options={"base": base}))  # fmt: skip
        out.append(peer("Local SGD, τ = 12", "torch's PostLocalSGDOptimizer", aim=1.0, function="local_sgd"))
        for name, base in (("Local SGD", "local_sgd"), ("SGP", "sgp"), ("OSGP", "osgp")):
            for tau, aim in ((12, 1.02), (48, 1.01)):
                bytes_ = "" if base == "local_sgd" else " and an exact average's bytes"
                out.append(peer(f"{name} + SlowMo, τ = {tau}", f"{name}{bytes_}", aim=aim, function="over_base",
                                options={"base": base, "tau": tau}, rounds=3 if tau == 48 else None))  # fmt: skip
    link = functools.partial(Row, where="links", module="peers")
    out.append(link("gossip", "its bytes at the link's rate", aim=1.1, function="wire"))
    out.append(link("exact average", "2 (m - 1)/m of its bytes at the link's rate", aim=1.15, function="wire", options={"what": "average"}))
    out.append(link("OSGP, computation longer", "computation alone", aim=1.05, function="overlap"))
    out.append(link("OSGP, message longer", "messages alone", aim=1.05, function="overlap_of_messages"))
    alone = functools.partial(Row, where="process", module="alone")
    out.append(alone("8 ResNet-18 workers folded, batch 8", "8 plain loops, torch's default SGD", aim=1.03, function="folding"))
    out.append(alone("SlowMo's own work, τ = 12, 8 folded ResNet-18", "Local SGD's iteration", aim=1.02, function="slow_step"))
    out.append(alone("32 workers of ResNet-8, width 16, batch 8, 8x8, at once", "the loop over them", aim=0.5, function="together"))
    for name, base in (("Local SGD", "local_sgd"), ("SGP", "sgp"), ("OSGP", "osgp")):
        held = "rows (1 + gradient + momentum" + " + message" * (base == "osgp") + ") + 2 d"
        out.append(
            alone(f"memory at its peak, {name} + SlowMo, m = 32", held, aim=1.05, function="memory", options={"base": base}, rounds=1)
        )
    return out


def run(row: Row, rounds: int) -> list[float]:
    """The paired ratios, measured in processes that end with it."""
    from benchmarks import alone, peers

    function = functools.partial(getattr({"alone": alone, "peers": peers}[row.module], row.function), **row.options)
    rounds = min(rounds, row.rounds or rounds)
    if row.where == "process":
        return network.spawn(lambda: function(rounds), 1, "loopback")
    if row.where == "loopback":
        return network.spawn(lambda: function(None, rounds), 2, "loopback")
    return network.spawn(lambda: function(LINK, rounds), HOSTS, "up")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose text contains this")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=BENCHMARKS)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # the links' rows, within their network; takes the ratios
    options = parser.parse_args()
    chosen = [row for row in rows() if options.only in f"{row.where}: {row.what} over {row.against}"]
    if not chosen or options.rounds < 2:
        sys.exit(f"error: no row has {options.only!r} in it" if not chosen else "error: --rounds 2 or more")
    if options.inside:
        options.inside.write_text(json.dumps([run_and_say(row, options.rounds) for row in chosen if row.where == "links"]))
        return
    links, found = [row for row in chosen if row.where == "links"], []
    try:
        if links:
            with tempfile.NamedTemporaryFile() as file:
                again = ["--only", options.only, "--rounds", str(options.rounds), "--inside", file.name]
                if network.inside(HOSTS, RATE, "0ms", [sys.executable, "-m", "benchmarks", *again]):
                    sys.exit("error: no links; --only loopback and --only process do without")
                found += zip(links, json.loads(Path(file.name).read_text()))
        found += [(row, run_and_say(row, options.rounds)) for row in chosen if row.where != "links"]
    except (RuntimeError, subprocess.SubprocessError) as error:
        sys.exit(f"error: {error}")
    lines = []
    for row, ratios in found:
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        where = {"links": f"{HOSTS} hosts, {RATE}", "loopback": "2 processes, loopback", "process": "one process"}[row.where]
        lines.append({"what": row.what, "against": row.against, "where": where, "aim": row.aim, "ratio": round(middle, 4),
                      "low": round(low, 4), "high": round(high, 4), "rounds": len(ratios)})  # fmt: skip
    lines = pd.DataFrame(lines).assign(commit=folder.commit(), machine=machine())
    if options.out.exists():  # rows that were not measured now stay
        before, key = pd.read_csv(options.out), ["what", "against", "where"]
        lines = pd.concat([before[~before.set_index(key).index.isin(lines.set_index(key).index)], lines])
        order = {row.what: k for k, row in enumerate(rows())}
        lines = lines.assign(at=lines["what"].map(order)).sort_values(["at", "where"], kind="stable").drop(columns="at")
    write(options.out, lines.to_csv(index=False))
    print(f"wrote {options.out}")


def run_and_say(row: Row, rounds: int) -> list[float]:
    ratios = run(row, rounds)
    middle = statistics.median(ratios)
    mark = "ok" if middle <= row.aim else "MISSED"
    print(
        f"{row.where:9}{row.what} over {row.against}: {middle:.4f} ({min(ratios):.4f} to {max(ratios):.4f}), aim {row.aim:g}: {mark}",
        flush=True,
    )
    return ratios


if __name__ == "__main__":
    main()
