"""Every example runs as it stands, in an empty folder, and leaves no process behind; the notebooks have kept their outputs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RayHome

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))

asked_for = pytest.mark.skipif("ROENTGEN_TEST_EXAMPLES" not in os.environ, reason="make test-examples runs them")


def in_turn(paths: list[Path]) -> list[Any]:
    return [pytest.param(path, id=path.stem, marks=pytest.mark.rotating) for path in paths]


@asked_for
@pytest.mark.parametrize("script", in_turn(SCRIPTS))
def test_a_script_runs(script: Path, tmp_path: Path, ray_home: RayHome) -> None:
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=ray_home.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.strip()
    assert ray_home.wait_until_gone() == []


@asked_for
@pytest.mark.parametrize("notebook", in_turn(NOTEBOOKS))
def test_a_notebook_runs(notebook: Path, tmp_path: Path, ray_home: RayHome, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ray_home.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ROENTGEN_GSM8K_DIR", raising=False)
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    executed = tool.execute(notebook, tmp_path)
    assert kinds(executed["cells"]) == kinds(json.loads(notebook.read_text())["cells"]), (
        "run: python tools/notebooks.py"
    )
    assert ray_home.wait_until_gone() == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept(notebook: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), (
        "run: python tools/notebooks.py"
    )
    shown = {kind for cell_kinds in kinds(cells) for kind in cell_kinds}
    assert "error" not in shown
    assert {"text/plain", "image/png"} & shown


def test_the_page_of_the_examples_links_each() -> None:
    page = (ROOT / "examples" / "README.md").read_text()
    for path in [*SCRIPTS, *NOTEBOOKS]:
        assert f"({path.relative_to(ROOT / 'examples')})" in page, path.name


def kinds(cells: list[dict[str, Any]]) -> list[set[str]]:
    """What each cell shows; what is written to the standard streams depends on the machine."""
    outputs = [[output for output in cell.get("outputs", ()) if output["output_type"] != "stream"] for cell in cells]
    return [{kind for output in cell for kind in output.get("data", {output["output_type"]: ""})} for cell in outputs]
