"""Our iterations against limits and peers: one table of ratios, results/mine/data/benchmarks.csv.

    python -m benchmarks [--only WORDS] [--rounds 6] [--hosts 8] [--out results/data/benchmarks.csv, which is published]

Emulated links want root (benchmarks/links/network.sh); --only loopback, --only process leave them out. All of it takes twenty
minutes on two cores, which should have nothing else to do. A ratio is the median of paired rounds, with quartiles; each row is written
down when it is measured, and what was not measured now stays.
"""

import argparse
import dataclasses
import functools
import importlib.util
import statistics
import sys
from pathlib import Path

import pandas as pd

from benchmarks import ranks
from benchmarks.table2 import machine
from experiments.files import commit
from results.cost_model import number
from results.store import MINE, read, write

HOSTS, RATE = (4, 8), "400mbit"
KEY = ["what", "against", "where"]


@dataclasses.dataclass(frozen=True)
class Row:
    """what over against, where: links, loopback or process; aim: the ratio it is to stay below; by module.function(**options)."""

    what: str
    against: str
    where: str
    aim: float
    module: str
    function: str
    options: dict = dataclasses.field(default_factory=dict)
    rounds: int | None = None

    def key(self, hosts: int) -> tuple[str, str, str]:
        """Its line in the table: KEY."""
        places = {"links": f"{hosts} hosts, {RATE}", "loopback": "2 processes, loopback", "process": "one process"}
        return self.what, self.against, places[self.where]


def keys() -> list[tuple[str, str, str]]:
    """Every line that the table may have, in its order."""
    return list(dict.fromkeys(row.key(hosts) for hosts in HOSTS for row in rows()))


def rows() -> list[Row]:
    out = []
    for where in ("links", "loopback"):
        peer = functools.partial(Row, where=where, module="vs_peers")
        out.append(peer("AllReduce", "torch's DistributedDataParallel", aim=1.0, function="allreduce"))
        for name, base, aim in (("Local SGD", "localsgd", 0.97), ("SGP", "sgp", 0.80)):
            out.append(peer(f"{name} + SlowMo, τ = 12", "fairscale's SlowMoDistributedDataParallel", aim=aim, function="fairscale",
                            options={"base": base}))  # fmt: skip
        out.append(peer("Local SGD, τ = 12", "torch's PostLocalSGDOptimizer", aim=0.97, function="local_sgd"))
        for name, base in (("Local SGD", "local_sgd"), ("SGP", "sgp"), ("OSGP", "osgp")):
            for tau, aim in ((12, 1.01), (48, 1.005))[: 2 if where == "links" else 1]:
                out.append(peer(f"{name} + SlowMo, τ = {tau}", name, aim=aim, function="over_base", options={"base": base, "tau": tau},
                                rounds=4 if tau == 48 else None))  # fmt: skip
    link = functools.partial(Row, where="links", module="vs_peers")
    for name, base, outer, aim in (("SGP", "sgp", False, 1.06), ("Local SGD + SlowMo, τ = 12", "local_sgd", True, 1.015)):
        out.append(link(name, "computation alone", aim=aim, function="over_computation", options={"base": base, "outer": outer}))
    out.append(link("SGP, one message after backward", "computation alone", aim=1.4, function="over_computation",
                    options={"base": "sgp", "overlap": False}))  # fmt: skip
    out.append(link("SGP + SlowMo, τ = 12", "our AllReduce during backward", aim=0.97, function="over_allreduce"))
    out.append(link("SGP, message longer than backward", "forward and the message", aim=1.05, function="long_message"))
    out.append(link("gossip", "its bytes at the link's rate", aim=1.1, function="wire"))
    out.append(link("exact average", "2 (m - 1)/m of its bytes at the link's rate", aim=1.15, function="wire", options={"what": "average"}))
    out.append(link("OSGP, computation longer", "computation alone", aim=1.05, function="overlap"))
    out.append(link("OSGP, message longer", "messages alone", aim=1.05, function="overlap_of_messages"))
    alone = functools.partial(Row, where="process", module="single_process")
    for kind, options in (("torch's default SGD", {}), ("fused SGD", {"fused": True})):
        out.append(alone("8 ResNet-18 workers folded, batch 8", f"8 plain loops, {kind}", aim=1.0, function="folding", options=options))
    out.append(alone("SlowMo's own work, τ = 12, 8 folded ResNet-18", "Local SGD's iteration", aim=1.02, function="slow_step"))
    out.append(alone("32 workers of ResNet-8, width 16, batch 8, 8x8, at once", "the loop over them", aim=0.4, function="together"))
    out.append(alone("one worker, SlowMo, τ = 12, ResNet-18, batch 32", "the plain optimizer", aim=1.01, function="one_worker"))
    for name, base in (("Local SGD", "local_sgd"), ("SGP", "sgp"), ("OSGP", "osgp")):
        bound = f"rows (1 + gradient + momentum{' + inbox' if base == 'osgp' else ''}) + 2 d"
        out.append(alone(f"memory at its peak, {name} + SlowMo, m = 32", bound, aim=1.04, function="memory", options={"base": base},
                         rounds=1))  # fmt: skip
    return out


