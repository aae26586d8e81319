"""Exports a run as a log of inspect_ai, for `inspect view` and other readers of such logs.

    roentgen export RUN gsm8k.eval
    inspect view --log-dir .

The format is a zip archive: `header.json` describes the evaluation and its results, `samples/<id>_epoch_<n>.json` is a
sample with its conversation and scores, and `summaries.json` has the fields shown in lists. It is written according to
inspect_ai's specification (https://inspect.aisi.org.uk/eval-logs.html, schema version 2), one sample at a time and without
requiring inspect_ai; `make test-clients` reads it back with inspect_ai.

inspect_ai identifies a sample by id and epoch; with variants the id is `PROBLEM@VARIANT`. Each extractor is a scorer, the
primary one first.
"""

import json
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from eval_jobs.summary import summarize_samples
from roentgen.atomic_files import atomic_write
from roentgen.runs import Run, Sample

SCHEMA_VERSION = 2

STOP_REASONS = {"stop": "stop", "length": "max_tokens", "tool_calls": "tool_calls", "max_turns": "tool_calls"}
"""inspect_ai's value for our `finish_reason`; others become "unknown"."""

_VALUES = {"correct": "C", "wrong": "I", "no_answer": "N"}
"""inspect_ai's values for our verdicts."""


def write_inspect_log(run: Run, path: Path) -> int:
    """Write a run, sorted by sample name; return the number of samples.

    Raises:
        RunError: if the record is damaged.
        OSError: if the file cannot be written.
    """
    samples = run.read_samples().by_name()
    summary = run.summary() or summarize_samples(run.config, samples)
    extractors = sorted(summary["extractors"], key=lambda name: name != summary["extractor"])
    ids: list[str] = []
    finished: float | None = None
    # Files of an archive are written one after the other, so the summaries are buffered on disk: a list of them would grow
    # with the run.
    with (
        atomic_write(path) as temporary,
        ZipFile(temporary, "w", ZIP_DEFLATED) as archive,
        TemporaryFile() as summaries,
    ):
        for sample in samples:
            entry = _sample(sample, summary["model"], extractors)
            archive.writestr(f"samples/{entry['id']}_epoch_{sample.epoch}.json", _json(entry))
            summaries.write(f"{',' if ids else '['}{_json(_summary(entry))}".encode())
            ids.append(entry["id"])
            finished = max(filter(None, (finished, sample.finished)), default=None)
        summaries.write(b"]" if ids else b"[]")
        summaries.seek(0)
        with archive.open("summaries.json", "w", force_zip64=True) as file:
            shutil.copyfileobj(summaries, file)
        archive.writestr("header.json", _json(_header(run, summary, extractors, list(dict.fromkeys(ids)), finished)))
    return len(samples)


def _header(
    run: Run, summary: dict[str, Any], extractors: Iterable[str], ids: list[str], finished: float | None
) -> dict[str, Any]:
    config = run.config
    sampling = config.hashed["sampling"]
    return {
        "version": SCHEMA_VERSION,
        "status": "success" if summary["complete"] else "started" if run.is_running else "cancelled",
        "eval": {
            "eval_id": config.run_id,
            "run_id": config.run_id,
            "task_id": config.config_hash,
            "created": config.created,
            "task": Path(config.problems["source"]).stem,
            "task_args": {"prompt": config.prompt["name"], "mode": summary["mode"]},
            "dataset": {"name": config.problems["source"], "samples": len(ids), "sample_ids": ids},
            "model": summary["model"],
            "model_base_url": config.settings["base_url"],
            "model_generate_config": {name: sampling[name] for name in ("max_tokens", "temperature", "top_p", "seed")},
            "config": {"epochs": config.problems.get("epochs", 1)},
            "packages": config.versions,
            "metadata": {
                "hashed": config.hashed,
                "variants": config.variants,
                "activations": summary["activations"],
            },
        },
        "results": {
            "total_samples": summary["samples"] + summary["errors"],
            "completed_samples": summary["samples"],
            "scores": [_results(name, summary["extractors"][name]) for name in extractors],
        },
        "stats": {
            "started_at": config.created,
            "completed_at": "" if finished is None else datetime.fromtimestamp(finished, UTC).isoformat(),
            "model_usage": {summary["model"]: _usage(summary["prompt_tokens"], summary["completion_tokens"])},
        },
    }


def _results(name: str, scores: dict[str, Any]) -> dict[str, Any]:
    values = {"accuracy": scores["value"], "stderr": scores["standard_error"]}
    metrics = {metric: {"name": metric, "value": value} for metric, value in values.items() if value is not None}
    return {"name": name, "scorer": name, "scored_samples": scores["n"], "metrics": metrics}


def _sample(sample: Sample, model: str, extractors: Iterable[str]) -> dict[str, Any]:
    messages = [_message(message) for message in sample.messages]
    usage = _usage(sample.prompt_tokens, sample.completion_tokens)
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    reason = STOP_REASONS.get(sample.finish_reason or "", "unknown")
    return {
        "id": sample.problem_id if sample.variant is None else f"{sample.problem_id}@{sample.variant}",
        "epoch": sample.epoch,
        "input": sample.question,
        "target": sample.gold,
        "messages": messages,
        "output": {
            "model": model,
            "choices": [{"message": messages[-1], "stop_reason": reason}] if answered else [],
            "completion": sample.response,
            "usage": usage,
            "time": sample.seconds,
        },
        "scores": {name: _score(sample, name) for name in extractors if name in sample.correct_by}
        if sample.error is None
        else {},
        "metadata": {
            "sample_id": sample.sample_id,
            "variant": sample.variant,
            "config_hash": sample.config_hash,
            "solution": sample.solution,
            **({"fields": sample.fields} if sample.fields else {}),
            **({"values": sample.values} if sample.values else {}),
            "finish_reason": sample.finish_reason,
            "rollouts": [
                {"session": ref.uri, "rollout_id": ref.rollout_id, "turn": ref.turn} for ref in sample.rollouts
            ],
        },
        "model_usage": {model: usage},
        "total_time": sample.seconds,
        "error": None
        if sample.error is None
        else {"message": sample.error, "traceback": sample.error, "traceback_ansi": sample.error},
    }


def _summary(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a sample that lists show."""
    same = ("id", "epoch", "input", "target", "scores", "model_usage", "total_time")
    return {
        **{name: entry[name] for name in same},
        "error": entry["error"] and entry["error"]["message"],
        "completed": True,
        "message_count": len(entry["messages"]),
    }


def _score(sample: Sample, name: str) -> dict[str, Any]:
    return {"value": _VALUES[sample.verdict(name) or "no_answer"], "answer": sample.answers.get(name)}


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"input_tokens": prompt, "output_tokens": completion, "total_tokens": prompt + completion}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Convert an OpenAI message to inspect_ai's format: reasoning is a part of the content, and arguments are an object."""
    content: Any = message.get("content") or ""
    if message.get("reasoning_content"):
        content = [
            {"type": "reasoning", "reasoning": message["reasoning_content"]},
            {"type": "text", "text": content},
        ]
    spelled = {"role": message["role"], "content": content}
    if message.get("tool_calls"):
        spelled["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    if message.get("tool_call_id"):
        spelled["tool_call_id"] = message["tool_call_id"]
    return spelled


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    name, written = call["function"]["name"], call["function"].get("arguments", "{}")
    try:
        arguments = json.loads(written)
        error = None if isinstance(arguments, dict) else "the arguments are not a JSON object"
    except (ValueError, RecursionError) as problem:
        arguments, error = None, f"the arguments are not JSON: {problem}"
    arguments = arguments if error is None else {"arguments": written}
    return {"id": call["id"], "function": name, "arguments": arguments, "parse_error": error}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
