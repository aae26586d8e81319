"""Writes the files derived from the record: `summary.json`, `dataset.jsonl`, `audit.jsonl`, and three small files per
sample.

    dataset.jsonl                   the problems posed
    audit.jsonl                     outputs on which extractors disagree, or for which the primary one found
                                    nothing and another the gold answer: the readings, and the text around them
    samples/gsm8k_0001.json         the sample, with the location of each stored tensor under `activations`
    trajectories/gsm8k_0001.jsonl   the conversation, one message per line
    agent_states/gsm8k_0001.json    the turns: request, tokens, why it stopped

All are functions of config.json and samples.jsonl, so they agree with the record and can be regenerated. The only data not
in the record is the wall time; `summary.json` carries it as `timing`, for the most recent time that samples were run.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_jobs.records import answer_of
from eval_jobs.summary import disagree, expected_samples, summarize_samples
from roentgen.atomic_files import atomic_write, write_json
from roentgen.runs import Run, RunConfig, Sample

SAMPLE_FILES_UP_TO = 10_000
"""Runs with more samples get no files per sample, because such large folders are of little use."""

AROUND = 60
"""Characters of context on each side of an answer."""


@dataclass(frozen=True)
class Timing:
    """Timing measured by the driver."""

    seconds: float
    """Wall time in seconds."""
    samples: int
    """Number of samples run."""
    completion_tokens: int
    """Number of tokens generated."""


def write_sample_files(run: Run, sample: Sample) -> None:
    """Write the three files of a sample, `agent_states` last; runs with very many samples get none."""
    if expected_samples(run.config) > SAMPLE_FILES_UP_TO:
        return
    name = sample.sample_id
    write_json(_folder(run, "samples") / f"{name}.json", {**sample.model_dump(), "activations": _activations(sample)})
    _write_jsonl(_folder(run, "trajectories") / f"{name}.jsonl", sample.messages)
    write_json(_folder(run, "agent_states") / f"{name}.json", _agent_state(run.config, sample))


def write_missing_sample_files(run: Run) -> None:
    """Write missing sample files, for samples whose driver died between recording them and writing their files."""
    if expected_samples(run.config) > SAMPLE_FILES_UP_TO:
        return
    for half_written in run.path.glob("*/.*.tmp"):
        half_written.unlink()
    for sample in run.read_samples():
        if not (run.path / "agent_states" / f"{sample.sample_id}.json").exists():
            write_sample_files(run, sample)


def write_summary(run: Run, timing: Timing | None) -> dict[str, Any]:
    """Write `dataset.jsonl`, `audit.jsonl` and `summary.json`; return the summary.

    Args:
        run: the run.
        timing: the timing; None if nothing was run, which keeps the previous timing of `summary.json`.
    """
    samples = run.read_samples().by_name()
    summary = summarize_samples(run.config, samples)
    summary["timing"] = (run.summary() or {}).get("timing") if timing is None else _speed(timing)
    _write_jsonl(run.path / "dataset.jsonl", _dataset(samples))
    primary = run.config.settings["extractor"]
    _write_jsonl(run.path / "audit.jsonl", (audit_entry(s, primary) for s in samples if disagree(s, primary)))
    write_json(run.path / "summary.json", summary)
    return summary


def audit_entry(sample: Sample, primary: str) -> dict[str, Any]:
    """Return the audit entry of an output: the primary verdict, each extractor's reading, and the text around it."""
    return {
        "sample_id": sample.sample_id,
        "problem_id": sample.problem_id,
        "gold": sample.gold,
        "extractor": primary,
        "verdict": sample.verdict(primary),
        "readings": {
            name: {"answer": answer, "correct": sample.correct_by[name], "around": excerpt(sample.response, answer)}
            for name, answer in sample.answers.items()
            if answer is not None
        },
    }


def excerpt(text: str, answer: str) -> str:
    """Return the text around the last occurrence of an answer, with or without thousands separators."""
    digits = ",?".join(map(re.escape, answer[:AROUND].replace(",", "")))
    start, stop = max((match.span() for match in re.finditer(digits, text)), default=(len(text), len(text)))
    return text[max(0, start - AROUND) : stop + AROUND]


def _speed(timing: Timing) -> dict[str, Any]:
    return {
        "wall_seconds": timing.seconds,
        "samples": timing.samples,
        "completion_tokens": timing.completion_tokens,
        "tokens_per_second": timing.completion_tokens / timing.seconds if timing.seconds > 0 else None,
    }


def _dataset(samples: Iterable[Sample]) -> Iterator[dict[str, Any]]:
    """Yield each problem's record once, so that `--problems RUN/dataset.jsonl` poses the problems again."""
    posed: set[str] = set()
    for sample in samples:
        if sample.problem_id not in posed:
            posed.add(sample.problem_id)
            yield {
                "sample_id": sample.sample_id,
                "problem_id": sample.problem_id,
                "question": sample.question,
                **answer_of(sample.gold, sample.solution),
                "gold": sample.gold,
                **({} if sample.template is None else {"template": sample.template}),
                **sample.fields,
            }


def _activations(sample: Sample) -> dict[str, Any]:
    """Return the location of the rows of each stored key."""
    return {
        key: {
            **tensor.model_dump(mode="json"),
            "turn": rollout.turn,
            "rollout_id": rollout.rollout_id,
            "session": rollout.uri,
            "row_start": rollout.row_start,
            "row_stop": rollout.row_stop,
        }
        for rollout in sample.rollouts
        for key, tensor in rollout.tensors.items()
    }


def _agent_state(config: RunConfig, sample: Sample) -> dict[str, Any]:
    rollouts = {rollout.turn: rollout.rollout_id for rollout in sample.rollouts}
    return {
        "sample_id": sample.sample_id,
        "problem_id": sample.problem_id,
        "epoch": sample.epoch,
        "variant": sample.variant,
        "model": config.hashed["model"],
        "sampling": config.hashed["sampling"],
        "mode": config.hashed["mode"],
        "tools": config.hashed["tools"],
        "messages": sample.messages,
        "turns": [
            {"turn": number, **turn.model_dump(), "rollout_id": rollouts.get(number)}
            for number, turn in enumerate(sample.turns)
        ],
        "stop": "error" if sample.error else sample.finish_reason,
        "error": sample.error,
    }


def _folder(run: Run, name: str) -> Path:
    folder = run.path / name
    folder.mkdir(exist_ok=True)
    return folder


def _write_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write a JSON Lines file atomically."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
