"""Emulated links, and the measurement of Table 2 over them: real namespaces and real processes. What wants root is skipped without."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pandas as pd
import pytest
import torch

from benchmarks import ranks
from benchmarks import table2 as measuring
from results import cost_model
from results.store import COLUMNS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/links/network.sh"
possible = not os.getuid() and all(map(shutil.which, ("ip", "tc", "unshare"))) and not subprocess.run(
    ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode  # fmt: skip
root = pytest.mark.skipif(not possible, reason="namespaces want root, ip and tc")
SENDER = """
import socket, sys, time
server = socket.socket() if sys.argv[1] == "receive" else None
if server:
    server.bind(("10.77.0.2", 5000)); server.listen(); print("up", flush=True)
    other, _ = server.accept()
    start = time.monotonic(); other.sendall(b"a"); other.recv(1); print(time.monotonic() - start)
    count = 0; start = time.monotonic()
    while count < 2_000_000: count += len(other.recv(1 << 20))
    print(time.monotonic() - start)
else:
    link = socket.create_connection(("10.77.0.2", 5000)); link.sendall(link.recv(1)); time.sleep(0.1); link.sendall(bytes(2_000_000))
"""


def script(*words, **options):
    return subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, timeout=120, **options)


@root
@pytest.mark.parametrize("delay", ["0ms", "40ms"])
def test_links_have_their_rate_and_delay(delay, tmp_path):
    """Both are lower bounds, whatever else the machine does: 2 MB at 20 Mbit/s, less the burst; a message there and back."""
    if delay != "0ms" and not (shutil.which("cc") and Path("/dev/net/tun").exists()):
        pytest.skip("a delay wants a C compiler and /dev/net/tun")
    (tmp_path / "sender.py").write_text(SENDER)
    run = f"ip netns exec slowmo{{}} {sys.executable} {tmp_path}/sender.py {{}}"
    wait = f"until grep -qs up {tmp_path}/out; do sleep 0.05; done"
    command = f"({run.format(2, 'receive')} > {tmp_path}/out) & {wait}; {run.format(1, 'send')}; wait"
    done = script("with", "--hosts", "3", "--rate", "20mbit", "--delay", delay, "--", "bash", "-c", command)
    assert done.returncode == 0, done.stderr
    _, back, transfer = (tmp_path / "out").read_text().split()
    assert float(transfer) > 0.9 * (2e6 - 2 * 131072) * 8 / 20e6
    assert float(back) > (0.079 if delay == "40ms" else 0)


@root
@pytest.mark.parametrize("ended", [signal.SIGTERM, signal.SIGINT])
def test_a_network_of_its_own_ends_with_its_command(ended):
    done = script("with", "--hosts", "2", "--rate", "1gbit", "--", "sh", "-c", "ip netns list; exit 7")
    assert done.returncode == 7 and sorted(line.split()[0] for line in done.stdout.splitlines()) == ["slowmo1", "slowmo2", "slowmosw"]
    mark = f"sleep 97.{os.getpid()}"
    child = subprocess.Popen([str(SCRIPT), "with", "--hosts", "2", "--rate", "1gbit", "--", "sh", "-c", f"{mark} & {mark}"])
    alive = lambda: subprocess.run(["pgrep", "-f", mark.replace(".", "[.]") + "$"], capture_output=True).returncode == 0
    deadline = time.monotonic() + 30
    while not alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive()
    child.send_signal(ended)
    child.wait()
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()


@root
def test_up_and_down():
    """In a mount namespace of its own: nothing that lies about on this machine is touched."""
    steps = f"""
        mount -t tmpfs tmpfs /run
        {SCRIPT} up --hosts 2 --rate 1gbit && ip netns list
        {SCRIPT} up --hosts 2 --rate 1gbit; echo again $?
        {SCRIPT} down; echo down $? $(ip netns list)
        tc() {{ return 1; }}; export -f tc
        {SCRIPT} up --hosts 2 --rate 1gbit; echo broken $? $(ip netns list)"""
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "bash", "-c", steps], capture_output=True, text=True
    )
    assert "slowmo1" in done.stdout and "again 2" in done.stdout and "down 0\n" in done.stdout and "broken 2\n" in done.stdout, done
    assert "a network is up already: benchmarks/links/network.sh down" in done.stderr and "took away what there was" in done.stderr


@root
@pytest.mark.parametrize(
    "words, remedy",
    [
        (["up"], "--hosts : a whole number from 2 to 250"),
        (["up", "--hosts", "1", "--rate", "1gbit"], "a whole number from 2 to 250"),
        (["up", "--hosts", "2", "--rate", "fast"], "a rate like 200mbit"),
        (["with", "--hosts", "2", "--rate", "1gbit", "--delay", "1h", "--", "true"], "a time like 0.1ms"),
        (["with", "--hosts", "2", "--rate", "1gbit"], "with what?"),
        (["up", "--host", "2"], "unknown word --host; usage"),
        (["sideways"], "usage"),
    ],
)
def test_nonsense_is_refused(words, remedy):
    done = script(*words)
    assert done.returncode == 2 and remedy in done.stderr


def answer():
    cluster = torch.distributed
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), cluster.is_available()


def test_spawned_processes_answer_or_fail_loudly():
    assert ranks.spawn(answer, 3, "loopback") == (0, 3, True)

    def fails():
        if os.environ["RANK"] == "1":
            raise ValueError("one of them")
        time.sleep(60)

    def dies():
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="process 1: [^$]*ValueError: one of them"):
        ranks.spawn(fails, 2, "loopback")
    with pytest.raises(RuntimeError, match="process 0: it was killed"):
        ranks.spawn(dies, 3, "loopback")  # the others hold nothing of its open
    assert time.monotonic() - begun < 50


def measure(*overrides, cwd):
    command = [sys.executable, "-m", "benchmarks.table2", "benchmark.hosts=2", "benchmark.compute=0.002", "benchmark.scale=1000",
               "benchmark.warmup=1", f"out={cwd}/data/links.csv", *overrides]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.slow
def test_a_row_is_measured_both_ways_on_unequal_hosts(tmp_path):
    """Sent during backward and after it; the second host is the faster one, and computes as long as it was told to."""
    done = measure("benchmark.network=loopback", "benchmark.rounds=2", "benchmark.iterations=12", "benchmark.straggler=20",
                   "benchmark.rows=[sgp,'slowmo_sgp_after,outer.tau=12']", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = pd.read_csv(tmp_path / "data/links.csv")
    assert list(lines.columns) == COLUMNS["links"] and list(lines["row"][::2]) == ["compute", "sgp", "slowmo_sgp_after,outer.tau=12"]
    facts = {name: set(lines[name]) for name in ("straggler", "jitter", "warmup", "iterations")}
    assert facts == {"straggler": {20}, "jitter": {0}, "warmup": {1}, "iterations": {12}}
    assert (lines["milliseconds"] >= 20).all() and (lines["milliseconds"][2:] >= 40).all()  # the mean of 2 and 40 ms, or all wait for 40
    assert set(lines["bytes"]) == {4 * round(25_557_032 / 1000)}


@pytest.mark.slow
def test_a_real_network_takes_random_pictures(tmp_path):
    words = ["benchmark=resnet", "benchmark.scale=null", "benchmark.compute=task", "benchmark.network=loopback", "benchmark.rounds=1",
             "benchmark.iterations=2", "benchmark.rows=[ar_sgd_after,osgp]"]  # fmt: skip
    small = "benchmark.overrides=['task.width=4','task.batch_size=4','data.train=512','data.root=/nowhere']"
    done = measure(*words, small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = pd.read_csv(tmp_path / "data/links.csv")
    assert list(lines["row"]) == ["compute", "ar_sgd_after", "osgp"] and not lines["emulated"].any() and (lines["milliseconds"] > 0).all()


@pytest.mark.slow
def test_every_row_of_table_2_is_measured(tmp_path):
    done = measure("benchmark.network=loopback", "benchmark.rounds=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = pd.read_csv(tmp_path / "data/links.csv")
    cells = cost_model.paper("imagenet")
    rows = {*cells, *(f"{cell}_after" for cell in cells if cost_model.two_ways(f"imagenet_{cell}"))}
    more = {"local_sgd,outer.tau=48", "slowmo_local_sgd,outer.tau=48", "slowmo_osgp,outer.tau=12", "slowmo_sgp,outer.tau=12",
            "local_sgd,outer=diloco", "local_sgd,outer=streaming"}  # fmt: skip
    assert list(lines.columns) == COLUMNS["links"] and set(lines["row"]) == {"compute", *rows, *more}
    assert (lines["milliseconds"] >= 2).all() and set(lines["round"]) == {0, 1} and (lines["network"] == "loopback").all()
    assert "round 2/2 double_averaging_local_sgd_after" in done.stdout and "| OSGP + SlowMo |" in done.stdout
    again = measure("benchmark.network=loopback", "benchmark.rounds=1", "benchmark.rows=['slowmo_osgp,outer.tau=12']", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert set(pd.read_csv(tmp_path / "data/links.csv")["row"]) == {"compute", "slowmo_osgp,outer.tau=12"}  # the same network: replaced


@root
@pytest.mark.slow
@pytest.mark.parametrize("ended", [signal.SIGTERM, signal.SIGKILL])
def test_a_measurement_that_is_ended_leaves_nothing_behind(ended, tmp_path):
    command = [sys.executable, "-m", "benchmarks.table2", f"out={tmp_path}/data/links.csv", "benchmark.hosts=2", "benchmark.compute=0.002",
               "benchmark.scale=1000", "benchmark.rows=[osgp]", "benchmark.rounds=100000"]  # fmt: skip
    child = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert "round 1/100000 compute" in child.stdout.readline()
    child.send_signal(ended)
    child.wait()
    alive = lambda: subprocess.run(["pgrep", "-f", f"benchmarks.table2 out={tmp_path}"], capture_output=True, text=True).stdout
    deadline = time.monotonic() + 20
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive()


@root
@pytest.mark.slow
def test_measuring_on_links(tmp_path):
    """A real model, processes of a node, and lines of another network that stay."""
    done = measure(
        "benchmark.network=loopback", "benchmark=wmt16", "benchmark.hosts=2", "benchmark.rows=[sgp]", "benchmark.rounds=1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    done = measure("benchmark.rows=[sgp,ar_sgd]", "benchmark.rounds=1", "benchmark.node=2", "benchmark.delay=0.2ms", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = pd.read_csv(tmp_path / "data/links.csv")
    assert set(lines["delay"]) == {"-", "0.2ms"} and set(lines["rate"]) == {"-", "400mbit"}
    assert list(lines["data"]) == ["wmt16"] * 2 + ["imagenet"] * 3 and set(lines["network"]) == {"loopback", "emulated"}
    assert list(lines["node"]) == [1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "overrides, remedy",
    [
        (["benchmark.hosts=0"], "benchmark.hosts=0: a whole number >= 1"),
        (["benchmark.network=wifi"], "choose one of emulated, up, loopback"),
        (["benchmark.compute=fast"], "seconds, or `task`"),
        (["benchmark.iterations=24"], "averages every 48, choose a multiple"),
        (["benchmark.rows=[sgd]"], "no experiment imagenet_sgd"),
        (["benchmark.rows=[osgp_after]"], "osgp_after: its messages leave before backward either way"),
        (["benchmark.rows=['sgp,base=osgp']"], "perhaps with another τ"),
        (["benchmark.straggler=0.5"], "how many times slower a host is, at least 1"),
        (["benchmark.jitter=5"], "a share of steps, from 0 to 1"),
        (["benchmark.jitter=often"], "a share of steps, from 0 to 1"),
        (["benchmark=resnet", "benchmark.jitter=0.05"], "stretch a wait: choose seconds"),
        (["benchmark.random=true"], "choose benchmark.compute=task"),
        (["benchmark.rows=[]"], "at least one row"),
        (["benchmark.scale=0"], "a positive scale"),
    ],
)
def test_what_cannot_be_measured_is_refused(overrides, remedy):
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        with pytest.raises(ValueError, match=re.escape(remedy)):
            measuring.check(hydra.compose("table2", overrides).benchmark)


@pytest.mark.slow
def test_a_refusal_is_one_line_and_writes_nothing(tmp_path):
    done = measure("benchmark.network=up", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: no network is up: benchmarks/links/network.sh up")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/links.csv").write_text("a,b\n1,2\n")
    done = measure("benchmark.network=loopback", cwd=tmp_path)
    assert done.returncode == 1 and "move it away" in done.stderr  # before a quarter of an hour, not after
