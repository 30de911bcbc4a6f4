"""Every notebook runs from top to bottom, shows something, and is kept without outputs."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    # a kernel of this Python, whatever kernels are installed
    subprocess.run([sys.executable, "-m", "ipykernel", "install", "--prefix", str(tmp_path)], check=True, capture_output=True)
    kernels = tmp_path / "share/jupyter"
    assert list(kernels.glob("kernels/*/kernel.json"))
    notebook = nbformat.read(path, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(kernels))
        patch.delenv("PYTHONPATH", raising=False)  # a notebook finds the checkout by itself
        NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) or "text/markdown" in output.get("data", {}) for output in outputs)


def test_no_outputs_are_kept():
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in nbformat.read(path, as_version=4).cells)