def run(row: Row, rounds: int, hosts: int) -> list[float]:
    """The paired ratios, measured in processes that end with it."""
    function = functools.partial(getattr(importlib.import_module(f"benchmarks.{row.module}"), row.function), **row.options)
    rounds = min(rounds, row.rounds or rounds)
    if row.where == "process":
        return ranks.spawn(lambda: function(rounds), 1, "loopback")
    if row.where == "loopback":
        return ranks.spawn(lambda: function(None, rounds), 2, "loopback")
    return ranks.spawn(lambda: function(number(RATE), rounds), hosts, "up")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose text contains this")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--hosts", type=int, default=HOSTS[0], choices=HOSTS, help="of the links")
    parser.add_argument("--out", type=Path, default=MINE.path("benchmarks"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the links' rows alone, within their network
    options = parser.parse_args()
    chosen = [row for row in rows() if options.only in f"{row.where}: {row.what} over {row.against}"]
    if not chosen or options.rounds < 2:
        sys.exit(f"error: no row has {options.only!r} in it" if not chosen else "error: --rounds 2 or more")
    if any(row.function == "fairscale" for row in chosen) and importlib.util.find_spec("fairscale") is None:
        sys.exit('error: a peer is missing, fairscale: pip install -e ".[oracles]"')
    links, failed = [row for row in chosen if row.where == "links"], False
    if links and not options.inside:
        failed |= ranks.inside(options.hosts, RATE, "0ms", [sys.executable, "-m", "benchmarks", *sys.argv[1:], "--inside"]) != 0
    for row in links if options.inside else [row for row in chosen if row.where != "links"]:
        try:
            ratios = run(row, options.rounds, options.hosts)
        except RuntimeError as error:
            print(f"error: {row.where}: {row.what}: {error}", file=sys.stderr)
            failed = True
            continue
        note(row, ratios, options.out, options.hosts)
    sys.exit(1 if failed else 0)


def note(row: Row, ratios: list[float], out: Path, hosts: int) -> None:
    """Say it and put it into `out`, in the place of what stood there; lines of rows that are no more go."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    line = dict(zip(KEY, row.key(hosts))) | {"aim": row.aim, "ratio": round(middle, 4), "low": round(low, 4), "high": round(high, 4),
                                             "rounds": len(ratios), "commit": commit(), "machine": machine()}  # fmt: skip
    lines = pd.DataFrame([line])
    if out.exists():
        order = {key: k for k, key in enumerate(keys())}
        before = read(out, "benchmarks").set_index(KEY)
        kept = before[before.index.isin(order) & ~before.index.isin(lines.set_index(KEY).index)].reset_index()
        lines = pd.concat([part for part in (kept, lines) if len(part)])
        lines = lines.assign(at=lines.set_index(KEY).index.map(order)).sort_values("at").drop(columns="at")
    write(out, "benchmarks", lines)
    mark = "ok" if middle <= row.aim else "MISSED"
    words = f"{line['where']}: {row.what} over {row.against}: {middle:.4f} ({low:.4f} to {high:.4f}), aim {row.aim:g}: {mark}"
    print(words, flush=True)


if __name__ == "__main__":
    main()
