"""A run as a table, read by pandas."""

import json
from pathlib import Path

import pandas as pd
import pytest

from eval_jobs import parquet_export
from eval_jobs.parquet_export import write_parquet
from tests.eval_jobs.test_outputs import make_run
from tests.eval_jobs.test_summary import make


def test_a_row_per_sample_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_export, "ROWS_AT_ONCE", 2)
    run = make_run(tmp_path)
    assert write_parquet(run, tmp_path / "samples.parquet") == 5
    frame = pd.read_parquet(tmp_path / "samples.parquet").set_index("sample_id")
    samples = {sample.sample_id: sample for sample in run.read_samples()}
    assert list(frame.index) == [f"gsm8k_000{number}" for number in range(1, 6)]
    for name, row in frame.iterrows():
        sample = samples[str(name)]
        assert json.loads(row["messages"]) == sample.messages
        assert list(row["rollout_ids"]) == [rollout.rollout_id for rollout in sample.rollouts]
        assert row["completion_tokens"] == sample.completion_tokens
    third = frame.loc["gsm8k_0003"]
    assert (third["answer_flexible"], third["correct_flexible"], third["correct"]) == ("3", False, True)
    assert (third["session"], third["turns"]) == ("/store/s", 1)
    failed = frame.loc["gsm8k_0005"]
    assert failed["error"] == "500: <b>poisoned</b>"
    assert failed[["correct", "correct_flexible", "answer_flexible", "session"]].isna().all()
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_variants_and_epochs_are_columns(tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text("plain: ''\ncalm: No hurry.\n")
    run = make(tmp_path / "run", {(1, 2, "calm"): "Answer: GOLD"}, variants=str(tmp_path / "v.yaml"), epochs=2)
    write_parquet(run, tmp_path / "samples.parquet")
    frame = pd.read_parquet(tmp_path / "samples.parquet")
    assert len(frame) == 12
    right = frame[frame["correct"]]
    assert list(zip(right["problem_id"], right["variant"], right["epoch"], strict=True)) == [
        ("arithmetic-0001", "calm", 2)
    ]
