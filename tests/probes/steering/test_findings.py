import json

import numpy as np
import pytest
from scipy.stats import binomtest

from probes.steering import SweepOutcome, SweepReport, summarize_sweep
from probes.steering.arms import Along


def outcome(problem: int, along: Along, number: int, scale: float, correct: bool, tokens: int = 10) -> SweepOutcome:
    return SweepOutcome(
        problem_id=f"p{problem}", along=along, number=number, scale=scale, text="", parsed=tokens < 90, correct=correct,
        tokens=tokens, finish_reason="stop",
    )  # fmt: skip


@pytest.fixture
def outcomes() -> list[SweepOutcome]:
    """40 problems: half right without steering; pushed along the probe none is, and the texts are long."""
    found = []
    for problem in range(40):
        found.append(outcome(problem, "nothing", 0, 0, problem % 2 == 0))
        found.append(outcome(problem, "probe", 0, -1, False, tokens=95))
        found += [outcome(problem, "random", n, -1, problem % 2 == 0 and n == 0, tokens=10 + n) for n in (0, 1)]
    return found


def test_numbers_are_those_of_the_answers(outcomes: list[SweepOutcome]) -> None:
    plain, probe, random = summarize_sweep(outcomes)
    assert [(f.along, f.scale, f.directions) for f in (plain, probe, random)] == [
        ("nothing", 0, 1), ("probe", -1, 1), ("random", -1, 2)
    ]  # fmt: skip
    assert plain.differences == {}
    assert (plain.values["accuracy"].value, plain.values["parse_rate"].value, plain.values["length"].value) == (
        0.5,
        1,
        10,
    )
    assert (probe.values["accuracy"].value, probe.values["parse_rate"].value, probe.values["length"].value) == (
        0,
        0,
        95,
    )
    assert probe.differences["accuracy"].value == -0.5
    assert random.values["accuracy"].value == 0.25
    assert random.values["length"].value == 10.5
    wilson = binomtest(20, 40).proportion_ci(method="wilson")
    assert (plain.values["accuracy"].low, plain.values["accuracy"].high) == pytest.approx((wilson.low, wilson.high))
    assert probe.values["accuracy"].high == pytest.approx(binomtest(0, 40).proportion_ci(method="wilson").high)


def test_differences_are_paired_and_their_interval_is_over_problems(outcomes: list[SweepOutcome]) -> None:
    _, probe, random = summarize_sweep(outcomes)
    # Of a mean of 40 zeros and minus ones, half each: the normal interval.
    half = 1.96 * 0.5 / np.sqrt(40)
    difference = probe.differences["accuracy"]
    assert (difference.low, difference.high) == pytest.approx((-0.5 - half, -0.5 + half), abs=0.04)
    assert random.differences["length"].low == random.differences["length"].high == 0.5


def test_the_report_is_json_and_a_picture(outcomes: list[SweepOutcome]) -> None:
    report = SweepReport(
        "x", "m", "r", "correct", "layers.1.resid_post", "all", 7.5, 40, True, 0, {}, summarize_sweep(outcomes)
    )
    spelled = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert spelled["findings"][1]["differences"]["accuracy"]["accuracy"] == -0.5
    assert spelled["findings"][0]["accuracy"]["accuracy"] == 0.5
    axes = report.draw().axes
    assert [a.get_title(loc="left") for a in axes] == ["accuracy", "parse rate", "length"]
    lines = {line.get_label(): line for line in axes[0].lines}
    assert list(lines["probe"].get_ydata()) == [0]
    assert lines["no steering"].get_ydata()[0] == 0.5
