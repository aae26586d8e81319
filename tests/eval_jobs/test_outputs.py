"""Files derived from the record, and a summary recounted by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval_jobs.extractors import score
from eval_jobs.hashed_config import ServedModelInfo
from eval_jobs.outputs import Timing, write_missing_sample_files, write_summary
from eval_jobs.problems import Problem
from eval_jobs.resume import open_run
from eval_jobs.settings import check_settings
from roentgen.contract import StoredTensor
from roentgen.runs import RolloutRef, Run, Sample, Turn, recording
from tests.disk import DiskCalls
from tests.eval_jobs.conftest import take

REPLIES = {
    1: ("Answer: -103", "stop"),
    2: ("Answer: 4", "stop"),  # wrong, and every extractor that reads it says so
    3: ("Answer: 6 (see step 3)", "stop"),  # right by answer, wrong by flexible
    4: ("I will now", "length"),
    5: ("", None),  # failed
}


def sample(problem: Problem, response: str, finish_reason: str | None, rollouts: bool = True) -> Sample:
    scores = score(response, problem.gold)
    identity: dict[str, Any] = {
        "sample_id": f"gsm8k_{problem.number:04d}",
        "problem_id": problem.problem_id,
        "config_hash": "0123456789abcdef",
        "question": problem.question,
        "solution": problem.solution,
        "gold": problem.gold,
    }
    asked = {"role": "user", "content": problem.question}
    if finish_reason is None:
        return Sample(**identity, messages=[asked], error="500: <b>poisoned</b>")
    tensor = StoredTensor(shape=(14, 8), dtype="float32", stored_path="shards/1.safetensors")
    rollout = RolloutRef(
        turn=0, session_id="s", rollout_id=f"r{problem.number}", uri="/store/s", shard="shards/1.safetensors",
        row_start=10, row_stop=10 + 2 * problem.number, tensors={"layers.8.ln_attn": tensor},
    )  # fmt: skip
    return Sample(
        **identity,
        messages=[asked, {"role": "assistant", "content": response}],
        response=response,
        answers=scores.answers,
        correct_by=scores.correct_by,
        correct=scores.correct_by["answer"],
        finish_reason=finish_reason,
        prompt_tokens=10,
        cached_tokens=8,
        completion_tokens=problem.number,
        seconds=0.5,
        turns=[Turn(finish_reason=finish_reason, prompt_tokens=10, completion_tokens=problem.number, seconds=0.5)],
        rollouts=[rollout] if rollouts else [],
    )


def make_run(path: Path, samples: int = 5, activations: bool = True) -> Run:
    """A run of five problems with the replies above."""
    settings = check_settings(samples=samples, output=path / "run", collect_activations=activations)
    problems = take("arithmetic", samples)
    run = open_run(settings, problems, ServedModelInfo("stand-in", "r1", "float32", 30, 8), "http://h:1/v1")
    with recording(run) as record:
        for problem in reversed(problems):
            record.append(sample(problem, *REPLIES[problem.number], rollouts=activations))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


def test_the_summary_recounted_by_hand(run: Run) -> None:
    summary = write_summary(run, Timing(4.0, 2, 7))
    assert json.loads((run.path / "summary.json").read_text()) == summary
    assert summary["complete"] is False  # one failed
    assert (summary["samples"], summary["errors"], summary["truncated"], summary["unparsable"]) == (4, 1, 1, 1)
    assert summary["accuracy"]["value"] == 0.5
    assert summary["accuracy"]["standard_error"] == pytest.approx((0.25 / 3) ** 0.5)
    assert summary["extractors"]["answer"]["correct"] == 2
    assert summary["extractors"]["flexible"]["correct"] == 1
    assert summary["extractors"]["flexible"]["differs_from_primary"] == 1
    assert summary["extractors"]["boxed"]["unparsable"] == 4
    assert summary["disagreements"] == ["gsm8k_0003"]
    assert (summary["prompt_tokens"], summary["completion_tokens"], summary["request_seconds"]) == (40, 10, 2.0)
    assert summary["cached_tokens"] == 32
    assert summary["activations"] == {
        "session_id": "s",
        "uri": "/store/s",
        "rollouts": 4,
        "keys": ["layers.8.ln_attn"],
        "mean_rows": 5.0,
    }
    assert summary["timing"] == {
        "wall_seconds": 4.0,
        "samples": 2,
        "completion_tokens": 7,
        "tokens_per_second": 1.75,
    }


def test_a_summary_made_again_keeps_the_time_it_had(run: Run) -> None:
    first = write_summary(run, Timing(4.0, 1, 3))
    assert write_summary(run, None) == first


def test_a_run_is_complete_when_every_problem_has_an_answer(run: Run) -> None:
    with recording(run) as record:
        record.append(sample(take("arithmetic", 5)[4], "Answer: 0", "stop"))
    summary = write_summary(run, None)
    assert (summary["complete"], summary["errors"], summary["samples"]) == (True, 0, 5)


def test_a_run_of_nothing_has_a_summary(tmp_path: Path) -> None:
    settings = check_settings(output=tmp_path / "run")
    empty = open_run(settings, take("arithmetic", 3), ServedModelInfo("m"), "http://h:1/v1")
    summary = write_summary(empty, None)
    assert summary["complete"] is False
    assert summary["accuracy"]["value"] is None
    assert summary["activations"] is None


def test_an_answer_that_only_another_extractor_found_is_audited(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    gold = take("arithmetic", 5)[4].gold
    with recording(run) as record:
        record.append(sample(take("arithmetic", 5)[4], f"It is 2 or 3, that is: {gold}", "length"))
    summary = write_summary(run, None)
    assert (summary["unparsable"], summary["unread_but_right"]) == (2, 1)
    assert summary["verdicts"] == {"correct": 2, "wrong": 1, "no_answer": 2}
    assert summary["extractors"]["boxed"]["verdicts"] == {"correct": 0, "wrong": 0, "no_answer": 5}
    audit = {line["sample_id"]: line for line in map(json.loads, (run.path / "audit.jsonl").read_text().splitlines())}
    assert summary["disagreements"] == list(audit) == ["gsm8k_0003", "gsm8k_0005"]
    unread = audit["gsm8k_0005"]
    assert (unread["extractor"], unread["verdict"]) == ("answer", "no_answer")
    assert unread["readings"]["flexible"]["correct"]
    assert audit["gsm8k_0003"]["verdict"] == "correct"


def test_samples_from_before_an_extractor_are_not_judged_by_it(run: Run) -> None:
    older = {"answer_line": "-103", "flexible": "-103"}
    with recording(run) as record:
        now = sample(take("arithmetic", 5)[4], "Answer: 0", "stop")
        record.append(
            now.model_copy(update={"answers": older, "correct_by": dict.fromkeys(older, True), "correct": True})
        )
    summary = write_summary(run, None)
    assert (summary["extractors"]["answer"]["n"], summary["extractors"]["flexible"]["n"]) == (4, 5)
    assert summary["extractors"]["answer"]["unparsable"] == 1
    pair = next(p for p in summary["agreement"] if p["extractors"] == ["answer", "flexible"])
    assert pair["same"] + pair["only_first"] + pair["only_second"] == 4


def test_the_dataset_can_be_posed_again(run: Run) -> None:
    write_summary(run, None)
    again = take(str(run.path / "dataset.jsonl"), 9)
    original = take("arithmetic", 5)
    assert again == original


def test_a_very_large_run_gets_no_files_per_sample(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval_jobs.outputs.SAMPLE_FILES_UP_TO", 4)
    write_missing_sample_files(run)
    assert not (run.path / "samples").exists()


def test_what_a_killed_driver_left_half_written_goes(run: Run) -> None:
    (run.path / "samples").mkdir()
    (run.path / "samples" / ".gsm8k_0003.json.0123.tmp").write_text("{")
    write_missing_sample_files(run)
    assert len(list((run.path / "samples").iterdir())) == 5


def test_the_files_of_a_sample(run: Run, disk_calls: DiskCalls) -> None:
    write_missing_sample_files(run)
    write_summary(run, None)
    written = [
        path
        for path in run.path.rglob("*")
        if path.is_file() and path not in (run.record_path, run.path / "config.json")
    ]
    assert len(written) == 3 * 5 + 3
    for path in written:
        disk_calls.check_atomic(path)
    for folder, suffix in (("samples", "json"), ("trajectories", "jsonl"), ("agent_states", "json")):
        names = [path.name for path in sorted((run.path / folder).iterdir())]
        assert names == [f"gsm8k_000{number}.{suffix}" for number in range(1, 6)]
    one = json.loads((run.path / "samples/gsm8k_0003.json").read_text())
    assert one["correct"] is True
    assert one["activations"]["layers.8.ln_attn"] == {
        "format": "stored_tensor",
        "shape": [14, 8],
        "dtype": "float32",
        "stored_path": "shards/1.safetensors",
        "turn": 0,
        "rollout_id": "r3",
        "session": "/store/s",
        "row_start": 10,
        "row_stop": 16,
    }
    lines = (run.path / "trajectories/gsm8k_0003.jsonl").read_text().splitlines()
    assert [json.loads(line)["role"] for line in lines] == ["user", "assistant"]
    state = json.loads((run.path / "agent_states/gsm8k_0003.json").read_text())
    assert state["turns"][0]["rollout_id"] == "r3"
    assert (state["stop"], state["error"]) == ("stop", None)
    failed = json.loads((run.path / "agent_states/gsm8k_0005.json").read_text())
    assert (failed["turns"], failed["stop"], failed["error"]) == ([], "error", "500: <b>poisoned</b>")
