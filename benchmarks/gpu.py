"""Everything that a GPU has to show, in nine minutes: `python -m benchmarks.gpu`, to results/mine/data/gpu.csv.

    python -m benchmarks.gpu [--only correctness|resnet18|resnet50|transformer] [--device cpu --tiny] [--minutes 9] [--out FILE]

correctness    the iterates of every base and outer in float64 against plain loops on the CPU; of a ResNet in each of the ways below
               against one after another on the CPU; collectives of a process group of one rank (nccl)
resnet18, ...  what m folded replicas compute per second with SGP and SlowMo, τ = 12, one after another, compiled, as CUDA graphs, on
               several streams and by vmap, over one plain model with the same total batch at its better setting, eager or compiled;
               peak memory over the rows'; the hours of Table 1's CIFAR-10 column. bfloat16 autocast, channels_last, random data

Each part is a process of its own with its share of the time; what is measured is written down at once, a failure by its first line, and
the rest goes on. torch, torchvision and this repository suffice. The transformer is torch's, of fairseq's big one's sizes.
"""

import argparse
import csv
import dataclasses
import gc
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import CASES, TINY, Case
from benchmarks.iterates import PAIRS, collectives, loops, network, ours
from experiments import files

ROOT = Path(__file__).parent.parent
COLUMNS = ["part", "what", "m", "batch", "value", "unit", "ratio", "memory", "error", "commit", "machine"]  # those of results/store.py
SHARES = {"correctness": 0.2, "resnet18": 0.4, "resnet50": 0.2, "transformer": 0.2}  # of the time
WAYS = {  # what takes long, and may be cut off, last
    "one after another": {}, "CUDA graphs": {"graph": True}, "CUDA graphs on 4 streams": {"graph": 4}, "compiled": {"compile": True},
    "compiled, CUDA graphs": {"compile": True, "graph": True}, "vmap": {"vectorize": True},
}  # fmt: skip
AIM = 0.9  # of the plain model's pace
RUNS, ITERATIONS, PICTURES = 7 * 5, 2400, 4096  # Table 1's CIFAR-10 column: algorithms times seeds, and what each of them takes
ANCHORS = "elsewhere, plain: ResNet-18 on one A100 about 23,000 pictures/s; airbench96's network 44,000"


def seconds(step: Callable[[], object], tau: int, device: str, least: float) -> float:
    """Per iteration: the median over whole rounds of τ, at least so many seconds of them, after one that warms up."""
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - begun < least:
        start = time.perf_counter()
        for _ in range(tau):
            step()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / tau)
    return statistics.median(times[1:])


class Part:
    """The lines of one part: noted one by one in the file, in the place of those that it had there before."""

    def __init__(self, name: str, out: Path, device: str, budget: float, keep: bool = False):
        self.name, self.out, self.device, self.ends = name, out, device, time.monotonic() + budget
        lines = list(csv.DictReader(io.StringIO(files.read(out).decode()))) if out.exists() else []
        if lines and list(lines[0]) != COLUMNS:
            raise ValueError(f"{out} has other columns than a list of gpu: move it away")
        self.lines = [line for line in lines if keep or line["part"] != name]
        gpu = device if device == "cpu" else f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        self.about = {"part": name, "commit": files.commit() or "", "machine": f"{gpu}, torch {torch.__version__}"}

    def note(self, what: str, **found) -> None:
        self.lines.append(dict.fromkeys(COLUMNS, "") | self.about | {"what": what} | found)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.lines)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        files.write(self.out, text.getvalue())
        print(f"{self.name}: {what}: " + ", ".join(f"{key} {value}" for key, value in found.items() if value), flush=True)

    def attempt(self, what: str, call: Callable[[], dict], **facts) -> None:
        """Note what `call` finds, or the first line of its error."""
        try:
            if time.monotonic() > self.ends:
                raise TimeoutError("left out: the part's time was up")
            found = call()
        except Exception as error:  # whatever it is, the others go on
            found = {"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:300]}
        self.note(what, **facts, **found)
        if self.device != "cpu":  # for the next one
            gc.collect()
            torch.cuda.empty_cache()


def speed(part: Part, case: Case, least: float) -> None:
    """Items per second of the plain model and of each way to compute its replicas."""
    case = dataclasses.replace(case, device=part.device)
    plain, folded = [0.0], [0.0]

    def pace(step: Callable[[], object]) -> float:
        return case.items / seconds(step, case.tau, case.device, least)

    def one(compile: bool) -> dict:
        plain.append(pace(case.plain(compile)))
        for line in part.lines:  # those that were measured before
            if line["part"] == part.name and line["ratio"]:
                line["ratio"] = f"{float(line['value']) / max(plain):.4f}"
        return {"value": f"{plain[-1]:.6g}", "unit": case.unit}

    def all_(way: dict) -> dict:
        if case.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        step, rows = case.folded(**way)
        folded.append(pace(step))
        ratio = f"{folded[-1] / max(plain):.4f}" if max(plain) else ""
        memory = f"{torch.cuda.max_memory_allocated() / rows:.3f}" if case.device != "cpu" else ""
        return {"value": f"{folded[-1]:.6g}", "unit": case.unit, "ratio": ratio, "memory": memory}

    total = case.m * case.batch
    part.attempt(f"{case.what}: one plain model, eager", lambda: one(False), m=1, batch=total)
    for name, way in WAYS.items():
        if name == "compiled":
            part.attempt(f"{case.what}: one plain model, compiled", lambda: one(True), m=1, batch=total)
        part.attempt(f"{case.what}: {name}", lambda: all_(way), m=case.m, batch=total)
    if max(plain) and max(folded):
        print(f"{case.what}: folded over plain at its best: {max(folded) / max(plain):.3f}, aim {AIM}")
    if part.name == "resnet18" and max(folded):
        hours = RUNS * ITERATIONS * PICTURES / max(folded) / 3600
        part.note(f"{case.what}: Table 1's CIFAR-10 column, training alone", m=case.m, value=f"{hours:.3g}", unit="h")
        print(ANCHORS)


def correctness(part: Part) -> None:
    """How far iterates in float64 are from the CPU's."""

    def compared(what: str, expected: torch.Tensor, make: Callable[[], torch.Tensor]) -> None:
        def found() -> dict:
            apart = float((make() - expected).abs().max() / expected.abs().max())
            error = "" if apart < 1e-9 else "the iterates differ by more than rounding"
            return {"value": f"{apart:.3g}", "unit": "largest difference, relative", "error": error}

        part.attempt(what, found)

    for base, name in PAIRS:
        compared(f"{base}, {name}", loops(base, name), lambda: ours(base, name, part.device))
    expected = network("cpu")
    for name, way in WAYS.items():
        compared(f"ResNet, {name}", expected, lambda: network(part.device, **way))
    compared("a process group of one rank", loops("sgp", "slowmo, reset"), lambda: collectives(part.device))


def run(name: str, out: Path, device: str, tiny: bool, budget: float) -> None:
    """One part, in this process."""
    part = Part(name, out, device, budget)
    torch.backends.cudnn.benchmark = name != "correctness"
    if name == "correctness":
        correctness(part)
    else:
        speed(part, (TINY if tiny else CASES)[name], 0.0 if tiny else 3.0)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SHARES, help="this part, in this process")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small networks, to see that the command works")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=ROOT / "results/mine/data/gpu.csv")
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU: run this where there is one, or see that it works with --device cpu --tiny")
    if options.only:
        return run(options.only, options.out, options.device, options.tiny, 60 * options.minutes)
    ends, left = time.monotonic() + 57 * options.minutes, dict(SHARES)  # the rest of each minute is for starting and ending processes
    while left:
        limit = (ends - time.monotonic()) * left[next(iter(left))] / sum(left.values())  # what others leave is shared out anew
        name = next(iter(left))
        del left[name]
        command = [sys.executable, "-m", "benchmarks.gpu", "--only", name, "--device", options.device, "--out", str(options.out),
                   "--minutes", str(0.8 * limit / 60), *["--tiny"] * options.tiny]  # fmt: skip
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=limit).returncode
            error = f"the process ended with code {code}" if code else ""
        except subprocess.TimeoutExpired:
            error = f"cut off after {limit:.0f} s"
        if error:
            Part(name, options.out, options.device, 0, keep=True).note("the whole part", error=error)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
