"""Runs the notebooks of examples/ and keeps their outputs: `python tools/notebooks.py [NAME…]`; tests/examples runs them too.

They run in an empty folder. What is kept is what cells show and print, without warnings and progress, which are of one machine.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
TIMEOUT_S = 600
"""For one cell."""


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder; return it with its outputs.

    Raises:
        CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    executed = NotebookClient(notebook, timeout=TIMEOUT_S, record_timing=False, resources=place).execute()
    executed.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _is_shown(output)]
    return executed


def _is_shown(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a result, a picture or printed text."""
    if output.output_type == "stream":
        return bool(output.name == "stdout")
    return output.output_type != "display_data" or "image/png" in output.data


if __name__ == "__main__":
    chosen = sys.argv[1:]
    for found in sorted(NOTEBOOKS.glob("*.ipynb")):
        if not chosen or found.stem in chosen:
            print(found, flush=True)
            with tempfile.TemporaryDirectory(prefix="roentgen-") as place:
                nbformat.write(execute(found, Path(place)), found)
