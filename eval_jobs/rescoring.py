"""Scores a run's answers again without the model: with another primary scorer, or an edited one.

The answers stay as they are. The record is rewritten atomically with the new verdicts, and the files derived from it
afterwards, so that all readers, including probes, see the same `correct`.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from eval_jobs.extractors import EXTRACTORS, UnknownScorerError, choose_scorer, judge
from eval_jobs.outputs import write_sample_files, write_summary
from eval_jobs.problems import Problem
from eval_jobs.report import write_report
from eval_jobs.verdicts import Output, Scorer, ScoringFailedError
from roentgen.extensions import Extension
from roentgen.runs import Run, RunConfig, Sample, rewrite_all

AT_ONCE = 64
"""Number of answers scored concurrently, for scorers that wait for I/O."""


def rescore(run: Run, extractor: str | Scorer | None = None) -> Run:
    """Score every answer of a run again.

    Args:
        run: the run.
        extractor: the new primary scorer: a name, a reference or a function; None keeps the run's.

    Raises:
        RunError: if an evaluation is writing the run, or the record is damaged.
        UnknownScorerError: if the scorer is not to be found.
        ScorerError: if it returns what is no verdict; the run is as it was.
    """
    chosen = find_scorer(run.config, extractor)
    own = {} if chosen.built_in else {chosen.name: {"reference": chosen.reference, "hash": chosen.digest}}
    config = run.config.model_copy(
        update={"settings": {**run.config.settings, "extractor": chosen.name}, "scorers": {**run.config.scorers, **own}}
    )
    again = rewrite_all(run, lambda samples: _judged(samples, chosen), config)
    for sample in again.read_samples():
        write_sample_files(again, sample)
    write_summary(again, None)
    write_report(again)
    return again


def find_scorer(config: RunConfig, extractor: str | Scorer | None = None) -> Extension[Scorer]:
    """Return a scorer, by default the run's primary one.

    Raises:
        UnknownScorerError: if it is not found.
    """
    if extractor is not None:
        return choose_scorer(extractor)
    name = config.settings["extractor"]
    reference = config.scorers.get(name, {}).get("reference")
    if name not in EXTRACTORS and reference is None:
        raise UnknownScorerError(f"the run is scored by {name}, a function given in Python: choose another --extractor")
    return choose_scorer(reference or name)


def problem_of(sample: Sample) -> Problem:
    """Return the problem of a sample, as far as the record holds it."""
    return Problem(
        sample.problem_id,
        0,
        sample.question,
        sample.solution,
        sample.gold,
        template=sample.template,
        fields=sample.fields,
    )


def _judged(samples: Iterable[Sample], chosen: Extension[Scorer]) -> Iterator[Sample]:
    stream, runner = iter(samples), asyncio.Runner()
    with ThreadPoolExecutor(1) as beside:

        def call(function: Callable[..., Any], *given: Any) -> Any:
            return beside.submit(function, *given).result() if _in_a_loop() else function(*given)

        try:
            while some := list(islice(stream, AT_ONCE)):
                yield from call(runner.run, _judge_all(some, chosen))
        finally:
            call(runner.close)


def _in_a_loop() -> bool:
    """True if an event loop runs in this thread, as in a notebook, so that no other loop can."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _judge_all(samples: Iterable[Sample], chosen: Extension[Scorer]) -> list[Sample]:
    return await asyncio.gather(*(_judge(sample, chosen) for sample in samples))


async def _judge(sample: Sample, chosen: Extension[Scorer]) -> Sample:
    """Score an answer; verdicts of other custom scorers, which are not available here, are kept.

    Raises:
        UnknownScorerError: if the scorer fails; nothing is written.
    """
    if sample.error is not None:
        return sample
    output = Output(sample.response, tuple(map(dict, sample.messages)), sample.finish_reason)
    try:
        scores = await judge(output, problem_of(sample), {chosen.name: chosen.value})
    except ScoringFailedError as error:
        raise UnknownScorerError(f"{sample.sample_id}: {error}; the run was not changed") from error
    kept = {name: answer for name, answer in sample.answers.items() if name not in EXTRACTORS}
    return sample.model_copy(
        update={
            "answers": {**kept, **scores.answers},
            "correct_by": {**{name: sample.correct_by[name] for name in kept}, **scores.correct_by},
            "correct": scores.correct_by[chosen.name],
            "values": {**sample.values, **scores.values},
        }
    )
