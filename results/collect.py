"""Run folders -> results/runs.csv, a line a run.

Strict: a folder whose files are damaged or do not agree is named and left out; NaN is a run that diverged, never a number. Lines of runs
that are no longer on this disk stay: the file is committed, and runs come from many machines.
"""

import fcntl
import json
import os
import struct
import sys
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

METRICS = ("train_loss", "validation_loss", "nll", "nll_base2", "accuracy", "top5")
KEY = ["run", "seed", "commit"]
COLUMNS = [
    "run", "seed", "experiment", "status", "step", "data", "workers", "processes", "device", "threads", "seconds_per_iteration", "clock",
    *(f"{name}_{when}" for name in METRICS for when in ("best", "last")), "bleu_valid", "bleu_test", "bleu_signature", "commit", "torch",
]  # fmt: skip


def main(runs: Path, out: Path) -> None:
    """Read every run below `runs`, put them into `out`, say what was found and what was left out.

    Raises FileNotFoundError where there is no such folder, ValueError for a file at `out` that is none of ours.
    """
    if not runs.is_dir():
        raise FileNotFoundError(f"no folder {runs}: name the folder of all runs with --runs, or run something first")
    lines, complaints = [], []
    for path in sorted(path.parent for path in runs.rglob("config.yaml")):
        try:
            lines.append(read(path))
        except (ValueError, KeyError, TypeError, OSError) as error:
            complaints.append(f"left out: {path}: {error}")
    lines = pd.DataFrame(lines, columns=COLUMNS)
    if out.exists():
        before = pd.read_csv(out, dtype={"commit": str})
        if list(before.columns) != COLUMNS:
            raise ValueError(f"{out} has other columns than a list of runs: name another file with --out, or move this one")
        stale = before["run"].isin(lines["run"]) & before.set_index(["run", "seed"]).index.isin(lines.set_index(["run", "seed"]).index)
        # a run that was not finished when it was collected is the same run, whatever commit it stood at
        stale &= before.set_index(KEY).index.isin(lines.set_index(KEY).index) | ~before["status"].isin(("done", "diverged"))
        kept = before[~stale]
        lines = pd.concat([kept, lines], ignore_index=True) if len(kept) else lines
    lines = lines.sort_values(KEY, kind="stable")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_suffix(".partial")
    lines.to_csv(aside, index=False)
    os.replace(aside, out)
    counts = ", ".join(f"{count} {status}" for status, count in lines["status"].value_counts().sort_index().items())
    print(f"wrote {out}: {len(lines)} runs" + f" ({counts})" * bool(counts))
    for text in (*complaints, *refused(runs)):
        print(text, file=sys.stderr)


def read(path: Path) -> dict:
    """A run folder's line. ValueError, KeyError, TypeError or OSError for one that is damaged."""
    cfg = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"), resolve=True)
    line = {"run": path.parent.name, "seed": cfg["seed"], "data": cfg["data"]["name"] if "data" in cfg["task"] else None,
            "workers": cfg["workers"], "clock": "measured"}  # fmt: skip
    rows = []
    if (path / "metrics.jsonl").exists():
        rows = [_json(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
    if not (path / "result.json").exists():  # best over training is known at its end alone
        last = rows[-1] if rows else {}
        line |= {f"{name}_last": last.get(name) for name in METRICS}
        return line | {"status": "running" if _locked(path) else "stopped", "step": last.get("step", 0)}
    result = _json((path / "result.json").read_text())
    if result["status"] not in ("done", "diverged"):
        raise ValueError(f"result.json has the status {result['status']}")
    if result["seed"] != cfg["seed"] or result["step"] != rows[-1]["step"]:
        raise ValueError("result.json, metrics.jsonl and config.yaml are not of one run")
    line |= {name: result[name] for name in ("experiment", "status", "step", "processes", "seconds_per_iteration", "commit")}
    hardware = result["hardware"]
    line |= {"device": hardware.get("gpu", hardware["device"]), "threads": hardware["threads"], "torch": result["versions"]["torch"]}
    for name in METRICS:
        line[f"{name}_best"] = result["best"].get(name, {}).get("value")
        line[f"{name}_last"] = (result["last"] or {}).get(name) if result["status"] == "done" else None
    for subset, facts in result.get("bleu", {}).items():
        line |= {f"bleu_{subset}": facts["bleu"], "bleu_signature": facts["signature"]}
    return line


def refused(runs: Path) -> list[str]:
    """Jobs of SLURM's that ended with an error, in their own words: what never began has no folder."""
    said = []
    for path in sorted((runs / "slurm").glob("*/*_0_log.err")):
        errors = [line for line in path.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        if errors:
            said.append(f"failed: job {path.name.removesuffix('_0_log.err')}: {errors[-1].removeprefix('error: ')}")
    return said


def _json(text: str):
    """JSON as it is defined: NaN and Infinity are none."""

    def refuse(name):
        raise ValueError(f"{name} is no number")

    return json.loads(text, parse_constant=refuse)


def _locked(path: Path) -> bool:
    """Whether a process is at the run, as far as locks reach. Asked without taking the lock (fcntl(2), F_GETLK)."""
    try:
        with open(path / ".lock", "r+") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except FileNotFoundError:
        return False
    return struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK
