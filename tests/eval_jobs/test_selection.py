"""The selection of problems and their shots."""

import json
import random
from pathlib import Path

import pytest

from eval_jobs.problems import GSM8K_FOLDER_VARIABLE, ProblemError
from eval_jobs.selection import Selection, load_problems


def numbers(**values: object) -> list[int]:
    return [p.number for p in load_problems(Selection.model_validate({"source": "arithmetic", "samples": 3, **values}))]


def test_an_offset_leaves_out_the_first() -> None:
    assert numbers() == [1, 2, 3]
    assert numbers(offset=4) == [5, 6, 7]


def test_ids_are_numbers_or_names() -> None:
    assert numbers(sample_ids=("7", "arithmetic-0002")) == [2, 7]
    with pytest.raises(ProblemError, match="--sample-ids: arithmetic has no problem gsm8k-test-0001"):
        numbers(sample_ids=("7", "gsm8k-test-0001"))


def test_a_shuffle_is_the_same_for_a_seed(gsm8k_test: Path) -> None:
    def shuffled(seed: int, samples: int = 2_000) -> list[int]:
        return numbers(source=str(gsm8k_test), samples=samples, shuffle_seed=seed)

    assert shuffled(1) == shuffled(1) != shuffled(2)
    assert sorted(shuffled(1)) == list(range(1, 1320))
    assert shuffled(1, 5) == shuffled(1)[:5]


def test_what_is_generated_is_not_shuffled() -> None:
    with pytest.raises(ProblemError, match="--shuffle: arithmetic is generated"):
        numbers(shuffle_seed=1)


def test_nothing_left(gsm8k_test: Path) -> None:
    with pytest.raises(ProblemError, match="has no problems after the first 1319"):
        numbers(source=str(gsm8k_test), offset=1319)


def test_shots_are_those_of_the_harness(gsm8k_test: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`random.Random(1234).sample(train, 5)` for one problem after the other, including skipped ones."""
    monkeypatch.setenv(GSM8K_FOLDER_VARIABLE, str(gsm8k_test.parent))
    train = [json.loads(line) for line in (gsm8k_test.parent / "train.jsonl").open()]
    rng = random.Random(1234)
    expected = [[doc["question"] for doc in rng.sample(train, 5)] for _ in range(4)]
    posed = load_problems(Selection(source="gsm8k", samples=2, offset=2, shots=5))
    assert [[shot.question for shot in problem.shots] for problem in posed] == expected[2:]


def test_gsm_symbolic_is_gsm8k_s_format() -> None:
    posed = load_problems(Selection(source="gsm-symbolic", samples=20))
    assert [problem.problem_id for problem in posed[:2]] == ["gsm-symbolic-0001", "gsm-symbolic-0002"]
    assert len({problem.question for problem in posed}) == 20
    for problem in posed:
        assert float(problem.solution.rpartition("#### ")[2]) == float(problem.gold)
