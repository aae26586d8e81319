"""`import roentgen` costs nothing, and gives what it lists."""

import subprocess
import sys

import roentgen

HEAVY = {"torch", "ray", "transformers", "pandas", "pyarrow", "openai", "fastapi", "pydantic", "rich"}


def test_importing_it_loads_no_library() -> None:
    script = "import sys, roentgen; dir(roentgen); print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(done.stdout.split())


def test_every_public_name_is_there() -> None:
    assert set(roentgen.__all__) <= set(dir(roentgen))
    for name in roentgen.__all__:
        assert getattr(roentgen, name) is not None, name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(roentgen, "lode")


def test_the_command_says_its_version() -> None:
    from typer.testing import CliRunner

    from roentgen.cli import app

    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"{roentgen.__version__}\n")
