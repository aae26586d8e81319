from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from probes.errors import ProbeDataError
from probes.labels import Example, Target, compressed, read_label
from roentgen.runs import RunConfig, Sample

SOLUTION = "She has 48/2 = <<48/2=24>>24.\nThat makes <<48+24=72>>72.\n#### 72"


def example(problem: str, *, correct: bool, epoch: int = 1, mode: list[str] | None = None) -> Example:
    sample = Sample(
        sample_id="s",
        problem_id=problem,
        epoch=epoch,
        config_hash="c",
        question="?",
        solution=SOLUTION,
        gold="72",
        correct=correct,
        variant="calm",
    )
    config = RunConfig(
        run_id="r", created="", config_hash="c", hashed={"tools": mode or []}, problems={}, settings={},
        prompt={}, versions={},
    )  # fmt: skip
    return Example(problem, epoch, f"{problem}-{epoch}", 5, 7, False, "?", {"side": "a"}, sample, config)


EXAMPLES = [
    example("p", correct=True),
    example("p", correct=False, epoch=2, mode=["calculator"]),
    example("q", correct=True),
]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("correct", [True, False, True]),
        ("difficulty", [0.5, 0.5, 0.0]),
        ("steps", [2.0, 2.0, 2.0]),
        ("tools", [False, True, False]),
        ("variant", ["calm"] * 3),
        ("response_length", [7.0] * 3),
        ("gold_value", [pytest.approx(1.8633, abs=1e-4)] * 3),
        ("step_value:1", [pytest.approx(1.3979, abs=1e-4)] * 3),
        ("step_value:3", [None] * 3),
        ("side", ["a"] * 3),
    ],
)
def test_labels_are_read_from_where_they_are(name: str, values: Any) -> None:
    assert read_label(name, EXAMPLES) == values


def test_numbers_are_compressed_with_their_sign() -> None:
    assert compressed("-1,999.00") == pytest.approx(-3.30103, abs=1e-4)
    assert compressed("none") is None


def test_tables_are_joined_on_what_they_have(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"

    pd.DataFrame({"problem_id": ["p", "p"], "epoch": [2, 1], "mood": ["x", "y"]}).to_parquet(table)
    assert read_label("mood", EXAMPLES, table) == ["y", "x", None]
    pd.DataFrame({"problem_id": ["p", "p"], "mood": ["x", "y"]}).to_parquet(table)
    with pytest.raises(ProbeDataError, match="several rows have the same problem_id"):
        read_label("mood", EXAMPLES, table)
    pd.DataFrame({"mood": ["x"]}).to_parquet(table)
    with pytest.raises(ProbeDataError, match="a column rollout_id, or problem_id"):
        read_label("mood", EXAMPLES, table)
    pd.DataFrame({"rollout_id": ["p-2", "p-1"], "mood": ["x", "y"]}).to_parquet(table)
    assert read_label("mood", EXAMPLES, table) == ["y", "x", None]
    table.write_bytes(b"torn")
    with pytest.raises(ProbeDataError, match=r"t.parquet cannot be read"):
        read_label("mood", EXAMPLES, table)


def test_a_field_named_as_a_built_in_label_is_asked_for_as_a_field() -> None:
    def hard(one: Example) -> Example:
        assert one.sample is not None
        return replace(one, sample=one.sample.model_copy(update={"fields": {"difficulty": "hard"}}))

    fielded = [hard(one) for one in EXAMPLES]
    with pytest.raises(ProbeDataError, match="'difficulty' is both a built-in label and a field of these problems"):
        read_label("difficulty", fielded)
    assert read_label("field:difficulty", fielded) == ["hard"] * 3


def test_values_tell_what_kind_of_target_they_are() -> None:
    assert Target.of("a", [True, False]).kind == "binary"
    assert Target.of("a", [1, 0, 1]).values.tolist() == [True, False, True]
    assert Target.of("a", [1, 0.0, True, 1.0]).values.tolist() == [True, False, True, True]
    assert Target.of("a", [1.5, 2.0]).kind == "real"
    with pytest.raises(ProbeDataError, match=r"label: 'a' mixes numbers, such as 0\.5, and texts, such as 'inf'"):
        Target.of("a", [0.5, "inf"])
    named = Target.of("a", ["no", "yes", "no"])
    assert (named.kind, named.classes, named.values.tolist()) == ("binary", ("no", "yes"), [False, True, False])
    several = Target.of("a", ["x", "z", "y"])
    assert (several.kind, several.classes, several.values.tolist()) == ("classes", ("x", "y", "z"), [0, 2, 1])
