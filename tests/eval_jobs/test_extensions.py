"""Evaluations with custom problems, prompts and scorers on a real Ray: functions are pickled, and a run recognizes them
later."""

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval_jobs import EvalError
from eval_jobs.extractors import UnknownScorerError
from eval_jobs.problems import Problem
from eval_jobs.rescoring import rescore
from eval_jobs.resume import OtherConfigurationError
from eval_jobs.verdicts import Output, Verdict
from roentgen.runs import Run
from tests.eval_jobs.stand_in import StandIn
from tests.eval_jobs.test_driver import evaluate

pytestmark = pytest.mark.usefixtures("local_ray")

SCORERS = """
from eval_jobs.verdicts import Verdict
from helper_under_test import ends_with

WORDS = 1

async def graded(output, problem):
    await asyncio.sleep(0)
    values = {"grade": len(output), "messages": len(output.messages)}
    return Verdict(ends_with(output, problem.gold), problem.fields["level"], values)

def wrong(output, problem):
    return "yes"

def sometimes(output, problem):
    if problem.gold == "2":
        raise RuntimeError("no")
    return True
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory that the tasks do not have, with a problem set and scorers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scorers_under_test.py").write_text(f"import asyncio\n{SCORERS}")
    (tmp_path / "mine" / "helper_under_test.py").write_text(
        "def ends_with(text, end):\n    return text.endswith(end)\n"
    )
    rows = [("What is 1 + 1?", "2", "easy"), ("What is 5 - 8?", "-3", "hard"), ("What is 3 + 4?", "8", "hard")]
    (tmp_path / "sums.csv").write_text("question,answer,level\n" + "".join(",".join(row) + "\n" for row in rows))
    before = set(sys.modules)
    yield tmp_path
    forget(before)


def forget(before: set[str]) -> None:
    """Unload modules, as in another process."""
    for name in set(sys.modules) - before:
        del sys.modules[name]


def scorer(name: str) -> str:
    return f"mine/scorers_under_test.py:{name}"


def posed(server: StandIn, **values: Any) -> tuple[Run, str]:
    return evaluate(server, **{"problems": "sums.csv", "samples": 3, **values})


def test_a_scorer_travels_and_its_word_is_the_sample_s(server: StandIn, tmp_path: Path) -> None:
    run, _ = posed(server, extractor=scorer("graded"), collect_activations=True)
    assert [
        (s.gold, s.correct, s.answers["graded"], s.fields, s.values["messages"]) for s in run.read_samples().by_name()
    ] == [
        ("2", True, "easy", {"level": "easy"}, 2),
        ("-3", True, "hard", {"level": "hard"}, 2),
        ("8", False, "hard", {"level": "hard"}, 2),
    ]
    assert {request["activations"]["labels"]["level"] for request in server.requests} == {"easy", "hard"}
    summary = run.summary() or {}
    assert (summary["extractor"], summary["verdicts"]) == ("graded", {"correct": 2, "wrong": 1, "no_answer": 0})
    assert summary["extractors"].keys() >= {"graded", "answer", "boxed"}
    assert run.config.settings["extractor"] == "graded"
    assert run.config.scorers["graded"]["reference"] == f"{tmp_path}/{scorer('graded')}"
    frame = run.samples
    assert list(frame["correct_graded"]) == [True, True, False]
    assert json.loads(frame["values"][0])["grade"] == len(run.read_samples().by_name()[0].response)


def test_a_run_goes_on_with_its_scorer_and_is_told_of_another(server: StandIn, tmp_path: Path) -> None:
    before = set(sys.modules)
    run, _ = posed(server, extractor=scorer("graded"), samples=2)
    assert len(run.read_samples()) == 2
    forget(before)
    run, _ = posed(server)  # it keeps the one that it began with
    assert run.config.settings["extractor"] == "graded"
    assert [sample.answers["graded"] for sample in run.read_samples().by_name()] == ["easy", "hard", "hard"]
    forget(before)
    helper = tmp_path / "mine" / "helper_under_test.py"
    helper.write_text(helper.read_text().replace("text.endswith", "not text.endswith"))
    edited = r"(?s)extractor: 'graded, its source \w{16}' in the folder, 'graded, its source .*roentgen score RUN --extractor"
    with pytest.raises(OtherConfigurationError, match=edited):
        posed(server)
    again = rescore(run, scorer("graded"))
    assert [sample.correct for sample in again.read_samples().by_name()] == [False, False, True]
    forget(before)
    run, shown = posed(server)
    assert "nothing to run" in shown
    helper.with_name("scorers_under_test.py").unlink()
    forget(before)
    with pytest.raises(EvalError, match=r"--extractor: there is no file .*scorers_under_test\.py"):
        posed(server)


def test_a_function_given_in_python(server: StandIn) -> None:
    bound = 2

    async def near(output: Output, problem: Problem) -> Verdict:
        await asyncio.sleep(0)
        return Verdict(abs(int(output.split()[-1]) - int(problem.gold)) < bound, output.split()[-1])

    def pose(problem: Problem) -> str:
        return f"Level {problem.fields['level']}\nProblem: {problem.question}"

    def problems() -> Iterator[dict[str, Any]]:
        yield {"question": "What is 3 + 4?", "answer": 8, "level": 2}

    given: dict[str, Any] = {"problems": problems, "prompt": pose, "samples": 1}
    run, _ = posed(server, **given, extractor=near)
    (sample,) = run.read_samples()
    assert (sample.correct, sample.answers["near"], sample.sample_id) == (True, "7", "problems_0001")
    assert server.requests[0]["messages"] == [{"role": "user", "content": "Level 2\nProblem: What is 3 + 4?"}]
    assert run.config.prompt["name"] == "pose"
    assert run.config.scorers == {"near": {"reference": None, "hash": run.config.scorers["near"]["hash"]}}
    again, shown = posed(server, **given, extractor=near)
    assert "nothing to run" in shown
    with pytest.raises(OtherConfigurationError, match="scored by near, a function given in Python: pass it again"):
        posed(server, **given)
    bound = 1
    with pytest.raises(OtherConfigurationError, match="near, its source"):
        posed(server, **given, extractor=near)
    with pytest.raises(UnknownScorerError, match="scored by near, a function given in Python"):
        rescore(again)
    assert rescore(again, near).read_samples()[0].correct is False
    assert rescore(again, "answer").config.settings["extractor"] == "answer"


def test_a_function_that_cannot_travel_says_what_holds_it(server: StandIn) -> None:
    lock = threading.Lock()

    def locked(output: Output, problem: Problem) -> bool:
        with lock:
            return True

    with pytest.raises(EvalError, match=r"'locked' cannot be sent to Ray's tasks: .*lock.*Create such objects inside"):
        posed(server, extractor=locked)
    assert not Path("run").exists()


def test_a_wrong_scorer_stops_the_run_and_a_failing_one_fails_a_sample(server: StandIn) -> None:
    with pytest.raises(
        EvalError, match=r"the scorer wrong returned 'yes' \(str\) for sums-000\d-\w{8}; allowed are a Verdict"
    ):
        posed(server, extractor=scorer("wrong"))
    run, _ = posed(server, extractor=scorer("sometimes"), output="other")
    failed = [sample for sample in run.read_samples() if sample.error is not None]
    assert [sample.error for sample in failed] == [
        "the scorer sometimes raised RuntimeError: no (scorers_under_test.py, line 18)"
    ]
    assert failed[0].messages[-1]["role"] == "assistant"
    fine, _ = posed(server, output="fine")
    before = fine.record_path.read_bytes()
    with pytest.raises(
        UnknownScorerError, match=r"sums_0001: the scorer sometimes raised RuntimeError.*; the run was not changed"
    ):
        rescore(fine, scorer("sometimes"))
    assert fine.record_path.read_bytes() == before


def test_texts_have_a_prompt_and_a_way_of_reading(server: StandIn, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"question": "Problem: 3 + 4", "answer": "Seven"}\n')
    server.reply = "It is so.\nAnswer: seven."
    run, _ = posed(server, problems="texts.jsonl", samples=1)
    assert (run.config.prompt["name"], run.config.settings["extractor"]) == ("answer-text", "answer")
    assert (run.summary() or {})["extractors"].keys() == {"answer"}
    (sample,) = run.read_samples()
    assert (sample.correct, sample.answers) == (True, {"answer": "seven."})
