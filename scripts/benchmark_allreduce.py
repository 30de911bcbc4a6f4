"""Our AllReduce against torch's DDP: the same model, batches, optimizer and processes, alternating in one run.

    torchrun --nproc_per_node 2 scripts/benchmark_allreduce.py [--model resnet18] [--batch 16] [--rounds 10]

Prints the ratio of an iteration (aim <= 1.00), median and quartiles over paired rounds, and that both reach the same parameters.
"""

import argparse
import copy
import os
import statistics
import sys
import time

import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import slowmo
from experiments.cifar10 import ResNet

MODELS = {"resnet18": ([2, 2, 2, 2], 64), "resnet8": ([1, 1, 1, 0], 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if "LOCAL_RANK" not in os.environ or options.rounds < 2:
        sys.exit("start it as: torchrun --nproc_per_node 2 scripts/benchmark_allreduce.py, with --rounds 2 or more")
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    cluster = slowmo.Cluster(device=device)
    torch.manual_seed(0)
    model = ResNet(*MODELS[options.model]).to(device, memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    torch.manual_seed(1 + cluster.process)
    x = torch.randn(options.batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (options.batch,), device=device)
    settings = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "fused": True}

    ddp = DistributedDataParallel(twin, gradient_as_bucket_view=True, broadcast_buffers=False)
    theirs = torch.optim.SGD(ddp.parameters(), **settings)
    replicas = slowmo.Replicas(model, cluster)
    ours = slowmo.AllReduce(replicas, torch.optim.SGD([replicas.rows], **settings))

    def run_ddp():
        F.cross_entropy(ddp(x), y).backward()
        theirs.step()
        theirs.zero_grad(set_to_none=True)

    def run_ours():
        ours.start()
        F.cross_entropy(model(x), y).backward()
        ours.step()

    def seconds(call) -> float:
        cluster.barrier()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        cluster.barrier()
        return time.perf_counter() - start

    ratios = []
    for round_ in range(options.rounds + 2):
        first, second = (run_ddp, run_ours) if round_ % 2 else (run_ours, run_ddp)
        times = {call: seconds(call) for call in (first, second)}
        if round_ >= 2:  # DDP orders its buckets anew after its first iteration
            ratios.append(times[run_ours] / times[run_ddp])
            if cluster.leader:
                print(f"ours {1e3 * times[run_ours]:.1f} ms, DDP {1e3 * times[run_ddp]:.1f} ms", flush=True)
    gap = max((p - q).abs().max().item() for p, q in zip(model.parameters(), twin.parameters()))
    if cluster.leader:
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{cluster.processes} processes, {options.model}, batch {options.batch}, {device}, torch {torch.__version__}")
        print(f"AllReduce over DDP: {middle:.4f} ({low:.4f} to {high:.4f}); largest difference of a parameter {gap:.2e}")
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort a regular exit


if __name__ == "__main__":
    main()
