"""Joins the scores of a harness' log to the rollouts that were stored while it ran, as labels.

A sample's rollouts are those that the log names, or those made under its prompts. They get its scores; the same again changes
nothing. The session is a folder, a place in a bucket, or a running server's: then the labels go through the server, and what is
read of it is its index.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import pandas as pd
from httpx2 import HTTPError

from roentgen.contract import LabelValue
from roentgen.harnesses.inspect_log import inspect_files, read_inspect
from roentgen.harnesses.lm_eval_log import lm_eval_files, read_lm_eval
from roentgen.harnesses.scored import LogError, ScoredSample, with_grades
from roentgen.http_client import connect, explain
from roentgen.store import Session, StoreError
from roentgen.store.labels import LabelChanges
from roentgen.store.pulling import pull

Added = Mapping[str, Mapping[str, LabelValue]]

_AT_ONCE = 5_000
_TIMEOUT_S = 120.0
OTHERWISE = "its prompts were answered otherwise in the session: by another model, or in another run"
"""Why a sample has no rollouts though what it asked is there."""
_BEGINNING = re.compile(r"(?:<[^<>\s]{1,40}>|\[[A-Z]{2,12}\])+")
"""What a tokenizer may have put before a text: special tokens."""


@dataclass(frozen=True)
class JoinReport:
    """The result of a join."""

    samples: int
    """Number of samples in the log."""
    matched: int
    """Number of samples with rollouts in the session."""
    rollouts: int
    """Number of rollouts with the scores as labels."""
    changed: int
    """Number of rollouts whose labels changed."""
    labels: tuple[str, ...] = ()
    """Names of the labels."""
    unmatched: dict[str, list[str]] = field(default_factory=dict)
    """Samples without rollouts, by reason."""


class LabelTarget(Protocol):
    """A session whose rollouts get labels."""

    def index(self) -> pd.DataFrame:
        """Return its rollouts, with problem and text."""

    def add(self, labels: Added) -> LabelChanges:
        """Add labels to rollouts."""


class StoredTarget:
    """A session in a folder or a bucket."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def index(self) -> pd.DataFrame:
        """Return its rollouts, with problem and text."""
        return self._session.rollouts(unique=False, columns=("text", "token_offsets"))

    def add(self, labels: Added) -> LabelChanges:
        """Add labels to rollouts."""
        return self._session.add_labels(labels)


class ServedTarget:
    """A session of a running server."""

    def __init__(self, address: str, api_key: str) -> None:
        self._address, self._key = address.rstrip("/"), api_key

    def index(self) -> pd.DataFrame:
        """Return the rollouts with problem and text; only the session's index is fetched."""
        with tempfile.TemporaryDirectory() as folder:
            uri = pull(self._address, folder, api_key=self._key, shards=False)
            return StoredTarget(Session.open(uri)).index()

    def add(self, labels: Added) -> LabelChanges:
        """Add labels to rollouts.

        Raises:
            StoreError: if the server refuses them.
        """
        done = LabelChanges()
        with connect(self._address, self._key, _TIMEOUT_S) as client:
            for some in _portions(labels):
                try:
                    added = client.post("labels", json={"labels": some}).raise_for_status().json()
                except HTTPError as error:
                    raise StoreError(f"{self._address}/labels {explain(error)}") from error
                unknown = (*done.unknown, *added["unknown"])
                done = LabelChanges(done.changed + added["changed"], done.same + added["same"], unknown)
        return done


def join(
    log: str | Path, session: str | Path, *, scorers: Sequence[str] = (), prefix: str = "", api_key: str = "none"
) -> JoinReport:
    """Add a log's scores to a session's rollouts as labels.

    Args:
        log: a log of inspect_ai (`.eval`, `.json`, or a folder of them) or of lm-eval with `--log_samples` (a
            `samples_….jsonl`, or the folder `--output_path`).
        session: STORE/SESSION, or http://SERVER/v1/activations/session/ID.
        scorers: names of the scores to use, including those that continue a name after a dot or comma; all if empty.
        prefix: prefix of the labels' names.
        api_key: the server's API key.

    Raises:
        LogError: if the log cannot be read, or has no score of those names.
        StoreError: if the session cannot be read or written.
        OSError: if a file cannot be read or written.
    """
    samples = list(read_log(Path(log)))
    names = sorted({name for sample in samples for name in sample.labels})
    kept = [name for name in names if not scorers or any(_is_of(name, scorer) for scorer in scorers)]
    if samples and names and not kept:
        raise LogError(f"{log} has no scores named {', '.join(scorers)}; it has {', '.join(names)}")
    chosen = [
        replace(sample, labels={prefix + name: value for name, value in sample.labels.items() if name in kept})
        for sample in samples
    ]
    return join_scored(chosen, open_target(session, api_key))


def read_log(log: Path) -> Iterator[ScoredSample]:
    """Yield the samples of a log, or of all logs of a folder.

    Raises:
        LogError: if there is no log, or one cannot be read.
    """
    if not log.exists():
        raise LogError(f"{log} does not exist")
    if log.is_dir():
        files = inspect_files(log) or lm_eval_files(log)
        if not files:
            raise LogError(
                f"{log} has neither logs of inspect_ai (*.eval, *.json) nor samples of lm-eval (samples_*.jsonl)"
            )
    else:
        files = [log]
    for file in files:
        if file.suffix not in (".eval", ".json", ".jsonl"):
            raise LogError(
                f"{file} is not a known log; allowed are .eval and .json of inspect_ai, and samples_….jsonl of lm-eval"
            )
        for sample in read_lm_eval(file) if file.suffix == ".jsonl" else read_inspect(file):
            several = len(files) > 1 and not sample.name.startswith(file.stem)
            yield replace(sample, name=f"{file.stem} {sample.name}") if several else sample


