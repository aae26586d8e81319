"""The wheel works without the repository: in an environment of its own, with nothing of this one but the libraries."""

import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import roentgen
from roentgen.runs import Run
from tests.eval_jobs.test_outputs import make_run

ROOT = Path(__file__).parents[1]
PACKAGES = ("roentgen", "serve_app", "eval_jobs", "probes")
NAME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # Both, the wheel made of what the source distribution holds; the build's own libraries are here already.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel, which finds this one's libraries and not its packages: those are a link."""
    folder = tmp_path_factory.mktemp("env")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-index",
        "--no-deps",
        str(wheel),
        cwd=folder,
    )
    return folder


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    there = {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == there
    assert {f"{package}/py.typed" for package in PACKAGES} <= packed


def test_it_is_called_what_it_is(wheel: Path) -> None:
    assert wheel.name == f"{NAME.replace('-', '_')}-{roentgen.__version__}-py3-none-any.whl"
    assert NAME != "roentgen"  # an X-ray library on PyPI


def test_the_command_and_the_import_work(environment: Path, tmp_path: Path) -> None:
    command, python = str(environment / "bin" / "roentgen"), str(environment / "bin" / "python")
    assert run(command, "--version", cwd=tmp_path) == f"{roentgen.__version__}\n"
    place = run(python, "-c", "import roentgen; print(roentgen.__file__)", cwd=tmp_path)
    assert place.startswith(str(environment))
    assert "Evaluate a model" in run(python, "-m", "eval_jobs", "--help", cwd=tmp_path)
    made = make_run(tmp_path)
    assert run(command, "report", str(made.path), cwd=tmp_path) == f"{made.path / 'report.html'}\n"
    page = (made.path / "report.html").read_text()
    assert roentgen.report(made).read_text() == page
    shown = f"import roentgen; print(roentgen.Run({str(made.path)!r})._repr_html_())"
    assert run(python, "-c", shown, cwd=tmp_path).strip() == Run(made.path)._repr_html_().strip()
