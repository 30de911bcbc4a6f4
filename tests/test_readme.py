"""The README stays one that is read: short, one small table, and its loop is the example's."""

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150
    tables = re.findall(r"(?:^\|.*\n)+", TEXT, re.M)
    assert len(tables) == 1 and all(line.count("|") <= 6 for line in tables[0].splitlines())


def test_the_loop_is_the_example_s_which_runs():
    """tests/test_examples.py runs it, on one process and on two."""
    (loop,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert textwrap.indent(loop, " " * 4) in (ROOT / "examples/loop.py").read_text()
    (line,) = [line for line in loop.splitlines() if "slowmo." in line]
    assert "# the only new line" in line


def test_how_to_test_is_said():
    assert "`make test`" in TEXT and all(f"`{marker}`" in TEXT for marker in ("slow", "slurm", "gpu", "download", "soak"))


def test_its_tree_is_the_checkout_s():
    tree = re.search(r"## Where things are\n\n```text\n(.*?)```", TEXT, re.S)[1]
    named = {word.rstrip("/") for line in tree.splitlines() for word in (line.split() if line.count("/ ") > 1 else line.split()[:1])}
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert there <= named and all((ROOT / name).exists() for name in named)
