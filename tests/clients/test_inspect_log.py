"""`roentgen export RUN log.eval`, read by inspect_ai's own readers into its own types."""

from pathlib import Path

import pytest
from inspect_ai.analysis import samples_df
from inspect_ai.log import EvalLog, read_eval_log, read_eval_log_sample_summaries
from inspect_ai.model import ChatMessageAssistant, ChatMessageTool

from eval_jobs.inspect_export import write_inspect_log
from eval_jobs.outputs import Timing, write_summary
from roentgen.runs import Run, rewrite
from tests.eval_jobs.test_outputs import make_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with tool calls, reasoning and a failed sample."""
    call = {"id": "a", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1 + 2"}'}}
    said = [
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call, {**call, "id": "b"}]},
        {"role": "tool", "tool_call_id": "a", "content": "3"},
        {"role": "tool", "tool_call_id": "b", "content": "3"},
    ]
    run = make_run(tmp_path)
    run = rewrite(run, lambda s: s.model_copy(update={"messages": [s.messages[0], *said, *s.messages[1:]]}), run.config)
    write_summary(run, Timing(4.0, 5, 10))
    return run


@pytest.fixture
def log(run: Run, tmp_path: Path) -> EvalLog:
    write_inspect_log(run, tmp_path / "log.eval")
    return read_eval_log(str(tmp_path / "log.eval"))


def test_inspect_ai_reads_every_sample(log: EvalLog, run: Run) -> None:
    assert log.samples is not None
    assert len(log.samples) == 5
    for found, sample in zip(log.samples, run.read_samples().by_name(), strict=True):
        assert (found.id, found.epoch, found.target) == (sample.problem_id, sample.epoch, sample.gold)
        assert [message.role for message in found.messages] == [message["role"] for message in sample.messages]
        if sample.error is not None:
            assert found.error is not None
            assert found.error.message == sample.error
            continue
        assert found.output.completion == sample.response
        assert found.scores is not None
        for name, score in found.scores.items():
            answer = sample.answers[name]
            # inspect_ai tells an answer that is wrong (`INCORRECT`) from none (`NOANSWER`).
            assert score.value == ("C" if sample.correct_by[name] else "N" if answer is None else "I")
            assert score.answer == answer


def test_tool_calls_are_tool_calls(log: EvalLog) -> None:
    assert log.samples is not None
    _, called, answer, *_ = log.samples[0].messages
    assert isinstance(called, ChatMessageAssistant)
    assert isinstance(answer, ChatMessageTool)
    assert called.tool_calls is not None
    assert [(c.function, c.arguments) for c in called.tool_calls] == 2 * [("calculator", {"expression": "1 + 2"})]
    assert [part.type for part in called.content if not isinstance(part, str)] == ["reasoning", "text"]


def test_its_scores_recounted_by_inspect_ai_are_the_run_s(log: EvalLog, run: Run, tmp_path: Path) -> None:
    assert log.results is not None
    frame = samples_df(str(tmp_path / "log.eval"), quiet=True)
    frame = frame[frame["error"].fillna("") == ""]
    for scores in log.results.scores:
        recounted = (frame[f"score_{scores.name}"] == "C").mean()
        assert scores.metrics["accuracy"].value == recounted
    assert [s.id for s in read_eval_log_sample_summaries(str(tmp_path / "log.eval"))] == [
        s.problem_id for s in run.read_samples().by_name()
    ]
