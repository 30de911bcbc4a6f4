"""What folding and SlowMo cost: an experiment's m workers in one process against m plain PyTorch loops over the same batches.

    python scripts/benchmark_step.py experiment=cifar10_slowmo_sgp workers=8 task.batch_size=256 [--random] [--rounds 5] [--threads 2]
    python scripts/benchmark_step.py experiment=ende_sgp

Words with = go to the experiment as on run.py's command line. --random: random pictures in the data's shape, no data needed.

Prints the ratio of an iteration (aim <= 1.05) and the share of SlowMo itself at tau = 12 (aim <= 1%); then pictures or tokens a second
beside one plain model with the same total batch, how long the whole experiment would take, and on a GPU the memory. The sides alternate
iteration by iteration in one process, so that noise of the machine hits all; medians of paired ratios are printed with quartiles. The
base is Local SGD, whose step is the optimizer's alone: messages are copies here and cost no link.
"""

import argparse
import statistics
import time
from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf

import slowmo
from experiments import plan

TAU = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    with hydra.initialize_config_dir(str(Path(__file__).parent.parent / "configs"), version_base="1.3"):
        cfg = hydra.compose("config", [*options.overrides, f"cluster.device={options.device}"])
    task, m = plan.build(cfg.task), cfg.workers
    if options.random:
        batches = [pictures(task, device) for _ in range(m)]
    else:
        batches = list(task.batches(0, range(m), (0, 1)))
    own = [batches[i * task.pieces : (i + 1) * task.pieces] for i in range(m)]  # each worker's

    def optimizer(parameters, fused):
        return plan.build(OmegaConf.merge(cfg.optimizer, {"fused": fused}), list(parameters))

    plain = [task.model() for _ in range(m)]
    optimizers = {fused: [optimizer(model.parameters(), fused) for model in plain] for fused in (False, True)}

    def loops(fused):
        for model, step, pieces in zip(plain, optimizers[fused], own):
            for piece in pieces:
                task.loss(model, piece).backward()
            step.step()
            step.zero_grad(set_to_none=True)

    one = task.model()
    one_step = optimizer(one.parameters(), True)
    whole = batches  # texts go through one after another
    if isinstance(batches[0][0], torch.Tensor):
        whole = [[torch.cat(part) for part in zip(*batches)]]
        whole[0][0] = whole[0][0].contiguous(memory_format=task.memory_format)

    def large_batch():
        for batch in whole:
            task.loss(one, batch).backward()
        one_step.step()
        one_step.zero_grad(set_to_none=True)

    replicas = slowmo.Replicas(task.model(), slowmo.Cluster(m, device), accumulate=task.pieces)
    base = slowmo.LocalSGD(replicas, optimizer([replicas.rows], True))
    outer = slowmo.SlowMo(base, tau=TAU, beta=0.6)

    def folded():
        base.start()
        for model, pieces in zip(replicas.models, own):
            for piece in pieces:
                task.loss(model, piece).backward()
        base.step()

    def slow():
        outer._slow_step(cfg.optimizer.lr)

    def seconds(call, *arguments):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times = {"folded": [], "plain": [], "plain fused": [], "one plain model": [], "slow step": [], "first step after a reset": []}
    for round_ in range(options.rounds + 1):  # the first warms up
        now = {"plain": seconds(loops, False), "folded": seconds(folded), "plain fused": seconds(loops, True)}
        now["one plain model"] = seconds(large_batch)
        now["slow step"] = seconds(slow)  # it resets the momentum, which the next step allocates anew
        now["first step after a reset"] = seconds(folded)
        if round_:
            for name, value in now.items():
                times[name].append(value)
            print(f"{round_}/{options.rounds}: " + ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in now.items()), flush=True)

    def show(text, values):
        low, middle, high = (statistics.quantiles(values, n=4) if len(values) > 1 else values * 3)
        print(f"{text:70}{middle:.4f}  ({low:.4f} to {high:.4f})")

    def ratios(a, b):
        return [x / y for x, y in zip(times[a], times[b])]

    print(f"{' '.join(options.overrides)}: m = {m}, {torch.get_num_threads()} threads, {device}, torch {torch.__version__}")
    show("folded iteration over plain loops (torch's default optimizer)", ratios("folded", "plain"))
    show("folded iteration over plain loops (fused)", ratios("folded", "plain fused"))
    show(f"share of the slow step at tau = {TAU}", [s / TAU / f for s, f in zip(times["slow step"], times["folded"])])
    # its reset makes the next step allocate the momentum anew
    after = [(a - f) / TAU / f for a, f in zip(times["first step after a reset"], times["folded"])]
    show("share of what its reset costs the next step", after)
    show("folded iteration over one plain model with the same total batch", ratios("folded", "one plain model"))
    counted = isinstance(batches[0][0], torch.Tensor)
    total = sum(len(batch[1]) if counted else int(batch[0]["ntokens"]) for batch in batches)
    steps = plan.steps(cfg, task)
    for name in ("folded", "one plain model"):
        pace = statistics.median(times[name])
        unit = "pictures" if counted else "target tokens"
        print(f"{name}: {total / pace:,.0f} {unit}/s; {steps:,} such iterations: {steps * pace / 3600:.2f} hours")
    if device.type == "cuda":
        rows = replicas.rows.numel() * replicas.rows.element_size()
        del plain, optimizers, one, one_step, whole
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        folded()
        print(f"memory of the folded side at its peak: {torch.cuda.max_memory_allocated() / rows:.2f} x its rows ({rows / 2**30:.2f} GiB)")


def pictures(task, device):
    size = getattr(task, "size", 32)
    x = torch.randn(task.batch, 3, size, size, dtype=task.dtype, device=device).contiguous(memory_format=task.memory_format)
    return x, torch.randint(0, 10, (task.batch,), device=device)


if __name__ == "__main__":
    main()
