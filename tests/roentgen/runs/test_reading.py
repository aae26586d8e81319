"""A run is a table, a number with its interval, and rows of the store."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from eval_jobs.outputs import write_summary
from eval_jobs.parquet_export import write_parquet
from roentgen.runs import Run, RunError
from tests.eval_jobs.test_outputs import make_run
from tests.eval_jobs.test_summary import make

KEYS = ("layers.1.resid_post", "layers.2.resid_post")


def test_samples_and_accuracy(tmp_path: Path) -> None:
    run = Run(make_run(tmp_path).path)
    assert list(run.samples["sample_id"]) == [f"gsm8k_000{number}" for number in range(1, 6)]
    answered = run.samples[run.samples["error"].isna()]
    assert run.accuracy.n == len(answered)
    assert run.accuracy.value == pytest.approx(answered["correct"].mean())
    assert run.accuracy.low is not None
    assert run.accuracy.high is not None
    assert run.accuracy.low < run.accuracy.value < run.accuracy.high
    page = run._repr_html_()
    assert "gsm8k_0001" in page
    assert "<b>poisoned" not in page
    assert f"{run.accuracy.n} samples, accuracy {run.accuracy.value:.3f} [" in repr(run)


def test_the_table_is_what_is_exported(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_parquet(run, tmp_path / "samples.parquet")
    pd.testing.assert_frame_equal(run.samples, pd.read_parquet(tmp_path / "samples.parquet"))


def test_the_accuracy_is_the_summary_s(tmp_path: Path) -> None:
    """Clustered by problem: with epochs, the interval is wider than that of as many problems."""
    run = make(tmp_path / "run", {(1, epoch, None): "Answer: GOLD" for epoch in (1, 2, 3)}, epochs=3, temperature=1.0)
    assert vars(run.accuracy) == write_summary(run, None)["accuracy"]
    assert (run.accuracy.n, run.accuracy.correct) == (9, 3)


def test_rows_are_in_the_order_of_the_samples(build_run: Any, planted: Any) -> None:
    """Also where samples finished in another order: `stack()` and a column of `samples` are paired without looking."""
    features, correct = planted(KEYS, None, n=12)
    run = Run(build_run(features, correct).path)
    lines = run.record_path.read_text().splitlines(keepends=True)
    run.record_path.write_text("".join(lines[::-1]))
    session = run.path / "activations" / "session"
    for rows in (
        run.activations(KEYS[1], positions="last_prompt"),
        run.activations(KEYS[1], "last_prompt", session=session),
    ):
        assert list(rows.rollouts["problem_id"]) == list(run.samples["problem_id"])
        assert torch.equal(rows.stack(), features[KEYS[1]])
    assert run.keys() == list(KEYS)
    assert repr(rows) == f"Activations('{KEYS[1]}', positions='last_prompt', 12 rollouts)"


def test_several_sessions_are_named(build_run: Any, planted: Any) -> None:
    run = Run(build_run(*planted(KEYS, None, n=6), sessions=("one", "two")).path)
    with pytest.raises(RunError, match=r"session: .* several sessions, .*/one, .*/two; open one of them"):
        run.activations(KEYS[0])
