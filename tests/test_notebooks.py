"""The notebooks of docs/notebooks run from top to bottom, as a reader would run them, and keep what they showed."""

import os
import pathlib
import sys

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "docs/notebooks").glob("*.ipynb"))


def _read(path):
  nbformat = pytest.importorskip("nbformat", reason="notebooks need nbclient (pip install -e '.[test]')")
  return nbformat.read(path, 4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_outputs_and_small(path):
  cells = [cell for cell in _read(path).cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in cells] == list(range(1, 1 + len(cells)))
  assert sum(bool(cell.outputs) for cell in cells) >= len(cells) - 1 and path.stat().st_size < 300_000
  outputs = [output for cell in cells for output in cell.outputs]
  assert not any(output.output_type == "error" for output in outputs)
  assert not any("\r" in output.text or not output.text.strip() for output in outputs if "text" in output)


@pytest.mark.full
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
  nbclient = pytest.importorskip("nbclient", reason="notebooks need nbclient (pip install -e '.[test]')")
  monkeypatch.setenv("PATH", os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]))
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.delenv("XLA_FLAGS", raising=False)  # A reader has one device, not eight.
  notebook = _read(path)
  nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()  # Raises what a cell raises.
  commands = [cell for cell in notebook.cells if cell.cell_type == "code" and "!segjax" in cell.source]
  shown = "".join(output.text for cell in commands for output in cell.outputs if "text" in output)
  assert "Error" not in shown and ("exported:" in shown or not commands)
