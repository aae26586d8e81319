"""Summaries over epochs and variants, recounted by hand; runs scored again, observed and compared."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eval_jobs.extractors import score
from eval_jobs.hashed_config import ServedModelInfo, hashed_configuration, variants_of
from eval_jobs.outputs import excerpt, write_summary
from eval_jobs.rescoring import rescore
from eval_jobs.resume import open_run
from eval_jobs.settings import check_settings
from eval_jobs.status import status
from eval_jobs.terminal_summary import print_comparison
from eval_jobs.variants import Attempt
from roentgen.runs import Run, RunError, Sample, recording
from roentgen.runs.run_comparison import compare
from tests.eval_jobs.conftest import take

SERVED = ServedModelInfo("m", "r", "float32", 30, 8)


def make(path: Path, says: dict[tuple[int, int, str | None], str], **values: Any) -> Run:
    """A run in which problem, epoch and variant got these answers."""
    settings = check_settings(output=path, samples=3, **values)
    problems = take("arithmetic", 3)
    run = open_run(settings, problems, SERVED, "http://h:1/v1")
    with recording(run) as record:
        for variant in variants_of(settings, hashed_configuration(settings, SERVED)):
            for problem in problems:
                for epoch in range(1, settings.epochs + 1):
                    text = says.get((problem.number, epoch, variant.name), "I do not know.").replace(
                        "GOLD", problem.gold
                    )
                    attempt, scores = Attempt(problem, variant, epoch), score(text, problem.gold)
                    record.append(
                        Sample(
                            sample_id=attempt.sample_id, problem_id=problem.problem_id, epoch=epoch, variant=variant.name,
                            config_hash=variant.config_hash, question=problem.question, solution=problem.solution,
                            gold=problem.gold, response=text, answers=scores.answers, correct_by=scores.correct_by,
                            correct=scores.correct_by["answer"], finish_reason="stop", completion_tokens=10,
                            finished=1000.0 + 10 * epoch, seconds=10.0,
                        )
                    )  # fmt: skip
    return run


def test_pass_and_majority_over_epochs(tmp_path: Path) -> None:
    says = {
        (1, 1, None): "Answer: GOLD", (1, 2, None): "Answer: GOLD.00", (1, 3, None): "Answer: 7",
        (2, 1, None): "Answer: 7", (2, 2, None): "Answer: GOLD", (2, 3, None): "Answer: 7.0",
    }  # fmt: skip
    summary = write_summary(make(tmp_path / "run", says, epochs=3, temperature=1.0), None)
    assert (summary["complete"], summary["samples"], summary["accuracy"]["correct"]) == (True, 9, 3)
    several = summary["several_samples"]
    assert {k: e["value"] for k, e in several["pass_at_k"].items()} == pytest.approx(
        {"1": (2 / 3 + 1 / 3) / 3, "2": (1 + 2 / 3) / 3, "3": 2 / 3}
    )
    assert {k: e["value"] for k, e in several["maj_at_k"].items()} == pytest.approx(
        {"1": 1 / 3, "2": 1 / 3, "3": 1 / 3}
    )


def test_variants_are_compared_with_the_first(tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text("plain: ''\ncalm: No hurry.\n")
    says: dict[tuple[int, int, str | None], str] = {(n, 1, "calm"): "Answer: GOLD" for n in (1, 2)}
    run = make(tmp_path / "run", {**says, (3, 1, "plain"): "Answer: GOLD"}, variants=str(tmp_path / "v.yaml"))
    summary = write_summary(run, None)
    assert (summary["complete"], summary["samples"]) == (True, 6)
    plain, calm = summary["variants"]["plain"], summary["variants"]["calm"]
    assert (plain["accuracy"]["correct"], calm["accuracy"]["correct"]) == (1, 2)
    assert plain["against_first"] is None
    against = calm["against_first"]
    assert (against["gained"], against["lost"], against["problems"]) == (2, 1, 3)
    assert against["value"] == pytest.approx(1 / 3)
    assert len((run.path / "dataset.jsonl").read_text().splitlines()) == 3
    assert set(run.config.config_hashes) == {sample.config_hash for sample in run.read_samples()}


def test_a_run_is_scored_again_without_the_model(tmp_path: Path) -> None:
    run = make(tmp_path / "run", {(1, 1, None): "Answer: GOLD (see step 3)", (2, 1, None): "2 or GOLD"})
    assert write_summary(run, None)["accuracy"]["correct"] == 1
    before = [sample.response for sample in run.read_samples()]
    again = rescore(run, "flexible")
    assert [sample.correct for sample in again.read_samples()] == [False, True, False]
    assert [sample.response for sample in again.read_samples()] == before
    summary = Run(run.path).summary()
    assert summary is not None
    assert (summary["extractor"], summary["accuracy"]["correct"]) == ("flexible", 1)
    with recording(Run(run.path)), pytest.raises(RunError, match="is being written"):
        rescore(Run(run.path))


def test_how_far_a_run_is(tmp_path: Path) -> None:
    run = make(tmp_path / "run", {(1, 1, None): "Answer: GOLD"})
    assert str(status(run)).startswith("complete: 3/3 done, 1 correct, 33.3%")
    lines = run.record_path.read_text().splitlines(keepends=True)
    run.record_path.write_text("".join(lines[:2]))
    assert str(status(run)).startswith("stopped: 2/3 done")
    with recording(run) as record:
        record.append(Run(run.path).read_samples()[1].model_copy(update={"epoch": 2, "error": "503: 4 waiting"}))
    assert "1 errors (most common, 1: 503: 4 waiting); run the same command to continue" in str(status(run))
    run.record_path.write_text("".join(lines[:2]))
    with recording(run):
        # Two samples that began at 1000 and finished at 1010: twenty tokens in twenty seconds, the third in ten more.
        assert str(status(run, now=1020.0)) == "running: 2/3 done, 1 correct, 50.0% (9.5–90.5), 1 tokens/s, 0:10 left"
        assert str(status(run, now=9999.0)) == "running: 2/3 done, 1 correct, 50.0% (9.5–90.5)"


def test_two_runs_are_compared_by_problem(tmp_path: Path) -> None:
    one = make(tmp_path / "one", {(1, 1, None): "Answer: GOLD"})
    two = make(tmp_path / "two", {(2, 1, None): "Answer: GOLD", (3, 1, None): "Answer: GOLD"}, temperature=0.5)
    found = compare(one, two)
    assert found.configuration == [("sampling.temperature", 0.0, 0.5)]
    assert (found.first.correct, found.second.correct) == (1, 2)
    assert (found.gained, found.lost) == (["arithmetic-0002", "arithmetic-0003"], ["arithmetic-0001"])
    assert found.difference.value == pytest.approx(1 / 3)


def test_variants_are_compared_with_their_likes(tmp_path: Path) -> None:
    """A run without variants is compared with the one without a prefix; variants with those of the same prefix."""
    (tmp_path / "v.yaml").write_text("calm: No hurry.\nplain: ''\n")
    (tmp_path / "w.yaml").write_text("relaxed: No hurry.\nother: Quick!\n")
    says: dict[tuple[int, int, str | None], str] = {(n, 1, "calm"): "Answer: GOLD" for n in (1, 2, 3)}
    bare = make(tmp_path / "bare", {(1, 1, None): "Answer: GOLD"})
    varied = make(tmp_path / "varied", {**says, (2, 1, "plain"): "Answer: GOLD"}, variants=str(tmp_path / "v.yaml"))
    found = compare(bare, varied)
    assert [pair.names for pair in found.pairs] == [(None, "plain")]
    assert found.alone == ((), ("calm",))
    assert (found.first.correct, found.second.correct) == (1, 1)
    assert (found.gained, found.lost) == (["arithmetic-0002"], ["arithmetic-0001"])

    renamed = make(tmp_path / "renamed", {(1, 1, "relaxed"): "Answer: GOLD"}, variants=str(tmp_path / "w.yaml"))
    found = compare(varied, renamed)
    assert [pair.names for pair in found.pairs] == [("calm", "relaxed")]
    assert (found.first.correct, found.second.correct) == (3, 1)
    assert found.alone == (("plain",), ("other",))

    again = compare(varied, varied)
    assert [pair.names for pair in again.pairs] == [("calm", "calm"), ("plain", "plain")]
    assert (again.first.correct, again.difference.value, again.difference.problems) == (4, 0.0, 6)
    console = Console(record=True, width=200, file=io.StringIO())
    print_comparison(found, console)
    said = console.export_text()
    assert "variant calm against variant relaxed" in said
    assert "not compared, because the other run has no such variant: variant plain of the first" in said


def test_the_same_question_under_two_ids_is_one_problem(tmp_path: Path) -> None:
    """Its error is that of the questions, whatever the number of copies."""
    (tmp_path / "p.jsonl").write_text(
        "".join(f'{{"question": "{n} + {n}?", "answer": "#### {2 * n}"}}\n' for n in (1, 2, 3))
    )
    (tmp_path / "twice.jsonl").write_text((tmp_path / "p.jsonl").read_text() * 2)
    found = []
    for name, samples in (("p", 3), ("twice", 6)):
        problems = take(str(tmp_path / f"{name}.jsonl"), samples)
        settings = check_settings(output=tmp_path / name, samples=samples, problems=str(tmp_path / f"{name}.jsonl"))
        run = open_run(settings, problems, SERVED, "http://h:1/v1")
        with recording(run) as record:
            for problem in problems:
                text = f"Answer: {problem.gold if problem.gold == '2' else 0}"
                scores = score(text, problem.gold)
                record.append(
                    Sample(
                        sample_id=f"s{problem.number}", problem_id=problem.problem_id, config_hash=run.config.config_hash,
                        question=problem.question, solution=problem.solution, gold=problem.gold, response=text,
                        answers=scores.answers, correct_by=scores.correct_by, correct=scores.correct_by["answer_line"],
                    )
                )  # fmt: skip
        found.append(write_summary(run, None)["extractors"]["answer_line"])
    assert found[1]["n"] == 2 * found[0]["n"]
    assert found[1]["standard_error"] == pytest.approx(found[0]["standard_error"])


def test_the_text_around_an_answer() -> None:
    text = "a" * 100 + " it is 1,234 now 1,234. " + "b" * 100
    found = excerpt(text, "1234")
    assert found.index("1,234.") > found.index("1,234 now")
    assert len(found) == 60 + len("1,234") + 60
    assert excerpt("nothing", "5") == "nothing"
