"""What is made from the record: `summary.json`, `dataset.jsonl`, and three small files per sample.

    samples/gsm8k_0001.json         the sample, and under `activations` where each stored tensor is
    trajectories/gsm8k_0001.jsonl   the conversation, a message per line
    agent_states/gsm8k_0001.json    how it went, turn by turn: request, tokens, why it stopped

All of them are functions of config.json and samples.jsonl, so they agree with the record by construction and can be made
again. The one thing that the record does not hold is the wall time; `summary.json` carries it as `timing`, which speaks of
the last time that anything was run.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval_jobs.scoring import EXTRACTORS, accuracy
from roentgen.runs import Run, RunConfig, Sample, write_json

SAMPLE_FILES_UP_TO = 10_000
"""Runs of more problems than this get no files per sample: folders that large help nobody."""


@dataclass(frozen=True)
class Timing:
    """What the driver's clock saw.

    Attributes:
        seconds: wall time.
        problem_ids: what was run in it.
    """

    seconds: float
    problem_ids: frozenset[str]


def write_sample_files(run: Run, sample: Sample) -> None:
    """Write the three files of a sample, `agent_states` last; a run of very many problems gets none."""
    if run.config.problems["samples"] > SAMPLE_FILES_UP_TO:
        return
    name = sample.sample_id
    write_json(_folder(run, "samples") / f"{name}.json", {**sample.model_dump(), "activations": _activations(sample)})
    _write_jsonl(_folder(run, "trajectories") / f"{name}.jsonl", sample.messages)
    write_json(_folder(run, "agent_states") / f"{name}.json", _agent_state(run.config, sample))


def write_missing_sample_files(run: Run) -> None:
    """Write the files of samples whose driver died after it had recorded them and before it had written these."""
    for sample in run.samples():
        if not (run.path / "agent_states" / f"{sample.sample_id}.json").exists():
            write_sample_files(run, sample)


def sorted_samples(run: Run) -> list[Sample]:
    """Return a run's samples in the order of their problems, whatever order they finished in."""
    return sorted(run.samples(), key=lambda sample: (len(sample.sample_id), sample.sample_id))


def write_summary(run: Run, timing: Timing | None) -> dict[str, Any]:
    """Write `dataset.jsonl` and `summary.json`; return the summary.

    Args:
        run: the run.
        timing: what it took; None if nothing was run, which keeps what `summary.json` said before.
    """
    samples = sorted_samples(run)
    _write_jsonl(run.path / "dataset.jsonl", [_dataset_line(sample) for sample in samples])
    summary = summarise(run.config, samples)
    summary["timing"] = (run.summary() or {}).get("timing") if timing is None else _speed(samples, timing)
    write_json(run.path / "summary.json", summary)
    return summary


def summarise(config: RunConfig, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return what a run's samples come to. Samples with an error are counted as such and are in no other number."""
    scored = [sample for sample in samples if sample.error is None]
    primary = config.settings["extractor"]
    truncated = [sample for sample in scored if sample.finish_reason == "length"]
    return {
        "complete": len(scored) == config.problems["samples"],
        "run_id": config.run_id,
        "config_hash": config.config_hash,
        "model": config.hashed["model"],
        "problems": config.problems,
        "extractor": primary,
        "samples": len(scored),
        "errors": len(samples) - len(scored),
        "truncated": len(truncated),
        "unparsable": sum(sample.answers[primary] is None for sample in scored),
        "accuracy": asdict(accuracy([sample.correct for sample in scored])),
        "extractors": {name: _extractor(scored, name, primary) for name in EXTRACTORS},
        "disagreements": [sample.sample_id for sample in scored if _disagree(sample)],
        "prompt_tokens": sum(sample.prompt_tokens for sample in scored),
        "completion_tokens": sum(sample.completion_tokens for sample in scored),
        "request_seconds": sum(sample.seconds for sample in scored),
        "activations": _activation_summary(scored),
    }


def _extractor(scored: Sequence[Sample], name: str, primary: str) -> dict[str, Any]:
    return {
        **asdict(accuracy([sample.correct_by[name] for sample in scored])),
        "unparsable": sum(sample.answers[name] is None for sample in scored),
        "differs_from_primary": sum(sample.correct_by[name] != sample.correct_by[primary] for sample in scored),
    }


def _disagree(sample: Sample) -> bool:
    """Whether extractors that found an answer judge it differently."""
    return len({sample.correct_by[name] for name, answer in sample.answers.items() if answer is not None}) > 1


def _speed(samples: Sequence[Sample], timing: Timing) -> dict[str, Any]:
    ran = [sample for sample in samples if sample.problem_id in timing.problem_ids]
    tokens = sum(sample.completion_tokens for sample in ran)
    return {
        "wall_seconds": timing.seconds,
        "samples": len(ran),
        "completion_tokens": tokens,
        "tokens_per_second": tokens / timing.seconds if timing.seconds > 0 else None,
    }


def _activation_summary(scored: Sequence[Sample]) -> dict[str, Any] | None:
    rollouts = [rollout for sample in scored for rollout in sample.rollouts]
    if not rollouts:
        return None
    return {
        "session_id": rollouts[0].session_id,
        "uri": rollouts[0].uri,
        "rollouts": len(rollouts),
        "keys": sorted({key for rollout in rollouts for key in rollout.tensors}),
        "mean_rows": sum(rollout.row_stop - rollout.row_start for rollout in rollouts) / len(rollouts),
    }


def _activations(sample: Sample) -> dict[str, Any]:
    """Return, per stored key, where its rows are."""
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
    turn = {
        "turn": 0,
        "finish_reason": sample.finish_reason,
        "prompt_tokens": sample.prompt_tokens,
        "completion_tokens": sample.completion_tokens,
        "seconds": sample.seconds,
        "rollout_id": sample.rollouts[0].rollout_id if sample.rollouts else None,
    }
    return {
        "sample_id": sample.sample_id,
        "problem_id": sample.problem_id,
        "model": config.hashed["model"],
        "sampling": config.hashed["sampling"],
        "mode": config.hashed["mode"],
        "tools": config.hashed["tools"],
        "messages": sample.messages,
        "turns": [] if sample.error else [turn],
        "stop": "error" if sample.error else sample.finish_reason,
        "error": sample.error,
    }


def _dataset_line(sample: Sample) -> dict[str, str]:
    """Return a problem in GSM8K's own format, so that `--problems RUN/dataset.jsonl` poses it again."""
    return {
        "sample_id": sample.sample_id,
        "problem_id": sample.problem_id,
        "question": sample.question,
        "answer": sample.solution,
        "gold": sample.gold,
    }


def _folder(run: Run, name: str) -> Path:
    folder = run.path / name
    folder.mkdir(exist_ok=True)
    return folder


def _write_jsonl(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
