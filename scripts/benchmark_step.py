"""What folding and SlowMo cost: m workers in one process against m plain PyTorch loops over the same batches.

    python scripts/benchmark_step.py [--workers 8] [--batch 32] [--model resnet18] [--rounds 5]

Prints the ratio of an iteration (aim <= 1.05) and the share of SlowMo itself at tau = 12 (aim <= 1%); then pictures a second beside one
plain model with the same total batch, and how long the paper's 200 epochs of CIFAR-10 would take. The sides alternate iteration by
iteration in one process, so that noise of the machine hits all; medians of paired ratios are printed with quartiles.
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional as F

import slowmo
from experiments.cifar10 import ResNet

MODELS = {"resnet18": ([2, 2, 2, 2], 64), "resnet8": ([1, 1, 1, 0], 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tau", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, m = torch.device(options.device), options.workers

    def model():
        torch.manual_seed(0)
        return ResNet(*MODELS[options.model]).to(device, memory_format=torch.channels_last)

    images = torch.randn(m, options.batch, 3, 32, 32, device=device)
    batches = [(x.contiguous(memory_format=torch.channels_last), torch.randint(0, 10, (options.batch,), device=device)) for x in images]
    settings = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}

    plain = [model() for _ in range(m)]
    optimizers = {fused: [torch.optim.SGD(p.parameters(), fused=fused, **settings) for p in plain] for fused in (False, True)}

    def loops(fused):
        for twin, optimizer, (x, y) in zip(plain, optimizers[fused], batches):
            F.cross_entropy(twin(x), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    one = model()
    whole = [torch.cat(part) for part in zip(*batches)]
    whole[0] = whole[0].contiguous(memory_format=torch.channels_last)
    one_optimizer = torch.optim.SGD(one.parameters(), fused=True, **settings)

    def large_batch():
        F.cross_entropy(one(whole[0]), whole[1]).backward()
        one_optimizer.step()
        one_optimizer.zero_grad(set_to_none=True)

    replicas = slowmo.Replicas(model(), slowmo.Cluster(m, device))
    base = slowmo.LocalSGD(replicas, torch.optim.SGD([replicas.rows], fused=True, **settings))
    outer = slowmo.SlowMo(base, tau=options.tau, beta=0.6)

    def folded():
        base.start()
        for replica, (x, y) in zip(replicas.models, batches):
            F.cross_entropy(replica(x), y).backward()
        base.step()

    def slow():
        outer._slow_step(settings["lr"])

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

    print(f"{m} workers, {options.model}, batch {options.batch}, {torch.get_num_threads()} threads, {device}, torch {torch.__version__}")
    show("folded iteration over plain loops (torch's default SGD)", ratios("folded", "plain"))
    show("folded iteration over plain loops (fused SGD)", ratios("folded", "plain fused"))
    share = [s / options.tau / f for s, f in zip(times["slow step"], times["folded"])]
    show(f"share of the slow step at tau = {options.tau}", share)
    # its reset makes the next step allocate the momentum anew
    after = [(a - f) / options.tau / f for a, f in zip(times["first step after a reset"], times["folded"])]
    show("share of what its reset costs the next step", after)
    show("folded iteration over one plain model with the same total batch", ratios("folded", "one plain model"))
    total = m * options.batch
    for name in ("folded", "one plain model"):
        rate = total / statistics.median(times[name])
        print(f"{name}: {rate:,.0f} pictures/s; 200 epochs of 50,000 pictures: {200 * 50_000 / rate / 3600:.2f} hours")


if __name__ == "__main__":
    main()
