"""What `make run` shows: Local SGD, and SlowMo over it, at the same time, one thread each; then both compared."""

import re
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ("quickstart_local_sgd", "quickstart_slowmo_local_sgd")


def main() -> int:
    print("Local SGD, and SlowMo over it, both with 32 workers: some 2 minutes on 2 cores", flush=True)
    children = [
        subprocess.Popen([sys.executable, "run.py", f"experiment={name}", *sys.argv[1:]], cwd=ROOT, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for name in EXPERIMENTS
    ]  # fmt: skip
    said = [[] for _ in children]
    threads = [threading.Thread(target=follow, args=parts) for parts in zip(EXPERIMENTS, children, said)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:  # the terminal's comes to the runs too: they save, and their last words are waited for
            continue
    code = max(abs(child.wait()) for child in children)
    if code:
        return code
    done = [[found[1] for line in lines if (found := re.search(r"(?:done: |, see )(.+)/result\.json", line))] for lines in said]
    if not all(done):
        return 0  # a dry run
    folders = [found[-1] for found in done]
    picture = Path(folders[0]).parent.parent / "quickstart.png"
    return subprocess.run([sys.executable, "scripts/compare.py", *folders, "--picture", str(picture)], cwd=ROOT).returncode


def follow(name: str, child: subprocess.Popen, said: list[str]) -> None:
    """Pass a run's lines on, under its name."""
    for line in child.stdout:
        said.append(line)
        print(f"{name.removeprefix('quickstart_'):17}{line}", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
