"""What folding and SlowMo cost: an experiment's m workers in one process against m plain PyTorch loops over the same batches.

    python -m benchmarks.iteration experiment=cifar10_slowmo_sgp workers=8 task.batch_size=256 [--random] [--rounds 5] [--threads 2]
    python -m benchmarks.iteration experiment=wmt16_small_sgp

Words with = go to the experiment as on run.py's command line. --random: random pictures in the data's shape, no data needed.

Prints the ratio of an iteration (aim <= 1.05) and the share of SlowMo itself at tau = 12 (aim <= 1%); then pictures or tokens a second
beside one plain model with the same total batch, and how long the whole experiment would take. (What makes folding fast on a GPU, and
its memory there, is benchmarks.gpu's.) The sides alternate iteration by iteration in one process, so that noise of the machine hits all;
medians of paired ratios are printed with quartiles. The base is Local SGD, whose step is the optimizer's alone: messages are copies here
and cost no link.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf

import slowmo
from experiments.runner import build, config
from slowmo import outer

TAU = 12


class Step:
    """Both sides of an experiment, `words` as on run.py's command line. random: pictures without data."""

    def __init__(self, words: list[str], random: bool, device: str):
        self.device, self.words = torch.device(device), words
        with hydra.initialize_config_dir(str(Path(__file__).parent.parent / "configs"), version_base="1.3"):
            self.cfg = cfg = config.compose([*words, f"cluster.device={device}"]).cfg
        build.arithmetic(cfg.cluster)
        self.task, m = build.build(cfg.task), cfg.workers
        if random:
            batches = [pictures(self.task, self.device) for _ in range(m)]
        else:
            batches = list(self.task.batches(0, range(m), (0, 1)))
        self.own = [batches[i * self.task.pieces : (i + 1) * self.task.pieces] for i in range(m)]  # each worker's
        self.batches = self.whole = batches  # texts go through one after another
        if isinstance(batches[0][0], torch.Tensor):
            x, y = (torch.cat(part) for part in zip(*batches))
            self.whole = [(x.contiguous(memory_format=self.task.memory_format), y)]
        self.plain = [self.task.model() for _ in range(m)]
        self.optimizers = {fused: [self.optimizer(model.parameters(), fused) for model in self.plain] for fused in (False, True)}
        self.one = self.task.model()
        self.one_step = self.optimizer(self.one.parameters(), True)
        model = self.task.model()
        optimizer = self.optimizer(model.parameters(), True)
        self.replicas = slowmo.Replicas(model, slowmo.Cluster(m, self.device), optimizer.param_groups, accumulate=self.task.pieces)
        self.base = slowmo.LocalSGD(self.replicas, optimizer)
        self.outer = outer.SlowMo(self.base, tau=TAU, beta=0.6)
        self.outer.rebase()

    def optimizer(self, parameters, fused: bool):
        return build.build(OmegaConf.merge(self.cfg.optimizer, {"fused": fused}), list(parameters))

    def loops(self, fused: bool) -> None:
        for model, step, pieces in zip(self.plain, self.optimizers[fused], self.own):
            for piece in pieces:
                self.task.loss(model, piece).backward()
            step.step()
            step.zero_grad(set_to_none=True)

    def large_batch(self) -> None:
        for batch in self.whole:
            self.task.loss(self.one, batch).backward()
        self.one_step.step()
        self.one_step.zero_grad(set_to_none=True)

    def folded(self) -> None:
        self.base.start()
        for model, pieces in zip(self.replicas.models, self.own):
            for piece in pieces:
                self.task.loss(model, piece).backward()
        self.base.step()

    def slow(self) -> None:
        with torch.no_grad():
            for segment, x in zip(self.replicas.segments, self.base.average()):
                x0, u = self.outer.slow[segment]
                self.outer._update(x0, u, x, self.cfg.optimizer.lr)
                self.base.restart(segment, x0, self.outer.buffers)

    def seconds(self, call, *arguments) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call(*arguments)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def measure(self, rounds: int, say=lambda text: None) -> dict[str, list[float]]:
        """Seconds of each side in `rounds` rounds, after one that warms up."""
        times = {}
        for round_ in range(rounds + 1):
            calls = {"plain": (self.loops, False), "folded": (self.folded,), "plain fused": (self.loops, True)}
            order = list(calls)[:: 1 if round_ % 2 else -1]
            now = {name: self.seconds(*calls[name]) for name in order}
            now["one plain model"] = self.seconds(self.large_batch)
            now["slow step"] = self.seconds(self.slow)  # it resets the momentum, which the next step allocates anew
            now["first step after a reset"] = self.seconds(self.folded)
            if round_:
                for name, value in now.items():
                    times.setdefault(name, []).append(value)
                say(f"{round_}/{rounds}: " + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in now.items()))
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    it = Step(options.overrides, options.random, options.device)
    torch.set_num_threads(options.threads)
    times = it.measure(options.rounds, functools.partial(print, flush=True))

    def show(text, values):
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        print(f"{text:70}{middle:.4f}  ({low:.4f} to {high:.4f})")

    def ratios(a, b):
        return [x / y for x, y in zip(times[a], times[b])]

    print(f"{' '.join(options.overrides)}: m = {it.cfg.workers}, {torch.get_num_threads()} threads, {it.device}, torch {torch.__version__}")
    show("folded iteration over plain loops (torch's default optimizer)", ratios("folded", "plain"))
    show("folded iteration over plain loops (fused)", ratios("folded", "plain fused"))
    show(f"share of the slow step at tau = {TAU}", [s / TAU / f for s, f in zip(times["slow step"], times["folded"])])
    # its reset makes the next step allocate the momentum anew
    after = [(a - f) / TAU / f for a, f in zip(times["first step after a reset"], times["folded"])]
    show("share of what its reset costs the next step", after)
    show("folded iteration over one plain model with the same total batch", ratios("folded", "one plain model"))
    counted = isinstance(it.batches[0][0], torch.Tensor)
    total = sum(len(batch[1]) if counted else int(batch[0]["ntokens"]) for batch in it.batches)
    steps = build.steps(it.cfg, it.task)
    for name in ("folded", "one plain model"):
        pace = statistics.median(times[name])
        unit = "pictures" if counted else "target tokens"
        print(f"{name}: {total / pace:,.0f} {unit}/s; {steps:,} such iterations: {steps * pace / 3600:.2f} hours")


def pictures(task, device):
    size = getattr(task, "size", 32)
    x = torch.randn(task.batch, 3, size, size, dtype=task.dtype, device=device).contiguous(memory_format=task.memory_format)
    return x, torch.randint(0, 10, (task.batch,), device=device)


if __name__ == "__main__":
    main()
