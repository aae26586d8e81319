"""Reads the logs of lm-evaluation-harness (`--log_samples`): one line per sample and filter, with the requests it sent.

These logs have no rollout ids, and all requests go to one address. So a sample is identified by its prompts: a conversation by
its hash, which the server uses as the problem id at an address `/v1/r/RUN/-/1`; a raw text by the text itself.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from roentgen.contract import LabelValue, canonical_hash
from roentgen.harnesses.scored import LogError, ScoredSample, flat_labels

_NO_FILTER = "none"
_TASK = re.compile(r"samples_(.+)_\d{4}-\d\d-\d\d(?:T[\d.:-]+)?")
"""A file's name: its task and its time."""


def lm_eval_files(log: Path) -> list[Path]:
    """Return the sample files at a path: a file itself, or those in an `--output_path`."""
    return sorted(log.rglob("samples_*.jsonl")) if log.is_dir() else [log]


def read_lm_eval(file: Path) -> Iterator[ScoredSample]:
    """Yield a file's samples.

    Raises:
        LogError: if a line is not a sample; the message names the first one.
    """
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _scored(json.loads(line), file.stem, number)
            except KeyError as error:
                raise LogError(f"{file}, line {number}: not a sample of lm-eval: {error} is missing") from error
            except (ValueError, TypeError, AttributeError) as error:
                raise LogError(f"{file}, line {number}: not a sample of lm-eval: {error}") from error


def _scored(sample: dict[str, Any], stem: str, number: int) -> ScoredSample:
    labels: dict[str, LabelValue] = {"doc_id": sample["doc_id"]}
    if found := _TASK.fullmatch(stem):
        labels["task"] = found[1]
    suffix = "" if sample.get("filter", _NO_FILTER) == _NO_FILTER else f",{sample['filter']}"
    for metric in sample["metrics"]:
        labels |= flat_labels(f"{metric}{suffix}", sample[metric])  # named as in lm-eval's results
    hashes, texts = [], []
    answers = tuple(one for given in sample["resps"] for one in given if isinstance(one, str))
    for request in sample["arguments"].values():
        prompt, rest = request["arg_0"], request.get("arg_1")
        prompt = prompt[0] if isinstance(prompt, list) else prompt  # a conversation, as lm-eval wraps it
        if prompt.lstrip().startswith("[{") and (messages := _conversation(prompt)) is not None:
            hashes.append(canonical_hash(messages))
        texts.append(prompt + rest if isinstance(rest, str) else prompt)
        if isinstance(rest, str):  # nothing was generated; the responses are log-likelihoods
            answers = ()
    name = f"{stem} line {number} (doc {sample['doc_id']})"
    return ScoredSample(name, labels, prompt_hashes=tuple(hashes), texts=tuple(texts), answers=answers)


def _conversation(prompt: str) -> Any:
    try:
        return json.loads(prompt)
    except ValueError:
        return None
