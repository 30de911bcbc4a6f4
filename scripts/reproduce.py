"""Fill the paper's tables: plan what is done and what is missing, run the missing, collect, and make tables, figures and verdicts anew.

    python scripts/reproduce.py table1 --data cifar10_small             Table 1 on the stand-in: 35 runs
    python scripts/reproduce.py table1 table2 fig3 ablations --data cifar10_small --dry-run
    python scripts/reproduce.py table1 --data imagenet --launcher slurm_dgx1 --seeds 1,2,3 -- data.root=FOLDER

    python scripts/reproduce.py looks --data cifar10_small_loss --most 20 --publish

`looks` runs the cells of primary claims to the first look of results/protocol.md, then those of a claim that is undecided to the next one,
up to --most seeds. With --publish each run that ends is put into results/data/, which is committed.

What follows `--` goes to every run. A run that diverged is an outcome as any; after one that failed the others go on, and the table at
the end says what became of each. Asking again takes up what is missing or was stopped. Done is what stands in runs/: in a fresh clone
everything is missing. Without --publish the end is in results/mine/, beside the published numbers.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).parent.parent
stopping = threading.Event()  # Ctrl-C came
sys.path.insert(0, str(ROOT))

from experiments.runner.run_dir import IGNORED_KEYS  # noqa: E402
from results import claims, collect, tables  # noqa: E402
from results.inference import LOOKS  # noqa: E402
from results.store import MINE, PUBLISHED, RunId, Runs  # noqa: E402
from results.tables import SMALL, layout  # noqa: E402

EACH = ("table1", "best", "nll", "table2", "noaverage", "double", "tau", "alpha", "beta", "buffers", "allreduce", "siblings", "joint")
LAUNCHERS = sorted(path.stem for path in (ROOT / "configs/launch").glob("*.yaml"))
TABLES = {key: (key,) for key in EACH} | {"fig3": ("tau",), "ablations": EACH[4:]}
STATUS = {0: "done", 2: "refused", 3: "diverged"}  # run.py's exit codes; above 128 a signal's
DATA = {"paper": tuple(SMALL.values()), "small": tuple(SMALL)} | {name: (name,) for pair in SMALL.items() for name in pair}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=(*TABLES, "looks"))
    parser.add_argument("--data", choices=DATA, default="cifar10_small")
    parser.add_argument("--seeds", help="as in 1,2,3; by default as many as the table wants")
    parser.add_argument("--most", type=int, choices=LOOKS, default=LOOKS[-1], help="seeds of a cell at which `looks` ends")
    parser.add_argument("--publish", action="store_true", help="put what ends into what is committed")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="inprocess", help="launch=... of each run")
    parser.add_argument("--jobs", type=int, help="runs at once; by default 2, on a cluster all")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    options, extra = parsed(parser)
    if options.seeds and min(options.seeds) < 1:
        parser.error("--seeds: tables count those from 1 on, others are for tuning")
    for word in extra:
        key = word.lstrip("+~").partition("=")[0]
        if key in ("seed", "dry_run", "runs", "experiment"):
            parser.error(f"-- {word}: say that before --" if key == "seed" else f"-- {word}: a cell's own run is asked for")
        if not f"{key}.".startswith(IGNORED_KEYS):
            print(f"-- {word} gives runs other names: no table of these shows them", file=sys.stderr)
    data, ended = DATA[options.data], []
    if not options.launcher.startswith("slurm"):
        os.nice(10)  # hours in the background of other work
    tables_wanted = [key for key in options.what if key != "looks"]
    jobs = wanted(tables_wanted, data, options.seeds) if tables_wanted else []
    if "looks" in options.what and not options.dry_run and (ROOT / "runs").is_dir():
        gather(options)  # what has ended without being asked for here counts too
    while True:
        done, paces = known()
        if options.publish:  # a second line of a run would take both out of the count
            done |= {*Runs(PUBLISHED, required=False).ended[["run", "seed"]].itertuples(index=False, name=None)}
        if "looks" in options.what:
            jobs = [*dict.fromkeys((*jobs, *next_look(data, PUBLISHED if options.publish else MINE, options.most)))]
        done |= {job for job, *_ in ended}  # whatever became of it, it is not tried again
        missing = [job for job in jobs if job not in done]
        show(jobs, missing, paces)
        if options.dry_run or not missing:
            break
        ended += run_all(missing, options, extra)
        if "looks" not in options.what or stopping.is_set():
            break
    if options.dry_run:
        return 0
    code = subprocess.run([sys.executable, "-m", "results", "all", *publish(options)], cwd=ROOT).returncode
    if ended:
        print(table(ended))
    return code if all(status in ("done", "diverged") for _, status, *_ in ended) else 1


def parsed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The options, --seeds as numbers, and what follows `--`."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    try:
        options.seeds = options.seeds if options.seeds is None else [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {options.seeds}: whole numbers with commas, like 1,2,3")
    return options, words[end + 1 :]


def wanted(what: list[str], data: tuple[str, ...], seeds: list[int] | None) -> list[tuple[str, int]]:
    """(run, seed) of every cell, each once, seed after seed: what is stopped early has all cells with fewer seeds."""
    chosen = [table for name in data for table in layout(name) if any(table.key in TABLES[key] for key in what)]
    if not chosen:
        sys.exit("no such table for these data")
    of_table = [(seed, run) for table in chosen for seed in seeds or range(1, table.seeds + 1) for _, run, _ in table.rows]
    return [(run, seed) for seed, run in sorted(dict.fromkeys(of_table), key=lambda pair: pair[0])]


def next_look(data: tuple[str, ...], store, most: int) -> list[tuple[str, int]]:
    """(run, seed) up to the next look of the cells of primary claims: those that are undecided, before the first look all."""
    jobs, runs = set(), Runs(store, required=False)
    for found in (found for name in data for found in claims.judgements(name, runs) if found.claim.kind == claims.PRIMARY):
        # where a run diverged more seeds will not change that
        if found.seeds < LOOKS[0] or (found.verdict == claims.UNDECIDED and not found.diverged):
            look = min(most, next((look for look in LOOKS if look > found.seeds), most))
            jobs |= {(seed, run) for run in found.cells for seed in range(1, look + 1)}
    return [(run, seed) for seed, run in sorted(jobs)]


def gather(options) -> None:
    """Put what has ended into the list."""
    subprocess.run([sys.executable, "-m", "results", "collect", *publish(options)], cwd=ROOT, capture_output=True)


def publish(options) -> list[str]:
    return ["--publish"] if options.publish else []


def known() -> tuple[set, dict]:
    """Runs that ended, by runs/; and of each run, by any seed, here or published, (seconds per iteration, iterations)."""
    done, paces = set(), {}
    for path in sorted((ROOT / "runs").glob("*/seed*/result.json")):
        try:
            line, _ = collect.read(path.parent)
            collect.check_settings(path.parent)
        except Exception as error:  # damaged in whatever way: to be run, or named by it
            print(f"{path.parent} counts as missing: {error}", file=sys.stderr)
            continue
        done.add((line["run"], line["seed"]))
        paces[line["run"]] = line["seconds_per_iteration"], line["step"]
    if PUBLISHED.has("runs"):
        means = Runs(PUBLISHED).ended.groupby("run")[["seconds_per_iteration", "step"]].mean()
        paces = dict(zip(means.index, means.itertuples(index=False, name=None))) | paces
    return done, paces


def show(jobs, missing, paces) -> None:
    """The plan: runs, and their cost as far as runs before them tell."""
    guesses = {run: seconds(run, paces) for run in dict.fromkeys(run for run, _ in jobs)}
    for run, guess in guesses.items():
        seeds = [str(seed) for name, seed in missing if name == run]
        cost = f"{guess / 60:.1f} minutes each" if guess else target(run)
        print(f"{run:55} " + (f"missing: seed {', '.join(seeds)}; {cost}" if seeds else "done"))
    costs = [guesses[run] for run, _ in missing if guesses[run]]
    total = f", about {sum(costs) / 3600:.1f} hours of training" if costs else ""
    print(
        f"{len(jobs) - len(missing)} of {len(jobs)} runs done{total}" + f" for {len(costs)} of the others" * (0 < len(costs) < len(missing))
    )


def seconds(run: str, paces: dict) -> float | None:
    """What a run will take: as it took before, or as its experiment's own run did, iteration by iteration."""
    experiment, overrides = RunId.parse(run)
    pace, steps = paces.get(run) or paces.get(experiment) or (None, None)
    length = [int(word.removeprefix("steps=")) for word in overrides if word.startswith("steps=")]
    return pace and pace * (length[0] if length else steps)


