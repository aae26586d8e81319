"""Finds where each setting would have stopped each rollout, and judges the text up to there.

Nothing is generated. The stored rows do not contain the answer after a closed reasoning, so in that case the answer is
extracted from the reasoning, with the token count of the model's own answer.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from probes.stopping.stop_settings import Setting
from probes.stopping.traces import StopTrace
from roentgen.contract import ProbeEffect
from roentgen.runs import Sample
from roentgen.stop_rule import find_stop

AT_ONCE = 64
"""Number of concurrent readings, for judges that wait for I/O."""


@dataclass(frozen=True)
class Reading:
    """A judge's reading of a text."""

    answer: str | None
    """The answer; None if it finds none."""
    correct: bool
    """Whether it is right."""


ReadAnswer = Callable[[str, Sample], Awaitable[Reading]]


@dataclass(frozen=True)
class Stop:
    """The effect of a setting on one rollout."""

    place: int | None
    """The last token; None if the rollout was not stopped."""
    tokens: int
    """Number of tokens."""
    correct: bool
    """True if the answer would have been correct."""


class _Readings:
    """A cache of the readings of each rollout up to each token."""

    def __init__(self, traces: Sequence[StopTrace], judge: ReadAnswer) -> None:
        self._traces = traces
        self._judge = judge
        self._found: dict[tuple[int, int], Reading] = {}

    def __getitem__(self, at: tuple[int, int]) -> Reading:
        return self._found[at]

    async def read(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Read rollouts, each up to a given token."""
        free = asyncio.Semaphore(AT_ONCE)

        async def one(number: int, place: int) -> None:
            trace = self._traces[number]
            async with free:
                self._found[number, place] = await self._judge(trace.text_up_to(place), trace.sample)

        async with asyncio.TaskGroup() as group:
            for at in set(wanted) - self._found.keys():
                group.create_task(one(*at))


async def sweep(
    traces: Sequence[StopTrace],
    scores: Sequence[Sequence[Float[np.ndarray, "fed"]]],
    settings: Sequence[Setting],
    then: ProbeEffect,
    judge: ReadAnswer,
) -> list[list[Stop]]:
    """Return the effect of each setting on each rollout, `[settings][traces]`.

    Args:
        traces: the rollouts.
        scores: scores of their tokens by the probe, then by each random direction.
        settings: the settings.
        then: the effect of stopping.
        judge: reads and judges answers.
    """
    readings = _Readings(traces, judge)
    ends = [trace.sentence_ends() for trace in traces]
    if any(setting.kind == "convergence" for setting in settings):
        await readings.read((number, place) for number, own in enumerate(ends) for place in own)

    def place(setting: Setting, number: int) -> int | None:
        trace = traces[number]
        match setting.kind:
            case "whole":
                return None
            case "fixed_length":
                assert setting.limit is not None
                counted = np.flatnonzero(trace.counted)
                return int(counted[setting.limit - 1]) if len(counted) >= setting.limit else None
            case "convergence":
                assert setting.length is not None
                return converged([(at, readings[number, at].answer) for at in ends[number]], setting.length)
            case _:
                assert setting.above is not None
                assert setting.length is not None
                own = scores[0 if setting.kind == "probe" else 1 + setting.number][number]
                return find_stop(own, trace.counted, setting.above, setting.length)[0]

    places = [[place(setting, number) for number in range(len(traces))] for setting in settings]
    await readings.read((number, at) for row in places for number, at in enumerate(row) if at is not None)
    answers = [trace.n_tokens - trace.thought for trace in traces if trace.thought is not None]
    usual = int(np.median(answers)) if answers else 0

    def stop(number: int, at: int | None) -> Stop:
        trace = traces[number]
        if at is None:
            return Stop(None, trace.n_tokens, trace.sample.correct)
        more = 0
        if then == "close_reasoning":
            more = 1 + (usual if trace.thought is None else trace.n_tokens - trace.thought)
        return Stop(at, at + 1 + more, readings[number, at].correct)

    return [[stop(number, at) for number, at in enumerate(row)] for row in places]


def converged(readings: Sequence[tuple[int, str | None]], length: int) -> int | None:
    """Return the token at which the last `length` readings agree; None if they never do.

    Args:
        readings: the token at each sentence end, with the answer read up to there.
        length: number of readings that must agree.
    """
    for number in range(length - 1, len(readings)):
        last = {answer for _, answer in readings[number + 1 - length : number + 1]}
        if len(last) == 1 and None not in last:
            return readings[number][0]
    return None
