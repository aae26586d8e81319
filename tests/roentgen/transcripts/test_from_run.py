from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from roentgen.contract import RolloutKey
from roentgen.runs import RolloutRef, Run, RunConfig, Sample, create_run, recording
from roentgen.store import CapturedRollout, CaptureSpec, StoreWriter
from roentgen.tokenized_text import Segment, TokenizedText
from roentgen.transcripts import TranscriptError
from roentgen.transcripts.from_run import read_run

ASK = {"role": "user", "content": "1 + 1?"}
ANSWER = {"role": "assistant", "content": "Answer: 2"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = RunConfig(
        run_id="run", created="2025-01-01T00:00:00Z", config_hash="c0ffee", hashed={}, problems={},
        settings={"extractor": "answer_line"}, prompt={}, versions={},
    )  # fmt: skip
    return create_run(tmp_path / "run", config)


def record(run: Run, *changes: Any) -> None:
    fields = {
        "config_hash": "c0ffee", "question": "1 + 1?", "solution": "2", "gold": "2", "correct": True,
        "messages": [ASK, ANSWER], "response": "Answer: 2", "answers": {"answer_line": "2"}, "finish_reason": "stop",
    }  # fmt: skip
    with recording(run) as recorder:
        for number, change in enumerate(changes):
            names = {"sample_id": f"gsm8k_{number:04}", "problem_id": f"p{number}"}
            recorder.append(Sample.model_validate(fields | names | change))


SEGMENTS = [Segment("user", 0, 3), Segment("assistant", 3, 5)]


def store(run: Run, rollout_id: str = "01", session: str = "run") -> Any:
    """Put a rollout of [1, 2, 3 | 4, 5] into the run's session; return where it is, as the record says it."""
    rollout = CapturedRollout(
        session_id=session,
        rollout_id=rollout_id,
        spec=CaptureSpec(model="m", revision="r", keys=("embed",), positions="last", dtype="torch.float32"),
        tensors={"embed": torch.zeros(1, 2)},
        position=np.array([3]),
        sequence=TokenizedText("abcde", [1, 2, 3, 4, 5], [0, 1, 2, 3, 4], SEGMENTS, 3),
        logprobs=np.array([np.nan, np.nan, np.nan, -1.0, -1.0]),
        finish_reason="stop",
        key=RolloutKey(config_hash="c0ffee", problem_id="p0"),
    )
    with StoreWriter(run.path / "activations") as writer:
        receipt = writer.submit(rollout).result()
    fields = {"rollout_id": rollout_id, "session_id": session, "uri": receipt.uri, "shard": receipt.shard}
    return RolloutRef(turn=0, row_start=0, row_stop=1, tensors={}, **fields)


def test_an_answer_keeps_its_key_and_its_labels(run: Run) -> None:
    record(run, {"epoch": 3}, {"finish_reason": "length", "correct": False, "answers": {"answer_line": None}})
    first, second = read_run(run, print)
    assert first.key == RolloutKey(config_hash="c0ffee", problem_id="p0", epoch=3, turn=0)
    assert (first.prompt, first.completion, first.finish_reason) == ((ASK,), "Answer: 2", "stop")
    assert first.labels == {
        "problem_id": "p0", "sample_id": "gsm8k_0000", "gold": "2", "answer": "2", "correct": True,
    }  # fmt: skip
    assert (second.finish_reason, second.labels["correct"], second.labels["answer"]) == ("length", False, None)
    assert first.name == "p0 epoch 3"


def test_failed_samples_have_nothing_to_read(run: Run) -> None:
    record(run, {"error": "timed out", "messages": [ASK]}, {})
    assert [t.key.problem_id for t in read_run(run, print)] == ["p1"]


def test_a_run_without_answers_says_so(run: Run) -> None:
    record(run, {"error": "timed out"})
    with pytest.raises(TranscriptError, match="none of its 1 samples is finished"):
        read_run(run, print)


def test_every_turn_is_read_with_what_came_before(run: Run) -> None:
    """Messages of the assistant before the last of the user are examples, not answers."""
    call, result = {"role": "assistant", "content": "<<1+1>>"}, {"role": "tool", "content": "2"}
    record(run, {"messages": [ASK, ANSWER, ASK, call, result, ANSWER], "finish_reason": "length"})
    first, second = read_run(run, print)
    assert (first.key.turn, first.prompt, first.completion) == (0, (ASK, ANSWER, ASK), "<<1+1>>")
    assert (second.key.turn, second.prompt) == (1, (ASK, ANSWER, ASK, call, result))
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")


def test_stored_tokens_come_along_also_from_a_moved_run(run: Run, tmp_path: Path) -> None:
    record(run, {"rollouts": [store(run)]}, {})
    moved = run.path.rename(tmp_path / "elsewhere")
    said: list[str] = []
    first, second = read_run(Run(moved), said.append)
    assert first.tokens is not None
    assert (first.tokens.sequence.token_ids, first.tokens.sequence.n_prompt) == ([1, 2, 3, 4, 5], 3)
    assert (first.tokens.model, first.tokens.revision) == ("m", "r")
    assert first.tokens.sequence.segments == SEGMENTS
    assert second.tokens is None
    assert said == []


def test_a_lost_store_is_said_and_costs_only_the_tokens(run: Run) -> None:
    record(run, {"rollouts": [store(run).model_copy(update={"uri": "/gone", "session_id": "gone"})]})
    said: list[str] = []
    (transcript,) = read_run(run, said.append)
    assert transcript.tokens is None
    assert "/gone is not a session" in said[0]
    assert "tokenized again" in said[0]
