"""Run folders -> runs.csv, a line a run, and curves.csv beside it, a line an evaluation of the runs that ended.

Strict: a folder whose files are damaged or do not agree is named and left out; NaN is a run that diverged, never a number. Lines of runs
that are no longer on this disk stay: what is published is committed, and runs come from many machines.
"""

import fcntl
import functools
import os
import re
import struct
import sys
import threading
from pathlib import Path

import pandas as pd
import yaml
from omegaconf import OmegaConf

from experiments import files
from results.store import COLUMNS, KEY, METRICS, RunId, Store
from results.tables import CONFIGS

_composing = threading.Lock()  # Hydra is one for all threads
FILES = ("config.yaml", "metrics.jsonl", "result.json")  # any of them makes a folder a run's


def main(runs: Path, store: Store) -> None:
    """Read every run below `runs`, put them into `store`, say what was found and what was left out.

    Raises FileNotFoundError where there is no such folder or no run in it, ValueError for files at these places that are none of ours.
    """
    if not runs.is_dir():
        raise FileNotFoundError(f"no folder {runs}: name the folder of all runs with --runs, or run something first")
    found = (path for name in FILES for path in runs.rglob(name))
    folders = sorted({path.parent for path in found if not any(part.startswith(".old-") for part in path.parts)})
    if not folders and not refused(runs):
        raise FileNotFoundError(f"no run below {runs}: python run.py experiment=... makes one; {store.path('runs')} stays as it is")
    found, complaints, others = {}, [], []
    for path in folders:
        try:
            line, rows = read(path)
            try:
                check_settings(path)
            except ValueError:
                others.append(tuple(line.get(name) for name in KEY))
                raise
        except KeyError as error:
            complaints.append(f"left out: {path}: its files know no {error}: another version wrote them, run it again")
        except Exception as error:  # anything can stand in a file that is damaged: it is named, and the others are collected
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            complaints.append(f"left out: {path}: {first}")
        else:
            found.setdefault((line["run"], line["seed"]), []).append((path, line, rows))
    lines, curves = [], []
    for (run, seed), claimed in found.items():
        if len(claimed) > 1:
            complaints.append(f"left out: {run} seed {seed}: in {' and in '.join(str(path) for path, *_ in claimed)}: keep one of them")
            continue
        lines.append(claimed[0][1])
        curves += [{**row, "run": run, "seed": seed, "commit": lines[-1].get("commit")} for row in claimed[0][2]]
    lines = merged(pd.DataFrame(lines, columns=COLUMNS["runs"]), store, others)
    curves = pd.DataFrame(curves, columns=COLUMNS["curves"])
    if store.has("curves"):
        before = store.read("curves")
        # of a run collected before, unless its line went
        known = pd.MultiIndex.from_frame(lines[KEY]).difference(pd.MultiIndex.from_frame(curves[KEY].drop_duplicates()))
        curves = pd.concat([part for part in (before[before.set_index(KEY).index.isin(known)], curves) if len(part)] or [curves])
    out = store.write("runs", lines)
    store.write("curves", curves.sort_values([*KEY, "step"], kind="stable"))
    counts = ", ".join(f"{count} {status}" for status, count in lines["status"].value_counts().sort_index().items())
    print(f"wrote {out}: {len(lines)} runs" + f" ({counts})" * bool(counts))
    for text in (*complaints, *refused(runs)):
        print(text, file=sys.stderr)


def check_settings(path: Path, but: tuple[str, ...] = ()) -> None:
    """ValueError for a run whose experiment says something else now: it is not a seed of the same run any more.

    What the run's name says, and whatever depends on that, may differ; so may keys that begin as `but`.
    """
    from experiments.runner.config import flat  # imports torch
    from experiments.runner.run_dir import IGNORED_KEYS

    run, has = RunId.parse(path.parent.name), flat(OmegaConf.create(config(path)))
    typed = tuple(word.partition("=")[0].replace("/", ".") for word in run.overrides)
    if run.overrides and re.fullmatch("[0-9a-f]{12}", run.overrides[-1]):  # a long name was cut off
        return
    for key, value in settings(run.experiment).items():
        named = any(key == word or key.startswith(f"{word}.") for word in typed)
        if not named and not key.startswith((*IGNORED_KEYS, *but)) and key in has and has[key] != value:
            raise ValueError(f"{key} is {has[key]} in it and {value} in {run.experiment} now: move it away, and run it again")


@functools.cache
def settings(experiment: str) -> dict:
    """The experiment's keys with what they stand for, but for those that follow other keys; none of a user's own, which is elsewhere."""
    if not (CONFIGS / f"experiment/{experiment}.yaml").exists():
        return {}
    import hydra

    from experiments.runner.config import compose, flat

    with _composing, hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        found = flat(compose([f"experiment={experiment}"]).cfg)
    return {key: value for key, value in found.items() if not (isinstance(value, str) and "${" in value)}


