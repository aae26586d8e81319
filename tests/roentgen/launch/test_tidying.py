"""`roentgen sessions`' verbs that change something, and what tidying a session against its runs removes."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from roentgen.cli import app
from roentgen.launch.tidying import tidy
from roentgen.store import Session, StoreWriter
from tests.roentgen.store.conftest import RolloutFactory

RUNNER = CliRunner()


@pytest.fixture
def session(tmp_path: Path) -> str:
    """A session of four rollouts in four shards."""
    make = RolloutFactory()
    with StoreWriter(tmp_path, max_wait_s=0) as writer:
        for number in range(4):
            writer.submit(make(problem=f"p{number}")).result()
    return str(tmp_path / "s")


def test_without_a_run_no_rollout_goes(session: str) -> None:
    assert tidy(session, [], older_than_s=0).dropped == 0
    assert len(Session.open(session).rollouts()) == 4


def test_a_session_is_compacted_collected_and_deleted(session: str, tmp_path: Path) -> None:
    done = RUNNER.invoke(app, ["sessions", "compact", session])
    assert "4 rollouts: 4 index files are now 1, 4 shards are now 1" in done.output
    assert "nothing to merge" in RUNNER.invoke(app, ["sessions", "compact", session]).output
    would = RUNNER.invoke(app, ["sessions", "gc", session, "--older-than", "0", "--dry-run"])
    assert "would remove 0 rollouts and 8 files" in would.output
    assert (
        "removed 0 rollouts and 8 files" in RUNNER.invoke(app, ["sessions", "gc", session, "--older-than", "0"]).output
    )
    assert len(Session.open(session).rollouts()) == 4
    pulled = RUNNER.invoke(app, ["sessions", "pull", session, str(tmp_path / "copy")])
    assert "0 damaged" in pulled.output
    assert RUNNER.invoke(app, ["sessions", "rm", session], input="n\n").exit_code == 1
    assert RUNNER.invoke(app, ["sessions", "rm", session], input="y\n").exit_code == 0
    assert RUNNER.invoke(app, ["sessions", "show", session]).exit_code == 2
    exported = RUNNER.invoke(app, ["sessions", "export", str(tmp_path / "copy/s"), str(tmp_path / "pt")])
    assert exported.exit_code == 0
    assert len(list((tmp_path / "pt").glob("*.pt"))) == 8


def test_an_unknown_key_is_named(session: str, tmp_path: Path) -> None:
    done = RUNNER.invoke(app, ["sessions", "export", session, str(tmp_path / "x"), "--format", "hf", "--key", "nope"])
    assert done.exit_code == 2
    assert not (tmp_path / "x").exists()
