"""Every notebook runs from top to bottom, and is kept with what it shows: `jupyter-execute --inplace notebooks/*.ipynb` makes it anew."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.slow
def test_it_runs(path, tmp_path):
    # a kernel of this Python, whatever kernels are installed
    subprocess.run([sys.executable, "-m", "ipykernel", "install", "--prefix", str(tmp_path)], check=True, capture_output=True)
    kernels = tmp_path / "share/jupyter"
    assert list(kernels.glob("kernels/*/kernel.json"))
    notebook = nbformat.read(path, as_version=4)
    kept = [texts(cell) for cell in notebook.cells]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(kernels))
        patch.delenv("PYTHONPATH", raising=False)  # a notebook finds the checkout by itself
        NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert [texts(cell) for cell in notebook.cells] == kept, "jupyter-execute --inplace notebooks/*.ipynb"
    assert any(text for text in kept) and notebook.cells[-1].source.startswith("## What one sees")


def texts(cell) -> list[str]:
    """What a cell shows; of a figure that it does."""
    data = [output.get("data", {}) for output in cell.get("outputs", ())]
    return ["figure" if "image/png" in one else one.get("text/markdown", "") for one in data]


def test_they_are_small():
    assert NOTEBOOKS and all(path.stat().st_size < 400_000 for path in NOTEBOOKS)
