"""The README's own loop runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]


def test_the_loop_is_an_ordinary_one():
    (line,) = [line for line in PROGRAM.splitlines() if "slowmo." in line]
    assert "# the only new line" in line


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loop_trains(ranks, tmp_path):
    (tmp_path / "loop.py").write_text(PROGRAM)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # unbuffered, so that a line of one rank is not cut by another's
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([*launcher, "loop.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"rank (\d), step (\d+): loss (\d+\.\d{4}|\w+)", done.stdout)
    losses = {(int(rank), int(step)): float(loss) for rank, step, loss in found}
    assert losses.keys() == {(rank, step) for rank in range(ranks) for step in (0, 119)}
    assert all(losses[rank, 119] < 0.2 * losses[rank, 0] for rank in range(ranks))  # false for NaN and infinity too
