"""Files that are whole or not there: written aside and renamed, locked, checked. What is opened is a file, no link, folder or pipe.

No torch here: whoever only reads results imports it too.
"""

import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
KINDS = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFREG: "a file"}


def kind(path: Path) -> str | None:
    """What lies at `path`, itself and not what a link points to; None where there is nothing."""
    try:
        return KINDS.get(stat.S_IFMT(os.lstat(path).st_mode), "a device")
    except FileNotFoundError:
        return None


def open_file(path: Path, mode: str = "rb"):
    """Open a file, `rb`, `ab` or `r+b` (made where there is none). OSError, naming the remedy, where something else has its name."""
    flags = {"rb": os.O_RDONLY, "ab": os.O_WRONLY | os.O_APPEND | os.O_CREAT, "r+b": os.O_RDWR | os.O_CREAT}[mode]
    try:  # O_NONBLOCK: a pipe that nobody writes to would never open
        number = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO) and kind(path) not in (None, "a file"):
            raise _no_file(path) from None
        raise
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise _no_file(path)
    return os.fdopen(number, mode)


def check_kinds(folder: Path, files=(), folders=()) -> None:
    """OSError, naming the remedy, where one of these names in `folder` is something else."""
    for names, wanted in ((files, "a file"), (folders, "a folder")):
        for name in names:
            if kind(folder / name) not in (None, wanted):
                raise _no_file(folder / name, wanted)


def _no_file(path: Path, wanted: str = "a file") -> OSError:
    return OSError(f"{path} is {kind(path)}, not {wanted}: move it away")


def read(path: Path) -> bytes:
    """All of a file. FileNotFoundError where there is none."""
    with open_file(path) as file:
        return file.read()


def digest(path: Path) -> str:
    """A file's sha256, in hexadecimal."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entries(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies in `folder` under such names, sorted; nothing where there is no folder.

    OSError for a folder that cannot be read: Path.glob then finds nothing, for no permission or, in newer Pythons, for any error.
    """
    try:
        with os.scandir(folder) as found:
            names = sorted(entry.name for entry in found)
    except FileNotFoundError:
        return []
    return [folder / name for name in names if fnmatch.fnmatchcase(name, pattern)]


def remove(path: Path) -> None:
    """Delete whatever has this name; of a link the link."""
    if kind(path) == "a folder":
        shutil.rmtree(path)
    elif kind(path):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def aside(path: Path):
    """A free name beside `path`. The file or folder that the caller makes there becomes `path` at the end, whole, or goes if that fails.

    A file replaces one that is there. Of two folders made at once, which only a file system without locks lets happen, the first stays.
    """
    # the host's name too: on a shared file system two hosts may use the same process id
    name = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.partial")
    remove(name)
    try:
        yield name
        if kind(name) == "a file":
            with open(name, "rb") as file:
                os.fsync(file.fileno())
        try:
            os.replace(name, path)
        except OSError:
            if not (kind(name) == kind(path) == "a folder"):
                raise
    except OSError as error:
        if error.strerror and error.filename is None:  # a write does not say where
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # the error that led here says more
            remove(name)


def write(path: Path, content: str | bytes) -> None:
    """Write a file aside and give it its name when it is whole and on the disk."""
    with aside(path) as name, open(name, "xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sweep(folder: Path, name: str = "*", host: str = "*") -> None:
    """Delete what killed processes (of `host`, where locks may not reach further) left half made. Only for whoever holds the lock."""
    for left in entries(folder, f"{name}.{host}.*.partial"):
        remove(left)


@contextlib.contextmanager
def lock(path: Path, wait: bool = True, say=print):
    """Hold a lock that the system lets go when this process ends, however it ends.

    wait=False: BlockingIOError where another process holds it. Where the file system knows no locks, `say` says so and there is none.
    """
    with open_file(path, "r+b") as file:
        try:
            # not flock: processes forked later would hold that on
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise BlockingIOError(error.errno, "held by another process", str(path)) from None
            if error.errno not in NO_LOCKS:
                raise
            say(f"{path}: no locks on this file system ({error.strerror}): make sure that nobody else writes here")
        yield


def parse(text: str | bytes):
    """JSON as it is defined: ValueError for NaN and Infinity, which Python would read."""

    def refuse(name):
        raise ValueError(f"{name} is no number")

    return json.loads(text, parse_constant=refuse)


# ---- an ended run's files


def sealed(result: dict, digests: dict[str, str]) -> dict:
    """`result` with the sha256 of the run's files, and its own."""
    return result | {"sha256": digests | {"result.json": _seal(result, digests)}}


def result(folder: Path) -> dict | None:
    """What result.json says, None where there is none. ValueError, with the reason, for a damaged one."""
    try:
        found = parse(read(folder / "result.json"))
        digests = dict(found.pop("sha256", {}))
        own, step, status = digests.pop("result.json", None), int(found["step"]), found["status"]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"result.json is damaged ({type(error).__name__}: {error})") from None
    if digests and own is None or own and own != _seal(found, digests) or step < 0 or not isinstance(status, str):
        raise ValueError("result.json is damaged (its checksum does not match)")
    return found | ({"sha256": digests} if own else {})


def damaged(folder: Path) -> list[str]:
    """What is wrong with an ended run's files, by the checksums in its result.json; version 0.1 wrote none.

    OSError for what cannot be read, or is a link, a folder, a pipe.
    """
    try:
        found = result(folder) or {}
    except ValueError as error:
        return [str(error)]
    check_kinds(folder, folders=("models",))
    problems = []
    for name, expected in found.get("sha256", {}).items():
        try:
            if digest(folder / name) != expected:
                problems.append(f"{name} is damaged (its checksum does not match)")
        except FileNotFoundError:
            problems.append(f"{name} is gone")
    return problems


def _seal(result: dict, digests: dict) -> str:
    return hashlib.sha256(json.dumps([result, digests], sort_keys=True).encode()).hexdigest()


def commit() -> str | None:
    """The repository's commit, with `+` when tracked files differ from it, what publishing writes apart; None outside a repository."""
    root = Path(__file__).parents[1]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        written = [f":(exclude){path}" for path in ("results/data", "results/figures", "results/tables", "docs", "*.md")]
        tracked = ["git", "status", "--porcelain", "-uno", *written]
        dirty = subprocess.run(tracked, cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(dirty.strip())
