"""Where settings stop rollouts, their evaluation, and the choice of a setting."""

import asyncio

import numpy as np
import pytest
import torch

from probes.stopping import Reading, Setting, Stop, StopTrace, make_settings, summarize_stops, sweep
from probes.stopping.findings import split_halves
from probes.stopping.stop_settings import quantiles, random_directions
from probes.stopping.sweep import converged
from roentgen.linear_probe import LinearProbe
from roentgen.runs import Sample


def trace(text: str, number: int = 0, *, correct: bool = True, thinks: bool = False) -> StopTrace:
    """A rollout whose tokens are its characters."""
    sample = Sample(
        sample_id=f"p{number}",
        problem_id=f"p{number}",
        config_hash="c",
        question="?",
        solution="!",
        gold="7",
        correct=correct,
    )
    begins, thought = (7, text.index("</think>") + 8) if thinks else (0, None)
    counted = np.array([not thinks or begins <= at < text.index("</think>") for at in range(len(text) - 1)])
    ends = np.arange(1, len(text) + 1)
    return StopTrace(sample, number, torch.zeros(len(text) - 1, 1), counted, text, ends, begins, thought)


async def judge(text: str, sample: Sample) -> Reading:
    """Read the last digit."""
    digits = [character for character in text if character.isdigit()]
    return Reading(digits[-1] if digits else None, bool(digits) and digits[-1] == sample.gold)


def outcomes(
    traces: list[StopTrace], settings: list[Setting], scores: object = (), then: str = "stop"
) -> list[list[Stop]]:
    return asyncio.run(sweep(traces, scores, settings, then, judge))


def test_each_kind_of_setting_stops_where_it_should() -> None:
    one = trace("3. No: 7. Yes, 7. It is 7. 9.")
    scores = np.array([float(character == "7") for character in one.text[:-1]], dtype=np.float32)
    settings = [
        Setting("whole"),
        Setting("probe", above=0.5, length=1),
        Setting("probe", above=0.5, length=2),
        Setting("random", 0, above=-1.0, length=3),
        Setting("fixed_length", limit=8),
        Setting("fixed_length", limit=99),
        Setting("convergence", length=2),
        Setting("convergence", length=4),
    ]
    found = outcomes([one], settings, [[scores], [np.zeros_like(scores)]])
    assert [(row[0].place, row[0].tokens, row[0].correct) for row in found] == [
        (None, len(one.text), True),
        (7, 8, True),
        (None, len(one.text), True),
        (2, 3, False),
        (7, 8, True),
        (None, len(one.text), True),
        (16, 17, True),
        (None, len(one.text), True),
    ]


def test_answer_convergence_is_the_same_reading_of_the_last_sentence_ends() -> None:
    assert converged([(3, "1"), (5, None), (9, "2"), (12, "2"), (20, "2")], 2) == 12
    assert converged([(3, "1"), (5, None), (9, "2"), (12, "2"), (20, "2")], 3) == 20
    assert converged([(3, None), (5, None)], 2) is None
    assert converged([(3, "1"), (5, "2"), (9, "1")], 2) is None
    assert converged([(3, "1")], 1) == 3
    assert trace("Pi is 3.5 or so. Then?\n\nA line\n\nEnd").sentence_ends() == [15, 21, 31]


def test_a_reasoning_is_read_by_itself_and_its_answer_is_the_models_own() -> None:
    """Two that end their reasoning, after which 5 and 9 tokens come, and one that does not: it is given what is usual."""
    whole = [trace("<think>1 7 2</think>7 it.", thinks=True), trace("<think>7 7 7 8</think>8 or so.", 1, thinks=True)]
    cut = trace("<think>7 7 7 8</think>", 2, thinks=True)
    traces = [*whole, StopTrace(**{**vars(cut), "thought": None})]
    found = outcomes(traces, [Setting("fixed_length", limit=3)], then="close_reasoning")[0]
    assert [one.place for one in found] == [9, 9, 9]
    assert [traces[0].text_up_to(9), traces[1].text_up_to(9)] == ["1 7", "7 7"]
    answers = [len("7 it."), len("8 or so.")]
    assert [one.tokens for one in found] == [11 + answers[0], 11 + answers[1], 11 + int(np.median(answers))]
    assert [one.correct for one in found] == [True, True, True]


def test_settings_are_chosen_on_one_half_and_reported_on_the_other() -> None:
    """On the choosing half the shorter of two lengths is right by luck; on the other half it is not, and that is said."""
    texts = {True: "7......", False: "...7..."}
    choosing = split_halves(list(range(40)), seed=0)
    assert choosing.sum() == 20
    traces = [trace(texts[bool(mine)], number) for number, mine in enumerate(choosing)]
    settings = [Setting("whole"), Setting("fixed_length", limit=2), Setting("fixed_length", limit=5)]
    whole, chosen, findings = summarize_stops(traces, settings, outcomes(traces, settings), choosing, max_loss=0.0)
    ((one),) = chosen
    assert one.finding is not None
    assert one.finding.setting.limit == 2
    assert (one.finding.accuracy.value, one.finding.change.value, one.finding.stopped) == (0, -1, 1)
    assert one.finding.saved.value == pytest.approx(5 / 7)
    assert (one.finding.tokens.value, one.finding.tokens.low, one.finding.tokens.high) == (2, 2, 2)
    assert (whole.accuracy.value, whole.saved.value) == (1, 0)
    assert [found.setting for found in findings] == settings
    assert (findings[1].to_json()["limit"], findings[1].to_json()["tokens"]["tokens"]) == (2, 2)
    # Where no setting keeps the accuracy, none is chosen.
    swapped = summarize_stops(traces, settings[:2], outcomes(traces, settings[:2]), ~choosing, max_loss=0.0)[1]
    assert [family.finding for family in swapped] == [None]


def test_attempts_at_one_problem_are_of_one_half() -> None:
    groups = [number % 5 for number in range(30)]
    choosing = split_halves(groups, seed=3)
    assert {group for group, mine in zip(groups, choosing, strict=True) if mine}.isdisjoint(
        group for group, mine in zip(groups, choosing, strict=True) if not mine
    )
    assert len({group for group, mine in zip(groups, choosing, strict=True) if mine}) == 2


def test_no_score_equals_a_value_that_is_tried() -> None:
    scores = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    tried = quantiles(scores, np.array([0.1, 0.5, 0.999]))
    assert len(tried) == 3
    assert not np.isin(np.float32(tried), scores).any()
    own, other = np.arange(6, dtype=np.float32), 10 * np.arange(6, dtype=np.float32)
    settings = make_settings([trace("1234567")], [[own], [other]], lengths=(1, 2), above=[0.5, 3.5])
    assert settings[0].kind == "whole"
    assert [(s.above, s.length) for s in settings if s.kind == "probe"] == [(0.5, 1), (0.5, 2), (3.5, 1), (3.5, 2)]
    random = [(s.number, s.above, s.length) for s in settings if s.kind == "random"]
    assert random == [(0, 8.333, 1), (0, 8.333, 2), (0, 33.33, 1), (0, 33.33, 2)]  # a sixth and two thirds are below
    assert [s.limit for s in settings if s.kind == "fixed_length"] == [6]


def test_random_directions_are_as_long_as_the_probe() -> None:
    probe = LinearProbe(torch.randn(1, 9), torch.ones(1), torch.randn(9), torch.rand(9) + 1)
    drawn = random_directions(probe, 3)
    for one in drawn:
        assert one.weight.norm() == pytest.approx(probe.weight.norm())
        assert torch.equal(one.mean, probe.mean)
    assert not torch.equal(drawn[0].weight, drawn[1].weight)