def target(run: str) -> str:
    """The cost that the experiment's file names."""
    config = yaml.safe_load((ROOT / f"configs/experiment/{RunId.parse(run).experiment}.yaml").read_text())
    return config.get("target", {}).get("cost", "cost unknown")


def command(job: tuple[str, int]) -> list[str]:
    run, seed = job
    return tables.command(run, [seed]).split()[1:]


def table(ended) -> str:
    """What became of each run."""
    counts = Counter(status for _, status, *_ in ended)
    names = [f"{run} seed {seed}" for (run, seed), *_ in ended]
    width = max(map(len, names))
    lines = [f"{len(ended)} runs: {', '.join(f'{count} {status}' for status, count in counts.items())}"]
    for name, (_, status, minutes, words) in zip(names, ended):
        lines.append(f"  {status:12}{name:{width}}{minutes:8.1f} min  {'' if status == 'done' else words}".rstrip())
    return "\n".join(lines)


def run_all(missing, options, extra) -> list:
    """Run them, so many at once; (job, status, minutes, last words) of each. Ctrl-C: each saves and stops, nothing new starts.

    SIGTERM makes a run.py that follows a job of SLURM's cancel it (launch.follow).
    """
    cluster = options.launcher.startswith("slurm")
    words = [f"launch={options.launcher}", *(["launch.wait=true"] if cluster else []), *extra]
    children, collecting = set(), threading.Lock()
    live = Console().is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())

    def one(job):
        if stopping.is_set():
            return job, "not started", 0.0, ""
        started = time.monotonic()
        # a session of its own: Ctrl-C comes once, from here
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        child = subprocess.Popen([sys.executable, *command(job), *words], cwd=ROOT, **pipes)
        children.add(child)
        said, _ = child.communicate()
        children.discard(child)
        with collecting:  # what ended is kept, whatever comes
            gather(options)
        status = STATUS.get(child.returncode, "stopped" if child.returncode > 128 else "failed")
        # a run says its error, or that it diverged, before its last line
        lines = [line for line in said.splitlines() if line.startswith(("error: ", "diverged "))] or said.strip().splitlines()
        outcome = job, status, (time.monotonic() - started) / 60, (lines or ["no words"])[-1]
        progress.advance(task)
        if not live or status != "done":
            state = "done" if status == "done" else f"{status} (exit code {child.returncode}): {outcome[3]}"
            progress.console.print(f"{job[0]} seed {job[1]}: {state}, {outcome[2]:.1f} minutes", highlight=False)
        return outcome

    with Progress(*columns, disable=not live) as progress, ThreadPoolExecutor(options.jobs or (len(missing) if cluster else 2)) as pool:
        task = progress.add_task("runs", total=len(missing))
        futures = [pool.submit(one, job) for job in missing]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt:
            stopping.set()
            for child in list(children):
                child.terminate()
            jobs = ", and their jobs are cancelled" * cluster
            progress.console.print(f"stopping: runs save first{jobs}; the same command goes on from there")
    return [future.result() for future in futures]


if __name__ == "__main__":
    sys.exit(main())
