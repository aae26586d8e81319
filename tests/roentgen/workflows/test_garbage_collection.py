"""`roentgen sessions`' verbs that change something, and what garbage collection against its runs removes."""

import itertools
import multiprocessing
import time
from collections import deque
from pathlib import Path

import pytest
from typer.testing import CliRunner

from roentgen.cli import app
from roentgen.runs import RolloutRef, Run, create_run, recording
from roentgen.store import Receipt, Session, StoreWriter, verify
from roentgen.workflows.garbage_collection import collect_garbage
from tests.roentgen.runs.test_run import config, sample
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
    assert collect_garbage(session, [], older_than_s=0).dropped == 0
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


def evaluate_without_end(store: str, run: str) -> None:
    """Store rollouts and record their samples, two of which are always on their way from the store to the record."""
    make, waiting = RolloutFactory(), deque[tuple[str, Receipt]]()
    with recording(Run(Path(run))) as record, StoreWriter(store, max_wait_s=0) as writer:
        for problem in map("p{}".format, itertools.count()):
            waiting.append((problem, writer.submit(make(problem=problem)).result()))
            if len(waiting) > 2:
                recorded, receipt = waiting.popleft()
                ref = RolloutRef(**vars(receipt), tensors={}, turn=0)
                record.append(sample(recorded).model_copy(update={"config_hash": "c", "rollouts": [ref]}))


def test_what_a_killed_evaluation_stored_and_did_not_record_goes(tmp_path: Path) -> None:
    make, store, run = RolloutFactory(), str(tmp_path / "store"), create_run(tmp_path / "run", config("c"))
    with StoreWriter(store, max_wait_s=0) as writer:
        others = writer.submit(make()).result().rollout_id  # which no evaluation asked for
    evaluation = multiprocessing.get_context("spawn").Process(target=evaluate_without_end, args=(store, str(run.path)))
    evaluation.start()
    while not (run.record_path.exists() and run.record_path.read_bytes().count(b"\n") >= 5):
        assert evaluation.is_alive()
        time.sleep(0.01)
    evaluation.kill()
    evaluation.join()
    named = {ref.rollout_id for one in run.read_samples() for ref in one.rollouts}
    stored = set(Session.open(f"{store}/s").rollouts(unique=False)["rollout_id"])
    assert len(named) >= 5
    assert len(stored - named) >= 2  # and the other
    done = RUNNER.invoke(app, ["sessions", "gc", f"{store}/s", "--run", str(run.path), "--older-than", "0"])
    assert f"removed {len(stored - named - {others})} rollouts" in done.output
    session = Session.open(f"{store}/s")
    assert set(session.rollouts(unique=False)["rollout_id"]) == named | {others}
    assert (verify(session).damage, verify(session).orphans) == ([], [])
