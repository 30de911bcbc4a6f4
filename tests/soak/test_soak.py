"""Random faults against a reference run: `pytest tests/soak -m soak -n 0 -s [--soak-seed=S] [--soak-trials=N | --soak-only=K]`.

A trial hurts a run, or its folder, one or several times, asks again as its messages say, and compares everything that is left with the
run that nothing happened to. It prints trials and failures by kind, and the seed to repeat them; --soak-only repeats trial K alone.
"""

import builtins
import collections
import contextlib
import errno
import fcntl
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import Command
from test_run import SGP, arrays, rows, strict

from experiments import files
from slowmo.train import TrainingMeter

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]
WORDS = (*SGP, "evaluate.keep=2", "cluster.timeout=8")
CANARY = "nobody's business"
ERRNOS = (errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EMFILE)
GRACE = 5.0  # seconds, as launch=local gives a process when another has died


class Failed(AssertionError):
    pass


def claim(holds, text) -> None:
    if not holds:
        raise Failed(text)


class Soak:
    """A place for trials, with the reference runs. left: seconds until the last process of a broken run had ended by itself."""

    def __init__(self, cwd: Path, rng: random.Random, disk: Path | None):
        self.cwd, self.rng, self.disk, self.n, self.left, self.ended = cwd, rng, disk, 0, [], 0
        self.reference, self.stopped, self.seconds = {}, {}, {}
        for processes in (1, 2):
            self.reference[processes] = self._make(f"reference{processes}", processes, 0)
            self.stopped[processes] = self._make(f"stopped{processes}", processes, signal.SIGTERM, before=at_step(23, signal.SIGTERM))

    def _make(self, name, processes, number, before=None) -> Path:
        (self.cwd / name).mkdir()
        start = time.monotonic()
        started = Command(*WORDS, cwd=self.cwd / name, processes=processes, before=before)
        done = self.end(started)
        self.seconds[processes] = time.monotonic() - start
        claim(done.codes == [128 + number if number else 0] * processes, done.text)
        return self.cwd / name / "runs"

    def place(self, runs: Path | None = None, base: Path | None = None) -> tuple[Path, Path]:
        """A new folder to work in, and the run's folder in it, a copy of `runs` where given."""
        self.n += 1
        cwd = (base or self.cwd) / f"trial{self.n}"
        cwd.mkdir()
        if runs:
            shutil.copytree(runs, cwd / "runs")
        name = next(self.reference[1].glob("*/seed1")).relative_to(self.reference[1])
        return cwd, cwd / "runs" / name

    def end(self, started, limit: float = 90.0):
        """As a launcher does: where one process has failed, the others get a moment before they are ended; nobody may hang."""
        begun, failed = time.monotonic(), None
        try:
            while not started.poll():
                now = time.monotonic()
                claim(now - begun < limit, f"no end after {limit} s")
                if failed is None and any(started.codes.values()):
                    failed = now
                if failed and now - failed > GRACE * load():
                    self.ended += 1
                    started.kill()
                time.sleep(0.005)
            if failed and len(started.pids) > 1:
                self.left.append(time.monotonic() - failed)
            return started.wait()
        finally:
            started.kill()

    def ask(self, cwd, processes, *words, allowed=(0, 2), **options):
        """The command again; one error line, no traceback, the same code on every rank."""
        done = self.end(Command(*WORDS, *words, cwd=cwd, processes=processes, **options))
        claim("Traceback" not in done.text, f"a traceback: {done.text[-1500:]}")
        claim(len(set(done.codes)) == 1 and done.code in allowed, f"codes {done.codes}, not {allowed}: {done.text[-1500:]}")
        if done.code == 2:
            lines = {re.sub(r"^error: rank \d+: ", "error: ", line) for line in done.err.splitlines() if line.startswith("error: ")}
            claim(len(lines) == 1, f"not one error line: {done.err[-1500:]}")
        return done

    def mended(self, cwd, folder, processes, lost=(), checkpoints=True) -> None:
        """Ask until it is done, doing what the messages say; then everything is as in the reference."""
        words = []
        for _ in range(8):
            done = self.ask(cwd, processes, *words)
            if done.code == 0:
                break
            words = ["resume=never"] if "resume=never" in done.err else []
            if found := re.search(r"error: (\S+) is (?:a|an) [\w ]+, not a (?:file|folder): move it away", done.err):
                files.remove(cwd / found[1])
            elif found := re.search(r"error: (\S+config\.yaml) is damaged", done.err) or re.search(r"(\S+) holds a run whose", done.err):
                files.remove(cwd / found[1] / "config.yaml" if "holds a run" in done.err else cwd / found[1])
            elif not words:
                raise Failed(f"no remedy: {done.err}")
        claim(done.code == 0, f"no end: {done.err}")
        self.whole(folder, processes, lost, checkpoints)

    def whole(self, folder, processes, lost=(), checkpoints=True) -> None:
        """checkpoints: compare them too; a run that was done needs none, and nobody asks for theirs."""
        for left in [*folder.glob("checkpoints/*.damaged"), *folder.glob(".old-*")]:
            files.remove(left)
        expected = next(self.reference[processes].glob("*/seed1"))
        result = strict(folder / "result.json")
        lost = [name for name in lost if name in result.get("lost", ())]
        claim(sorted(result.get("lost", [])) == sorted(lost), f"lost {result.get('lost')}, not {lost}")
        # log.txt is the screen again: nothing needs it
        names = [{str(path.relative_to(each)) for path in each.rglob("*")} - {"log.txt"} for each in (folder, expected)]
        if checkpoints:  # the last two: the one before the end may be of a step at which the run was stopped
            claim(len(os.listdir(folder / "checkpoints")) == 2, "checkpoints")
        last = "checkpoints/step-000000046" if checkpoints else "nothing of them"
        names = [{name for name in each if not name.startswith("checkpoints/") or name.startswith(last)} for each in names]
        if not checkpoints:
            names = [each - {"checkpoints"} for each in names]
        claim(names[0] | set(lost) == names[1], f"files {names[0] ^ names[1]}")
        claim(rows(folder) == rows(expected), "other rows")
        left, right = arrays(folder), arrays(expected)
        claim(left.keys() == right.keys() and all((left[key] == right[key]).all() for key in right), "other iterates")
        for path in expected.glob("models/*"):
            same = f"models/{path.name}" in lost or (folder / "models" / path.name).read_bytes() == path.read_bytes()
            claim(same, f"another {path.name}")
        for path in expected.glob("checkpoints/step-000000046/*.safetensors") if checkpoints else ():
            claim((folder / path.relative_to(expected)).read_bytes() == path.read_bytes(), f"another {path.name}")
        claim(result["best"] == strict(expected / "result.json")["best"] and files.damaged(folder) == [], "another result")