def merged(lines: pd.DataFrame, store: Store, others: list[tuple]) -> pd.DataFrame:
    """These lines and those of `store` that they do not bring up to date. others: (run, seed, commit) that are no runs of these cells."""
    if store.has("runs"):
        before = store.read("runs")
        before = before[~before.set_index(KEY).index.isin(others)] if others else before
        same = before.set_index(["run", "seed"]).index.isin(lines.set_index(["run", "seed"]).index)
        # a run that was not finished when it was collected is the same run, whatever commit it stood at
        stale = same & (before.set_index(KEY).index.isin(lines.set_index(KEY).index) | ~before["status"].isin(("done", "diverged")))
        kept = before[~stale]
        lines = pd.concat([kept, lines], ignore_index=True) if len(kept) else lines
    return lines.sort_values(KEY, kind="stable")


def read(path: Path) -> tuple[dict, list[dict]]:
    """A run folder's line, and the rows of its evaluations if it ended.

    Raises, with words for whoever has the folder, where a file is missing, damaged or of another run: KeyError where another version
    wrote it, else ValueError or whatever a damaged file provokes.
    """
    cfg = config(path)
    line = {"run": path.parent.name, "seed": cfg["seed"], "data": cfg["data"]["name"] if "data" in cfg["task"] else None,
            "workers": cfg["workers"], "clock": "measured"}  # fmt: skip
    if not (path / "result.json").exists():  # best over training is known at its end alone
        rows = _rows(path) if (path / "metrics.jsonl").exists() else []
        last = rows[-1] if rows else {}
        line |= {f"{name}_last": last.get(name) for name in METRICS}
        return line | {"status": "running" if _locked(path) else "stopped", "step": last.get("step", 0)}, []
    result, rows = _mapping(path / "result.json", _json(_text(path / "result.json"), "result.json")), _rows(path)
    if result["status"] not in ("done", "diverged"):
        raise ValueError(f"result.json has the status {result['status']}")
    if not rows:
        raise ValueError("metrics.jsonl is empty, though the run has ended: run it again")
    if result["seed"] != cfg["seed"] or result["step"] != rows[-1]["step"]:
        raise ValueError("result.json, metrics.jsonl and config.yaml are not of one run")
    by_step = {row["step"]: row for row in rows}
    for name, best in result["best"].items():
        if by_step.get(best["step"], {}).get(name) != best["value"]:
            raise ValueError(f"metrics.jsonl lacks the best {name} of result.json, of step {best['step']}: rows were lost or changed")
    line |= {name: result[name] for name in ("experiment", "status", "step", "processes", "seconds_per_iteration", "commit")}
    hardware = result["hardware"]
    line |= {"device": hardware.get("gpu", hardware["device"]), "threads": hardware["threads"], "torch": result["versions"]["torch"]}
    for name in METRICS:
        line[f"{name}_best"] = result["best"].get(name, {}).get("value")
        line[f"{name}_last"] = (result["last"] or {}).get(name) if result["status"] == "done" else None
    line["accuracy_error"] = result.get("cells", {}).get("accuracy_error")  # of the last accuracy, over the cells that patches come from
    for subset, facts in result.get("bleu", {}).items():
        line |= {f"bleu_{subset}": facts["bleu"], "bleu_signature": facts["signature"]}
    if problems := files.damaged(path):  # what reads well may have been changed, and models and iterates are not read here
        raise ValueError(f"{'; '.join(problems)}: the same command makes it anew")
    return line, [row for row in rows if not row.get("diverged")]


def config(path: Path) -> dict:
    """A run folder's resolved config."""
    text = _text(path / "config.yaml")
    try:
        return _mapping(path / "config.yaml", OmegaConf.to_container(OmegaConf.create(text), resolve=True))
    except yaml.YAMLError as error:
        raise ValueError(f"config.yaml is no YAML: {str(error).splitlines()[0]}") from None


def _rows(path: Path) -> list[dict]:
    rows = [_mapping(path / "metrics.jsonl", _json(text, "metrics.jsonl")) for text in _text(path / "metrics.jsonl").splitlines()]
    for name in ("step", "epoch", "seconds"):
        if not all(isinstance(row[name], (int, float)) for row in rows):
            raise ValueError(f"metrics.jsonl: {name} is no number")
    return rows


def _text(path: Path) -> str:
    """Of a regular file: opening a fifo would wait for ever."""
    if not path.is_file():
        raise ValueError(f"{path.name} is {'no file' if os.path.lexists(path) else 'missing'}")
    return path.read_text(encoding="utf-8")


def _mapping(path: Path, value) -> dict:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path.name} holds {type(value).__name__ if value else 'nothing'} where names and values should stand")
    return value


def refused(runs: Path) -> list[str]:
    """Jobs of SLURM's that ended with an error, in their own words: what never began has no folder."""
    said = []
    for path in sorted((runs / "slurm").glob("*/*_0_log.err")):
        errors = [line for line in path.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        if errors:
            said.append(f"failed: job {path.name.removesuffix('_0_log.err')}: {errors[-1].removeprefix('error: ')}")
    return said


def _json(text: str, name: str):
    """JSON as it is defined; what is wrong names the file."""
    try:
        return files.parse(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _locked(path: Path) -> bool:
    """Whether a process is at the run, as far as locks reach. Asked without taking the lock (fcntl(2), F_GETLK)."""
    try:
        with open(path / ".lock", "r+") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except FileNotFoundError:
        return False
    return struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK
