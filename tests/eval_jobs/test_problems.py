"""Problems: the i-th problem is always the same, and errors in files name the line."""

from pathlib import Path

import pytest

from eval_jobs.problems import GSM8K_FOLDER_VARIABLE, ProblemError, gold_answer
from tests.eval_jobs.conftest import take
from tests.eval_jobs.stand_in import solve

GOOD = '{"question": "1 + 1?", "answer": "1 + 1 = 2\\n#### 2"}'


def test_arithmetic_is_the_same_for_every_n() -> None:
    few, many = take("arithmetic", 3), take("arithmetic", 300)
    assert few == many[:3]
    assert few[0].problem_id == "arithmetic-0001"
    assert few[0].question == "What is 15 - 43 - 75?"
    assert few[0].solution == "15 - 43 - 75 = -103\n#### -103"
    assert len({problem.problem_id for problem in many}) == 300


def test_arithmetic_gold_is_right() -> None:
    for problem in take("arithmetic", 200):
        assert solve(problem.question) == int(problem.gold)
        assert 2 <= len(problem.question.split()[2::2]) <= 3


def test_gsm8k_from_a_local_folder(gsm8k_test: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GSM8K_FOLDER_VARIABLE, str(gsm8k_test.parent))
    found = take("gsm8k", 2000)
    assert len(found) == 1319
    assert (found[0].problem_id, found[-1].problem_id) == ("gsm8k-test-0001", "gsm8k-test-1319")
    assert found[0].question.startswith("Janet")
    assert found[0].gold == "18"
    assert any(len(problem.gold) > 3 for problem in found)
    assert not any("," in problem.gold for problem in found)


def test_a_gsm8k_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GSM8K_FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(ProblemError, match=r"test\.jsonl: No such file"):
        take("gsm8k", 3)


def test_no_hub_and_no_folder_names_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.delenv(GSM8K_FOLDER_VARIABLE, raising=False)

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ProblemError, match="connect to the hub, or set ROENTGEN_GSM8K_DIR"):
        take("gsm8k", 3)


def test_a_file_in_gsm8k_format(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(GOOD + '\n\n{"question": "How much?", "answer": "#### 1,234.50"}\n')
    first, second = take(str(file), 9)
    assert (first.number, first.gold) == (1, "2")
    assert first.problem_id.startswith("mine-0001-")
    assert (second.number, second.gold) == (3, "1234.50")
    file.write_text(GOOD.replace("1 + 1?", "2 + 0?") + "\n")
    (edited,) = take(str(file), 9)
    assert edited.problem_id.startswith("mine-0001-")
    assert edited.problem_id != first.problem_id


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "2 + 2?"', "not JSON"),
        ('["question", "answer"]', "not a JSON object"),
        ('{"question": "2 + 2?"}', "'answer' is missing"),
        ('{"question": "  ", "answer": "#### 4"}', "'question' must be a text"),
        ('{"question": "\\ud800", "answer": "#### 4"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(f"{GOOD}\n{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(ProblemError, match=f"problems.jsonl, line 3: {words}"):  # though only the first is wanted
        take(str(file), 1)


def test_a_line_of_gsm8k_has_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test.jsonl").write_text(GOOD + '\n{"question": "2 + 2?", "answer": "#### four"}\n')
    monkeypatch.setenv(GSM8K_FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(ProblemError, match=r"test\.jsonl, line 2: 'answer' has no '#### <number>' line"):
        take("gsm8k", 2)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_bytes(b"\x80\x81\n")
    with pytest.raises(ProblemError, match="line 1: not JSON"):
        take(str(file), 1)


def test_unknown_missing_and_empty_sources(tmp_path: Path) -> None:
    with pytest.raises(
        ProblemError,
        match=r"'gsm9k' is unknown; allowed are arithmetic, gsm8k, .* a \.jsonl, \.csv or \.parquet file's path, hf:",
    ):
        take("gsm9k", 3)
    with pytest.raises(ProblemError, match=r"nowhere\.jsonl: No such file"):
        take(str(tmp_path / "nowhere.jsonl"), 3)
    with pytest.raises(ProblemError, match="Is a directory"):
        take(str(tmp_path), 3)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ProblemError, match="has no problems"):
        take(str(tmp_path / "empty.jsonl"), 3)


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("a\n#### 18", "18"),
        ("#### 1,234 ", "1234"),
        ("#### -5", "-5"),
        ("#### 2\n#### 3", "3"),
        ("18", None),
        ("####", None),
        ("#### 1e999999999", None),
    ],
)
def test_gold_answer(solution: str, gold: str | None) -> None:
    assert gold_answer(solution) == gold
