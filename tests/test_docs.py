"""docs/ keeps its word: its programs run, its errors are the library's, its links lead somewhere."""

import ast
import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from processes import spawn

import slowmo

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
LIBRARY = (ROOT / "docs" / "library.md").read_text()
PROGRAMS = {
    f"{page.stem} {k}": text for page in PAGES for k, text in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S), 1)
}
# what somebody who uses slowmo.SlowMo, or the objects underneath, may meet
MODULES = ("optimizer", "inner", "replicas", "buckets", "base", "outer", "cluster", "topology", "state")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs(name, ranks, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAMS[name])
    if ranks > 1:
        assert spawn(run_in, ranks, tmp_path) == [None] * ranks
        return
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr


def run_in(folder):
    os.chdir(folder)
    runpy.run_path("program.py")


def messages() -> list[str]:
    """Of each error that these modules raise: its text, with `...` where values stand."""
    found = []
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / "slowmo" / f"{module}.py").read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                (text,) = node.exc.args
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                found.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in parts))
    return found


def test_every_error_is_listed_and_every_listed_error_exists():
    section = re.search(r"## Errors\n(.*?)\n## ", LIBRARY, re.S)[1]
    told = [part for line in section.splitlines() if line.startswith("- ") for part in re.findall(r"`([^`]+)`", line.split(": ")[0])]
    told += [part for line in section.splitlines() for part in re.findall(r"\. (?:[A-Z][a-z ]+: )?`([^`]+)`", line)]
    raised = messages()
    assert len(raised) > 40
    assert not [text for text in raised if not any(part in text for part in told)]
    assert not [part for part in told if not any(part in text for text in raised)]


def test_the_table_has_every_parameter():
    names = [name for name in inspect.signature(slowmo.SlowMo).parameters if name not in ("model", "optimizer")]
    table = re.search(r"\| parameter \|.*?\n\n", LIBRARY, re.S)[0]
    told = [name for row in table.splitlines()[2:] if row for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert told == names


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert links and all((page.parent / link).exists() for link in links), [link for link in links if not (page.parent / link).exists()]
