"""The contents of a run exported as an inspect_ai log. tests/clients checks that inspect_ai reads it."""

import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from eval_jobs.inspect_export import write_inspect_log
from eval_jobs.outputs import Timing, write_summary
from roentgen.runs import Run, rewrite
from tests.eval_jobs.test_outputs import make_run
from tests.eval_jobs.test_summary import make


def export(run: Run, folder: Path) -> dict[str, Any]:
    """Write the log; return the parsed files of the archive."""
    write_inspect_log(run, folder / "log.eval")
    with ZipFile(folder / "log.eval") as archive:
        assert archive.testzip() is None
        return {name: json.loads(archive.read(name)) for name in archive.namelist()}


def test_a_run_s_numbers_are_the_log_s(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    summary = write_summary(run, Timing(4.0, 5, 10))
    files = export(run, tmp_path)
    header = files["header.json"]
    assert header["status"] == "cancelled"  # a problem is missing
    assert (header["eval"]["model"], header["eval"]["task"]) == ("stand-in", "arithmetic")
    assert header["eval"]["metadata"]["hashed"] == run.config.hashed
    primary, *others = header["results"]["scores"]
    assert primary["name"] == "answer"
    assert primary["metrics"]["accuracy"]["value"] == summary["accuracy"]["value"] == 0.5
    assert {scores["name"] for scores in others} == {
        "answer_line",
        "gsm8k_strict",
        "cot_strict",
        "flexible",
        "boxed",
        "math_verify",
    }
    assert [line["id"] for line in files["summaries.json"]] == header["eval"]["dataset"]["sample_ids"]
    third = files["samples/arithmetic-0003_epoch_1.json"]
    assert (third["target"], third["scores"]["answer"]) == ("6", {"value": "C", "answer": "6"})
    assert third["scores"]["flexible"] == {"value": "I", "answer": "3"}
    assert third["metadata"]["rollouts"] == [{"session": "/store/s", "rollout_id": "r3", "turn": 0}]
    assert files["samples/arithmetic-0004_epoch_1.json"]["output"]["choices"][0]["stop_reason"] == "max_tokens"
    failed = files["samples/arithmetic-0005_epoch_1.json"]
    assert (failed["scores"], failed["error"]["message"]) == ({}, "500: <b>poisoned</b>")


def test_variants_and_epochs_are_samples_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text("plain: ''\ncalm: No hurry.\n")
    files = export(make(tmp_path / "run", {}, variants=str(tmp_path / "v.yaml"), epochs=2), tmp_path)
    assert files["header.json"]["status"] == "success"
    ids = files["header.json"]["eval"]["dataset"]["sample_ids"]
    assert sorted(ids) == sorted(f"arithmetic-000{n}@{name}" for n in (1, 2, 3) for name in ("plain", "calm"))
    assert {name for name in files if name.startswith("samples/")} == {
        f"samples/{sample}_epoch_{epoch}.json" for sample in ids for epoch in (1, 2)
    }


@pytest.mark.parametrize(
    ("arguments", "expected", "error"),
    [
        ('{"expression": "1 < 2"}', {"expression": "1 < 2"}, None),
        ('{"expr', {"arguments": '{"expr'}, "the arguments are not JSON"),
        ("[1]", {"arguments": "[1]"}, "the arguments are not a JSON object"),
    ],
)
def test_tool_calls_and_reasoning_are_spelled_as_inspect_ai_does(
    tmp_path: Path, arguments: str, expected: dict[str, str], error: str | None
) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "calculator", "arguments": arguments}}
    said = [
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "7"},
    ]
    run = make_run(tmp_path)
    run = rewrite(run, lambda s: s.model_copy(update={"messages": [s.messages[0], *said, *s.messages[1:]]}), run.config)
    asked, called, answered, _ = export(run, tmp_path)["samples/arithmetic-0001_epoch_1.json"]["messages"]
    assert asked["role"] == "user"
    assert called["content"] == [{"type": "reasoning", "reasoning": "Hm."}, {"type": "text", "text": ""}]
    (found,) = called["tool_calls"]
    assert (found["id"], found["function"], found["arguments"]) == ("a", "calculator", expected)
    assert found["parse_error"] is None if error is None else found["parse_error"].startswith(error)
    assert answered == {"role": "tool", "content": "7", "tool_call_id": "a"}
