"""Workers as forked processes, each on its host of benchmarks/links/network.sh, for measurements over real sockets."""

import ctypes
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

SCRIPT = Path(__file__).parent / "links/network.sh"
FACTS = Path("/run/slowmo_network/facts")
NETWORKS = ("emulated", "up", "loopback")
libc = ctypes.CDLL(None, use_errno=True)


def inside(hosts: int, rate: str, delay: str, command: list[str]) -> int:
    """Run `command` with a network of its own, which ends with it or with this process; the exit code. The script says what is wrong."""
    words = [SCRIPT, "with", "--hosts", str(hosts), "--rate", rate, "--delay", delay, "--", *command]
    environment = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # hosts without names are warned about
    return subprocess.run(words, env=environment, preexec_fn=lambda: _end_with_parent(signal.SIGTERM)).returncode


def up(hosts: int) -> tuple[str, str]:
    """(rate, delay) of the network that is up. RuntimeError where there is none of so many hosts."""
    if not FACTS.exists():
        raise RuntimeError("no network is up: benchmarks/links/network.sh up, or choose network=emulated")
    count, rate, delay = FACTS.read_text().split()
    if int(count) < hosts:
        raise RuntimeError(f"the network that is up has {count} hosts, {hosts} are wanted: benchmarks/links/network.sh down, then up")
    return rate, delay


def spawn(function, processes: int, network: str, node: int = 1):
    """`function()` in each of `processes` forked processes, `node` a host, with the environment by which Cluster starts gloo.

    network: `loopback`, or `up` for the namespaces that are there. Returns process 0's result. RuntimeError, with the traceback, for
    the first failure; the others are ended then.
    """
    if network == "up":
        up(-(-processes // node))
    sys.stdout.flush()
    context = multiprocessing.get_context("fork")  # torch is imported once
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children, waiting, results = [], {}, {}
    try:
        for rank in range(processes):
            reader, writer = context.Pipe(duplex=False)
            children.append(context.Process(target=_child, args=(function, rank, processes, network, node, port, writer)))
            children[-1].start()
            writer.close()  # before the next fork: when a child dies, nobody else holds its pipe open
            waiting[reader] = rank
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
            if child.pid:
                child.kill()
                child.join()


def _end_with_parent(number: int) -> None:
    libc.prctl(1, number)  # PR_SET_PDEATHSIG


def _child(function, rank: int, processes: int, network: str, node: int, port: int, pipe) -> None:
    _end_with_parent(signal.SIGKILL)
    address = "127.0.0.1"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % node), WORLD_SIZE=str(processes), GLOO_SOCKET_IFNAME="lo")
    try:
        if network == "up":
            with open(f"/run/netns/slowmo{rank // node + 1}") as space:
                if libc.setns(space.fileno(), 0):  # os.setns came with Python 3.12
                    raise OSError(ctypes.get_errno(), f"cannot enter {space.name}")
            address, os.environ["GLOO_SOCKET_IFNAME"] = "10.77.0.1", "eth0"
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
        result = "", function()
    except BaseException:
        result = traceback.format_exc(), None
    pipe.send(result)
    os._exit(0)  # gloo's threads now and then abort a regular exit