def load() -> float:
    """How many times longer than alone things take here, now."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def at_step(step, number, only=None):
    def before(rank):
        real, calls = TrainingMeter.start, [0]

        def start(self):
            calls[0] += 1
            if calls[0] == step and only in (None, rank):
                os.kill(os.getpid(), number)
            return real(self)

        TrainingMeter.start = start

    return before


# ---- the kinds of trials: each takes the soak and the number of processes


def killed(soak, processes):
    """kill -9 of one or all ranks, at any moment from the start of Python on, up to three times."""
    cwd, folder = soak.place()
    for _ in range(soak.rng.randint(1, 3)):
        started = Command(*WORDS, cwd=cwd, processes=processes)
        victims = range(processes) if soak.rng.random() < 0.4 else [soak.rng.randrange(processes)]
        strike(soak, started, victims, signal.SIGKILL)
        done = soak.end(started)
        claim("Traceback" not in done.text, f"a traceback: {done.text[-1500:]}")
        claim(set(done.codes) <= {0, 1, -signal.SIGKILL} | unmet(done), f"codes {done.codes}: {done.text[-1000:]}")
    soak.mended(cwd, folder, processes)


def killed_at_step(soak, processes):
    """The same, between the first step and the last."""
    cwd, folder = soak.place()
    for _ in range(soak.rng.randint(1, 3)):
        kill = at_step(soak.rng.randint(1, 46), signal.SIGKILL, soak.rng.choice([None, *range(processes)]))
        started = Command(*WORDS, cwd=cwd, processes=processes, before=kill)
        done = soak.end(started)
        claim("Traceback" not in done.text, f"a traceback: {done.text[-1500:]}")
    soak.mended(cwd, folder, processes)


def unmet(done) -> set[int]:
    """The code of one that waited for a process which had ended before they met."""
    return {2} if "did not meet the others" in done.err else set()


def strike(soak, started, victims, number):
    """At a random moment; more often while it trains, which is short, than while it starts."""
    until = time.monotonic() + soak.rng.uniform(0, 1.1) * soak.seconds[len(started.pids)] * load() ** 0.5
    while not started.poll() and time.monotonic() < until:
        time.sleep(0.001)
    for rank in victims:
        if started.pids[rank] not in started.codes:
            with contextlib.suppress(ProcessLookupError):
                started.signal(number, rank)


def signalled(soak, processes):
    """SIGTERM, SIGUSR1, SIGINT to one or all: saved and stopped, or ended as that signal ends a process that does not train yet."""
    cwd, folder = soak.place()
    for _ in range(soak.rng.randint(1, 3)):
        number = soak.rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        victims = range(processes) if soak.rng.random() < 0.5 else [soak.rng.randrange(processes)]
        if soak.rng.random() < 0.5:
            only = None if len(victims) == processes else victims[0]
            started = Command(*WORDS, cwd=cwd, processes=processes, before=at_step(soak.rng.randint(1, 46), number, only))
            done = soak.end(started)
            claim(done.codes in ([128 + number] * processes, [0] * processes), f"codes {done.codes}: {done.text[-1500:]}")
        else:
            started = Command(*WORDS, cwd=cwd, processes=processes)
            strike(soak, started, victims, number)
            done = soak.end(started)
            quiet = number == signal.SIGINT or "Traceback" not in done.text  # Python's own word for Ctrl-C before training
            codes = {0, 1, 128 + number, -number, -signal.SIGKILL} | unmet(done)
            claim(quiet and set(done.codes) <= codes, f"codes {done.codes}: {done.text[-1500:]}")
    soak.mended(cwd, folder, processes)


def full_disk(soak, processes):
    """A file system with room for a part of the run; then there is room again."""
    cwd, folder = soak.place(base=soak.disk)
    fill = soak.disk / "fill"
    try:
        room = soak.rng.randrange(0, 300_000)
        free = os.statvfs(soak.disk)
        fill.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - room)))
        done = soak.end(Command(*WORDS, f"runs={cwd / 'runs'}", cwd=soak.cwd, processes=processes))
        claim("Traceback" not in done.text and len(set(done.codes)) == 1 and done.code in (0, 2), f"{done.codes} {done.text[-1500:]}")
        claim(done.code == 0 or "No space" in done.err, done.err)
        fill.unlink()
        done = soak.end(Command(*WORDS, f"runs={cwd / 'runs'}", cwd=soak.cwd, processes=processes))
        claim(done.codes == [0] * processes, done.text)
        soak.whole(folder, processes)
    finally:
        fill.unlink(missing_ok=True)
        shutil.rmtree(cwd)


def injected(soak, processes):
    """One call of the system fails on one rank, once or from then on; nothing intact is renamed, and without the fault the run goes on."""
    cwd, folder = soak.place(soak.stopped[processes] if soak.rng.random() < 0.5 else None)
    where, name = soak.rng.choice([(os, "open"), (builtins, "open"), (os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"),
                                   (os, "unlink"), (os, "lstat"), (os, "scandir"), (fcntl, "lockf")])  # fmt: skip
    only, first, number = soak.rng.randrange(processes), soak.rng.randint(1, 12), soak.rng.choice(ERRNOS)
    times = soak.rng.choice([1, 10**6])
    if (name, number) == ("lockf", errno.EACCES):  # what some systems say when another holds a lock
        number = errno.EIO

    def before(rank):
        real, seen = getattr(where, name), [0]

        def call(*arguments, **options):
            told = name in ("fsync", "lockf") or "/seed1" in str(arguments[0]) or "runs" == str(arguments[0])[:4]
            if rank == only and told and not str(arguments[0]).endswith((".out", ".err")):
                seen[0] += 1
                if first <= seen[0] < first + times:
                    raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        setattr(where, name, call)

    done = soak.ask(cwd, processes, before=before)
    claim(not list(cwd.rglob("*.damaged")), f"renamed, {name} {os.strerror(number)}: {done.text[-1500:]}")
    soak.mended(cwd, folder, processes)


def damaged(soak, processes):
    """One to three files of a stopped or a done run: a bit, a cut, gone, a link, a folder, a pipe."""
    over = soak.rng.random() < 0.5
    cwd, folder = soak.place(soak.reference[processes] if over else soak.stopped[processes])
    outside, lost, said = cwd / "outside", [], []
    outside.write_text(CANARY)
    for _ in range(soak.rng.randint(1, 3)):
        found = sorted(path for path in folder.rglob("*") if files.kind(path) in ("a file", "a folder"))
        path = soak.rng.choice(found)
        harm = soak.rng.choice(HARMS)
        if files.kind(path) == "a folder" and harm in (flip, cut, empty):
            continue
        harm(path, outside, soak.rng)
        said.append(f"{harm.__name__} {path.relative_to(folder)}")
        # an older model is in no checkpoint
        lost += [str(p.relative_to(folder)) for p in found if p.parent.name == "models" and (p == path or path.name == "models")]
    try:
        soak.mended(cwd, folder, processes, lost, checkpoints=not over)
        claim(outside.read_text() == CANARY, "written through a link")
    except Failed as error:
        raise Failed(f"{'done' if over else 'stopped'}, {', '.join(said)}: {error}") from None


def flip(path, outside, rng):
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def cut(path, outside, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(max(1, path.stat().st_size))])


def empty(path, outside, rng):
    path.write_bytes(b"")


def gone(path, outside, rng):
    files.remove(path)


def link(path, outside, rng):
    files.remove(path)
    path.symlink_to(rng.choice(["nowhere", path.name, str(outside), "/dev/zero"]))


def folder_instead(path, outside, rng):
    files.remove(path)
    path.mkdir()


def file_instead(path, outside, rng):
    files.remove(path)
    path.write_bytes(rng.randbytes(rng.randrange(100)))


def pipe(path, outside, rng):
    files.remove(path)
    os.mkfifo(path)


HARMS = (flip, flip, cut, cut, empty, gone, gone, link, link, folder_instead, file_instead, pipe)


def two_at_once(soak, processes):
    """The second is refused while the first is at it, and says done when it came too late."""
    cwd, folder = soak.place()
    hold = soak.rng.randint(1, 40)

    def before(rank):
        real, calls = TrainingMeter.start, [0]

        def start(self):
            calls[0] += 1
            end = time.monotonic() + 20
            while calls[0] == hold and not (cwd / "go").exists() and time.monotonic() < end:
                time.sleep(0.005)
            return real(self)

        TrainingMeter.start = start

    first = Command(*WORDS, cwd=cwd, processes=processes, before=before)
    try:
        while not first.poll() and not (folder / "metrics.jsonl").exists():
            time.sleep(0.002)
        second = soak.ask(cwd, soak.rng.choice((1, 2)), *soak.rng.choice(((), ("resume=never",))), allowed=(2,))
        claim("is being written by another run" in second.err, second.err)
        (cwd / "go").touch()
        done = soak.end(first)
    finally:
        first.kill()
    claim(done.codes == [0] * processes, done.text)
    soak.whole(folder, processes)


def stopped_rank(soak, processes):
    """A rank that stands still: alone it goes on when it may; another's timeout ends the run, which goes on later."""
    cwd, folder = soak.place()
    started = Command(*WORDS, "cluster.timeout=2", cwd=cwd, processes=processes, before=at_step(soak.rng.randint(1, 46), signal.SIGSTOP, 0))
    try:
        end = time.monotonic() + 30 * load()
        if processes == 2:
            while started.pids[1] not in started.codes and time.monotonic() < end:
                started.poll()
                time.sleep(0.01)
            claim(started.codes.get(started.pids[1]) == 1, f"the other: {started.codes}")
        else:
            while not started.poll() and time.monotonic() < end and not stands(started.pids[0]):
                time.sleep(0.01)
            started.signal(signal.SIGCONT)
            claim(soak.end(started).codes == [0], "did not go on")
    finally:
        started.kill()
    soak.mended(cwd, folder, processes)


