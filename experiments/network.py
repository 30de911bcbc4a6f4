"""Workers as forked processes, each on its host of scripts/emulated_network.sh, for measurements over real sockets."""

import ctypes
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts/emulated_network.sh"
NETWORKS = ("emulated", "up", "loopback")


def inside(hosts: int, rate: str, delay: str, command: list[str]) -> int:
    """Run `command` with a network of its own, which goes when it ends; the exit code. The script says what is wrong."""
    words = [SCRIPT, "with", "--hosts", str(hosts), "--rate", rate, "--delay", delay, "--", *command]
    return subprocess.run(words, env=os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"}).returncode  # hosts without names are warned about


def spawn(function, processes: int, network: str, node: int = 1):
    """`function()` in each of `processes` forked processes, `node` a host, with the environment by which Cluster starts gloo.

    network: `loopback`, or `up` for the namespaces that are there. Returns process 0's result. RuntimeError, with the traceback, for
    the first failure; the others are ended then.
    """
    if network == "up" and not Path("/run/netns/slowmo1").exists():
        raise RuntimeError("no network is up: scripts/emulated_network.sh up, or choose network=emulated")
    sys.stdout.flush()
    context = multiprocessing.get_context("fork")  # torch is imported once
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(processes)]
    children = [
        context.Process(target=_child, args=(function, rank, processes, network, node, port, pipes[rank][1])) for rank in range(processes)
    ]
    for child in children:
        child.start()
    try:
        for _, writer in pipes:
            writer.close()
        waiting, results = {reader: rank for rank, (reader, _) in enumerate(pipes)}, {}
        while waiting:
            for reader in multiprocessing.connection.wait(list(waiting)):
                rank = waiting.pop(reader)
                try:
                    failure, results[rank] = reader.recv()
                except EOFError:
                    failure = "it was killed"
                if failure:
                    raise RuntimeError(f"process {rank}: {failure}")
        return results[0]
    finally:
        for child in children:
            child.kill()
            child.join()


def _child(function, rank: int, processes: int, network: str, node: int, port: int, pipe) -> None:
    address = "127.0.0.1"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % node), WORLD_SIZE=str(processes), GLOO_SOCKET_IFNAME="lo")
    try:
        if network == "up":
            with open(f"/run/netns/slowmo{rank // node + 1}") as space:
                libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
                if libc.setns(space.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"cannot enter {space.name}")
            address, os.environ["GLOO_SOCKET_IFNAME"] = "10.77.0.1", "eth0"
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
        result = "", function()
    except BaseException:
        result = traceback.format_exc(), None
    pipe.send(result)
    os._exit(0)  # gloo's threads now and then abort a regular exit
