"""All kinds of records become problems, and errors name the record."""

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from eval_jobs.problems import Problem, ProblemError, describe_source, read_records, read_source, set_name
from eval_jobs.records import record_of
from eval_jobs.selection import Selection, load_problems

RECORD = {"question": "The capital of France?", "answer": "Paris", "continent": "Europe", "people": 68.5, "old": True}


def one(**fields: Any) -> Problem:
    (found,) = read_records([{**RECORD, **fields}])
    return found


def test_fields_are_kept_and_plain_ones_are_labels() -> None:
    found = one(choices=["Paris", "Rome"], passage="x" * 1_001, day=date(2026, 1, 2), n=np.int64(3), none=float("nan"))
    assert found.fields == {
        "continent": "Europe", "people": 68.5, "old": True, "choices": ["Paris", "Rome"], "passage": "x" * 1_001,
        "day": "2026-01-02", "n": 3, "none": None,
    }  # fmt: skip
    assert found.labels == {
        "continent": "Europe",
        "people": 68.5,
        "old": True,
        "day": "2026-01-02",
        "n": 3,
        "none": None,
    }


@pytest.mark.parametrize(
    ("answer", "gold", "solution"),
    [
        ("Paris", "Paris", "Paris"),
        (" 1,800 ", "1800", " 1,800 "),
        ("1,2 and 3", "1,2 and 3", "1,2 and 3"),
        ("It is so.\n#### Paris", "Paris", "It is so.\n#### Paris"),
        (18, "18", "#### 18"),
        (np.float64(2.5), "2.5", "#### 2.5"),
        (True, "True", "#### True"),
        (1e-05, "0.00001", "#### 0.00001"),
        (1e20, "100000000000000000000", "#### 100000000000000000000"),
        (Decimal("18.50"), "18.5", "#### 18.5"),
        (Decimal(3), "3", "#### 3"),
    ],
)
def test_an_answer_is_a_text_a_number_or_a_solution(answer: Any, gold: str, solution: str) -> None:
    found = one(answer=answer)
    assert (found.gold, found.solution) == (gold, solution)
    (again,) = read_records([record_of(found)])
    assert again == found


def test_a_solution_and_an_id_may_be_given() -> None:
    found = one(answer=4, solution="2 + 2 = 4", problem_id="sum-1")
    assert (found.gold, found.solution, found.problem_id) == ("4", "2 + 2 = 4", "sum-1")
    (again,) = read_records([record_of(found)])
    assert again == found


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("Paris", r"problems\[0\]: not a record with 'question' and 'answer', but 'Paris' \(str\)"),
        (
            {"q": "?", "answer": "!"},
            r"'question' is missing; the record has q, answer \(--columns",
        ),
        ({**RECORD, "question": 3}, r"'question' must be a text, not empty; it is 3 \(int\)"),
        (
            {**RECORD, "answer": ["a", "b"]},
            r"'answer' must be a text, a number, true or false, not \['a', 'b'\] \(list\)",
        ),
        ({**RECORD, "answer": " "}, "'answer' must be a text or a number, not empty; it is ' '"),
        ({**RECORD, "answer": "so\n#### "}, "'answer' has nothing after '####'"),
        ({**RECORD, "answer": float("nan")}, "'answer' is null; it must be a text or a number, not empty"),
        ({**RECORD, "gold": "Lutetia"}, r"the field name 'gold' is reserved for a label of stored rollouts; rename it"),
        ({**RECORD, "steering": "left"}, r"the field name 'steering' is reserved for a label of stored rollouts"),
        ({**RECORD, "answer": pd.NA}, "'answer' is null"),
        (
            {**RECORD, "image": b"..."},
            r"the field 'image' cannot be kept: .* is not JSON .*choose fields with --fields",
        ),
        ({**RECORD, "x": "\ud800"}, "an unpaired surrogate"),
        ({**RECORD, "problem_id": "x" * 201}, "'problem_id' must be a text of 1 to 200 characters"),
    ],
)
def test_what_is_no_record_is_named(record: Any, said: str) -> None:
    with pytest.raises(ProblemError, match=said):
        list(read_records([record]))


def test_files_of_three_formats_say_the_same(tmp_path: Path) -> None:
    rows = [
        {"question": "1 + 1?", "answer": "2", "level": 1, "share": 0.5, "easy": True, "code": "007", "note": None},
        {
            "question": 'Say "a,\nb".',
            "answer": "a, b",
            "level": 2,
            "share": 2.0,
            "easy": False,
            "code": "7",
            "note": "n",
        },
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "p.csv", index=False)
    frame.to_parquet(tmp_path / "p.parquet")
    jsonl, csv, parquet = (list(read_source(str(tmp_path / f"p.{end}"))) for end in ("jsonl", "csv", "parquet"))
    assert jsonl == csv == parquet
    assert jsonl[1].fields == {"level": 2, "share": 2.0, "easy": False, "code": "7", "note": "n"}
    assert [problem.gold for problem in jsonl] == ["2", "a, b"]


def test_what_pandas_has_for_nothing_is_null_and_what_python_alone_has_is_as_json_has_it() -> None:
    found = one(n=pd.NA, day=pd.NaT, pair=(1, 2), names={1: "one"}, price=Decimal("0.10"))
    own = {name: found.fields[name] for name in ("n", "day", "pair", "names", "price")}
    assert own == {"n": None, "day": None, "pair": [1, 2], "names": {"1": "one"}, "price": 0.1}
    (again,) = read_records([json.loads(json.dumps(record_of(found)))])
    assert again == found


