"""Every example, as it stands, on one process and on two under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("loop", "fabric", "lightning_module", "accelerate_loop", "trainer")
STEPS, TAU = 66, 12


CASES = [(name, ranks) for name in NAMES for ranks in (1, 2)]


@pytest.mark.parametrize(
    "name, ranks", [pytest.param(*case, marks=pytest.mark.slow if case[0] not in ("loop", "accelerate_loop") else []) for case in CASES]
)
def test_example(name, ranks):
    launcher = (
        [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    )
    path = os.pathsep.join(map(str, (ROOT / "examples", ROOT)))
    done = subprocess.run(
        [*launcher, str(ROOT / "tests/support/drive.py"), name, str(STEPS)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    found = json.loads(lines[0].removeprefix("found "))
    assert found["ranks"] == ranks and found["steps"] == [STEPS] * ranks
    assert STEPS % TAU  # in mid-round workers differ: nothing but SlowMo's messages was sent
    assert (found["distance"] > 1e-4) == (ranks > 1)
    assert found["distance of x0"] == 0 and found["distance of the average"] < 1e-5
    assert min(found["accuracy"]) > 0.7


def test_examples_are_all_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*NAMES}


def test_the_loop_is_an_ordinary_one():
    """The one new line is the only one that names SlowMo; the README shows this loop (test_readme.py)."""
    text = (ROOT / "examples" / "loop.py").read_text()
    loop = text[text.index("def train") : text.index("def accuracy")]
    assert loop.count("slowmo") == 1 and "# the only new line" in loop