def stands(pid) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def nonsense(soak, processes):
    """Something that no run can be: refused in a line, before anything is written."""
    from support.nonsense import nonsense as lines

    (words,) = lines(1, soak.rng.randrange(2**32))
    cwd, _ = soak.place()
    done = soak.end(Command(*words, cwd=cwd))
    claim(done.code == 2 and "Traceback" not in done.text, f"{words}: code {done.code}: {done.text[-800:]}")
    claim(not list(cwd.glob("runs")) and done.err.strip(), f"{words}: {done.text[-800:]}")


KINDS = {killed: 5, killed_at_step: 4, signalled: 4, full_disk: 3, injected: 8, damaged: 10, two_at_once: 2, stopped_rank: 1, nonsense: 5}


@pytest.fixture
def disk(tmp_path):
    """A small file system, None where this user may mount none."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], check=False, capture_output=True).returncode == 0
    )
    yield path if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_soak(request, tmp_path, disk):
    seed = request.config.getoption("--soak-seed", default=None)
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    only, trials = request.config.getoption("--soak-only", default=None), request.config.getoption("--soak-trials", default=200)
    chosen = range(trials) if only is None else [only]
    kinds = {kind: weight for kind, weight in KINDS.items() if kind is not full_disk or disk}
    if not (Path(__file__).parents[1] / "support" / "nonsense.py").exists():
        del kinds[nonsense]
    print(f"\nsoak: seed {seed}, {len(chosen)} trials" + ("" if disk else "; no full disk: mounting takes root"), flush=True)
    soak, begun = Soak(tmp_path, random.Random(seed), disk), time.monotonic()
    counts, failures = collections.Counter(), []
    for n in chosen:
        soak.rng = random.Random(seed * 1_000_003 + n)  # a trial is the same whatever came before it
        kind, processes = soak.rng.choices(list(kinds), list(kinds.values()))[0], soak.rng.choice((1, 2))
        counts[kind.__name__] += 1
        try:
            kind(soak, processes)
        except Exception as error:
            failures.append((kind.__name__, f"trial {n}, {kind.__name__} on {processes}: {error!r}"))
            print(failures[-1][1], flush=True)
        for left in tmp_path.glob("trial*"):
            shutil.rmtree(left)
        if n % 20 == 19:
            print(f"{n + 1} trials, {len(failures)} failures, {time.monotonic() - begun:.0f} s", flush=True)
    failed = collections.Counter(kind for kind, _ in failures)
    for kind, count in counts.items():
        print(f"{kind:16}{count:5} trials{failed[kind]:5} failures")
    print(f"a failed process ended the other within {max(soak.left, default=0):.1f} s; {soak.ended} were ended after {GRACE:.0f} s or more")
    print(f"{len(chosen)} trials, {len(failures)} failures, seed {seed}, {time.monotonic() - begun:.0f} s", flush=True)
    assert not failures, "\n".join(text for _, text in failures)