def test_a_csv_s_columns_have_names_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    pd.DataFrame([{"question": "1 + 1?", "answer": 2}]).to_csv(file)  # with its index
    assert [problem.fields for problem in read_source(str(file))] == [{}]
    file.write_text("question,question,answer\na,b,c\n")
    with pytest.raises(ProblemError, match=r"p\.csv: several columns are named 'question'"):
        list(read_source(str(file)))


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('[{"question": "a",\n"answer": "b"}]')
    with pytest.raises(
        ProblemError, match=r"line 1: not JSON: .*; a file has one object per line, not a list of objects"
    ):
        list(read_source(str(tmp_path / "p.jsonl")))
    (tmp_path / "p.csv").write_text("question,answer\na,b\nc\n")
    with pytest.raises(ProblemError, match=r"p\.csv, row 2 has fewer values than the first line has names"):
        list(read_source(str(tmp_path / "p.csv")))
    (tmp_path / "p.parquet").write_text("no parquet")
    with pytest.raises(ProblemError, match=r"problems cannot be read: .*p\.parquet"):
        list(read_source(str(tmp_path / "p.parquet")))


def test_columns_are_renamed_and_fields_chosen(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("id,q,a,level,gold\nx-1,1 + 1?,2,easy,9\n")
    columns = {"question": "q", "answer": "a", "problem_id": "id"}
    (found,) = read_source(str(tmp_path / "p.csv"), columns, ("level",))
    assert (found.problem_id, found.question, found.gold, found.fields) == ("x-1", "1 + 1?", "2", {"level": "easy"})
    with pytest.raises(ProblemError, match=r"--columns: p\.csv, row 1 has no column 'Q'; it has id, q, a, level, gold"):
        list(read_source(str(tmp_path / "p.csv"), {"question": "Q"}))
    with pytest.raises(
        ProblemError, match=r"--fields: no record has a field 'lvl'; allowed are id, level, gold, question, a"
    ):
        read_source(str(tmp_path / "p.csv"), {"question": "q", "answer": "a"}, ("level", "lvl"))


def test_a_field_may_be_absent_from_some_records() -> None:
    records = [{"question": "1 + 1?", "answer": 2}, {"question": "1 + 2?", "answer": 3, "level": "hard"}]
    assert [problem.fields for problem in read_records(records, fields=("level",))] == [{}, {"level": "hard"}]


def test_a_dataset_of_hugging_face_s_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "sums"
    folder.mkdir()
    for split, answer in (("train", 1), ("test", 2)):
        (folder / f"{split}.jsonl").write_text(json.dumps({"problem": "1 + 1?", "answer": answer, "level": 3}) + "\n")
    source = f"hf:{folder}"
    with pytest.raises(ProblemError, match=r"has several splits: add \?split= and one of train, test"):
        list(read_source(source))
    (found,) = read_source(f"{source}?split=test", {"question": "problem"})
    assert (found.question, found.gold, found.fields) == ("1 + 1?", "2", {"level": 3})
    assert found.problem_id.startswith("sums-0001-")
    with pytest.raises(ProblemError, match="'size' is unknown; allowed are config, split, revision"):
        list(read_source(f"{source}?size=3"))
    with pytest.raises(
        ProblemError, match=r"hf:.*nowhere cannot be loaded: .*Without a network, a dataset is read from the cache"
    ):
        list(read_source(f"hf:{tmp_path}/nowhere"))


def test_a_function_is_a_source(tmp_path: Path) -> None:
    file = tmp_path / "sets_under_test.py"
    file.write_text(
        "def problems():\n    yield {'question': 'a', 'answer': 'b', 'level': 1}\n"
        "    raise KeyError('x')\n\ndef three():\n    return 3\n\nlisted = [{'question': 'a', 'answer': 'b'}]\n"
        "def needs(split):\n    return []\n"
    )
    stream = read_source(f"{file}:problems")
    first = next(stream)
    assert (first.problem_id[:14], first.fields) == ("problems-0001-", {"level": 1})
    with pytest.raises(ProblemError, match=r"problems raised KeyError: 'x' \(sets_under_test\.py, line 3\)"):
        next(stream)
    with pytest.raises(ProblemError, match=r"three returned 3 \(int\); allowed is an iterable of records"):
        next(read_source(f"{file}:three"))
    with pytest.raises(ProblemError, match=r"needs raised TypeError: .*split"):
        next(read_source(f"{file}:needs"))
    assert [problem.gold for problem in read_source(f"{file}:listed")] == ["b"]
    assert [problem.gold for problem in read_source(lambda: [RECORD])] == ["Paris"]


def test_an_id_names_one_problem() -> None:
    with pytest.raises(ProblemError, match="several problems have the problem_id 'a'; ids must be unique"):
        load_problems(Selection(source=lambda: [{**RECORD, "problem_id": "a"}] * 2, samples=2))


def test_sources_are_called_after_what_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def capitals():\n    return []\n")
    names = ["gsm8k", "hf:openai/gsm8k?split=test", "some/my file.csv", "mine.py:capitals"]
    assert [set_name(name) for name in names] == ["gsm8k", "gsm8k", "my-file", "capitals"]
    assert [describe_source(name) for name in names] == [
        "gsm8k", "hf:openai/gsm8k?split=test", f"{tmp_path}/some/my file.csv", f"{tmp_path}/mine.py:capitals",
    ]  # fmt: skip
    with pytest.raises(
        ProblemError, match=r"'openai/gsm8k' is unknown.*For a dataset of Hugging Face's, write hf:openai/gsm8k"
    ):
        read_source("openai/gsm8k")