def open_target(session: str | Path, api_key: str) -> LabelTarget:
    """Open a session to label.

    Raises:
        StoreError: if it does not exist.
    """
    if str(session).startswith(("http://", "https://")):
        return ServedTarget(str(session), api_key)
    return StoredTarget(Session.open(session))


def join_scored(samples: Sequence[ScoredSample], target: LabelTarget) -> JoinReport:
    """Add samples' scores to the rollouts of a session.

    Raises:
        StoreError: if the session cannot be read or written.
        OSError: if a file cannot be read or written.
    """
    scored = with_grades([sample for sample in samples if sample.labels])
    asked = _PromptIndex(target.index()) if any(not sample.rollout_ids for sample in scored) else None
    found = [sample.rollout_ids or (asked.find(sample) if asked else ()) for sample in scored]
    disputed = _disputed(scored, found)
    labels: dict[str, dict[str, LabelValue]] = defaultdict(dict)
    for sample, ids in zip(scored, found, strict=True):
        for rollout_id in ids:
            if rollout_id not in disputed:
                labels[rollout_id] |= sample.labels
    done = target.add(labels) if labels else LabelChanges()
    missing = set(done.unknown)
    unmatched: dict[str, list[str]] = defaultdict(list)
    for sample in samples:
        if not sample.labels:
            unmatched[sample.unscored].append(sample.name)
    for sample, ids in zip(scored, found, strict=True):
        if not ids:
            otherwise = asked is not None and sample.name in asked.otherwise
            unmatched[OTHERWISE if otherwise else sample.problem].append(sample.name)
        elif disputed.issuperset(ids):
            unmatched["several samples with different scores have the same prompt and answer"].append(sample.name)
        elif missing.issuperset(ids):
            unmatched["the session has none of the rollouts that the log names"].append(sample.name)
    return JoinReport(
        samples=len(samples),
        matched=len(samples) - sum(map(len, unmatched.values())),
        rollouts=done.changed + done.same,
        changed=done.changed,
        labels=tuple(sorted({name for sample in scored for name in sample.labels})),
        unmatched=dict(unmatched),
    )


def _disputed(samples: Sequence[ScoredSample], found: Sequence[Sequence[str]]) -> set[str]:
    """Return the rollouts that several samples would give different values of one label."""
    values: dict[tuple[str, str], LabelValue] = {}
    disputed = set()
    for sample, ids in zip(samples, found, strict=True):
        for rollout_id in ids:
            for name, value in sample.labels.items():
                if values.setdefault((rollout_id, name), value) != value:
                    disputed.add(rollout_id)
    return disputed


class _PromptIndex:
    """Finds a session's rollouts by prompt and answer.

    Attributes:
        otherwise: names of samples whose prompts were found, but with other answers than in the log.
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        self.otherwise: set[str] = set()
        self._by_problem: dict[str, list[str]] = defaultdict(list)
        self._by_text: dict[str, list[str]] = defaultdict(list)
        self._completions: dict[str, str] = {}
        for row in frame.to_dict("records"):
            if isinstance(row["problem_id"], str):
                self._by_problem[row["problem_id"]].append(row["rollout_id"])
            offsets, n_prompt = row["token_offsets"], int(row["n_prompt"])
            prompt = row["text"][: int(offsets[n_prompt])] if len(offsets) > n_prompt else row["text"]
            self._completions[row["rollout_id"]] = row["text"][len(prompt) :].strip()
            bare = prompt[found.end() :] if (found := _BEGINNING.match(prompt)) else prompt
            for text in {prompt.strip(), bare.strip()}:
                self._by_text[text].append(row["rollout_id"])

    def find(self, sample: ScoredSample) -> tuple[str, ...]:
        """Return the rollouts with a sample's prompts and its answers in the log; others may be by another model."""
        lists = [self._by_problem.get(one, []) for one in sample.prompt_hashes]
        lists += [self._by_text.get(text.strip(), []) for text in sample.texts]
        ids = tuple(dict.fromkeys(rollout_id for ids in lists for rollout_id in ids))
        answers = tuple(answer.strip() for answer in sample.answers if answer.strip())
        if not answers or not ids:
            return ids
        answered = tuple(one for one in ids if self._completions[one].startswith(answers))
        # A harness may have removed reasoning, or text before a tool call.
        within = answered or tuple(one for one in ids if any(answer in self._completions[one] for answer in answers))
        if not within:
            self.otherwise.add(sample.name)
        return within


def _is_of(name: str, scorer: str) -> bool:
    return name == scorer or name.startswith((f"{scorer}.", f"{scorer},"))


def _portions(labels: Added) -> Iterator[dict[str, Mapping[str, LabelValue]]]:
    items: Iterable[tuple[str, Mapping[str, LabelValue]]] = labels.items()
    whole = list(items)
    for start in range(0, len(whole), _AT_ONCE):
        yield dict(whole[start : start + _AT_ONCE])
