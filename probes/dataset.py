"""X, y and groups of a run: its samples joined to their stored rows.

What flows through here: `samples.jsonl` says what each answer was worth and which rollout holds its activations; the
store holds the rows. `ProbeDataset.open` reads the first and joins the second on rollout id, or, if another session is
named (`roentgen capture` made it: other layers, another model), on the key that both were made under. Labels, groups
and lengths are small and are read at once; activations are not, so `features` reads one key, one row per sample, when
it is asked.

Groups are problems. Several attempts at one problem are not independent, so whoever splits this data must keep them
together. In a conversation of several turns the first turn's rollout counts: it is where the model has seen the
problem and nothing else.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from roentgen.contract import split_key
from roentgen.runs import Run, Sample
from roentgen.store import Session, StoreError

LABELS: dict[str, Callable[[Sample], bool]] = {
    "correct": lambda sample: sample.correct,
    "truncated": lambda sample: sample.finish_reason == "length",
}
"""What a probe can be trained to read, by name."""

POSITIONS = ("last_prompt", "last", "mean_prompt", "mean_generated")
"""The position policies that give one row per rollout."""

_ROW_COLUMNS = ["rollout_id", "shard", "row_start", "row_stop", "n_prompt", "n_completion"]


class ProbeDataError(Exception):
    """A run gives no data to probe; the message says what is missing and what to do."""


class OneClassError(Exception):
    """A run's label does not vary enough to be probed; the message says what it has and what to do."""


@dataclass(frozen=True)
class Source:
    """The part of a dataset that lies in one session.

    Attributes:
        session: the open session.
        rollouts: rows of its index, one per sample.
        samples: which samples of the dataset they are, in the same order.
    """

    session: Session
    rollouts: pd.DataFrame
    samples: Int[np.ndarray, "part"]


@dataclass(frozen=True)
class ProbeDataset:
    """What a probe learns from: one row per sample.

    Attributes:
        run: the run.
        label: the label's name, one of `LABELS`.
        y: the label, `[samples]`.
        groups: the problem of each sample, numbered from 0, `[samples]`.
        covariates: what a baseline may use instead of activations, by name, each `[samples]`.
        keys: stored keys that every sample has.
        left_out: samples of the run that are not here: they failed, or no activations were kept.
        session: the session named instead of the run's own, None for those.
        sources: where the rows are.
    """

    run: Run
    label: str
    y: Bool[np.ndarray, "samples"]
    groups: Int[np.ndarray, "samples"]
    covariates: dict[str, Float[np.ndarray, "samples"]]
    keys: tuple[str, ...]
    left_out: int
    session: str | None
    sources: tuple[Source, ...]

    @classmethod
    def open(cls, run: str | Path, label: str = "correct", session: str | Path | None = None) -> "ProbeDataset":
        """Join a run's samples to their activations.

        Args:
            run: the run directory.
            label: the name of the label, one of `LABELS`.
            session: a session that holds other activations of the run's answers; the run's own if None.

        Raises:
            RunError: if there is no run at that path.
            ProbeDataError: if the label is unknown, or there are no activations to be found.
            OneClassError: if the label has one class only, or one of its classes in a single problem.
        """
        if label not in LABELS:
            raise ProbeDataError(f"label: {label!r} is not known; allowed are {', '.join(LABELS)}")
        opened = Run.open(run)
        recorded = opened.samples()
        answered = [sample for sample in recorded if sample.error is None]
        try:
            samples, sources = _join(opened, answered) if session is None else _join_session(session, answered)
            if not samples:
                raise ProbeDataError(_nothing_to_join(opened, len(recorded), session))
            keys = _common_keys(sources)
        except StoreError as error:
            where = session or f"the activations of {opened.path}"
            raise ProbeDataError(f"{where} cannot be read: {error}") from error
        y = np.array([LABELS[label](sample) for sample in samples])
        groups = np.unique([sample.problem_id for sample in samples], return_inverse=True)[1]
        _check_classes(y, groups, label)
        if not keys:
            raise ProbeDataError(
                f"no key was stored for every sample of {opened.path}: its captures have none in common"
            )
        return cls(
            run=opened,
            label=label,
            y=y,
            groups=groups,
            covariates={
                "prompt_length": np.array([float(sample.prompt_tokens) for sample in samples]),
                "response_length": np.array([float(sample.completion_tokens) for sample in samples]),
            },
            keys=keys,
            left_out=len(recorded) - len(samples),
            session=sources[0].session.name if session is not None else None,
            sources=sources,
        )

    @property
    def n_problems(self) -> int:
        """How many problems the samples are of."""
        return int(self.groups.max()) + 1

    def hook_points(self) -> dict[str, list[str]]:
        """Return the keys by hook point, each list in order of layer; a model-wide hook point has one key."""
        keys = defaultdict(list)
        for key in sorted(self.keys, key=lambda key: split_key(key)[1] or 0):
            keys[split_key(key)[0]].append(key)
        return dict(keys)

    def features(self, key: str, positions: str = "last_prompt") -> Float[Tensor, "samples d_model"]:
        """Read one key, one row per sample, in float32.

        Args:
            key: one of `keys`.
            positions: which row, one of `POSITIONS`.

        Raises:
            ProbeDataError: if the key or the policy is not allowed, the rows were not stored, or some are not finite.
        """
        if positions not in POSITIONS:
            raise ProbeDataError(
                f"positions: {positions!r} is not one row per sample; allowed are {', '.join(POSITIONS)}"
            )
        if key not in self.keys:
            raise ProbeDataError(f"key: {key!r} was not stored for every sample; allowed are {', '.join(self.keys)}")
        parts = []
        for source in self.sources:
            rows = source.session.activations(key, where=source.rollouts, positions=positions)
            try:
                parts.append(rows.stack().float().flatten(1))
            except StoreError as error:
                raise ProbeDataError(
                    f"positions: {positions!r} cannot be read from {source.session.path}: {error}"
                ) from error
        order = np.argsort(np.concatenate([source.samples for source in self.sources]))
        values = torch.cat(parts)[torch.from_numpy(order)]
        broken = int((~values.isfinite().all(1)).sum())
        if broken:
            raise ProbeDataError(
                f"{key} has values that are not finite in {broken} of {len(values)} samples; store a wider dtype"
            )
        return values


def _check_classes(y: Bool[np.ndarray, "samples"], groups: Int[np.ndarray, "samples"], label: str) -> None:
    """Refuse a label that no grouped split can learn and test."""
    for value in (True, False):
        problems = len(np.unique(groups[y == value]))
        if problems == 0:
            raise OneClassError(
                f"all {len(y)} samples have {label} = {not value}: a probe needs both classes; "
                "evaluate more problems, or easier or harder ones"
            )
        if problems == 1:
            raise OneClassError(
                f"only one problem has samples with {label} = {value}: a probe is tested on problems it has not seen, "
                "so each class needs at least two; evaluate more problems"
            )


def _nothing_to_join(run: Run, recorded: int, session: str | Path | None) -> str:
    if session is None:
        return (
            f"{run.path} has no activations: none of its {recorded} samples names a rollout; "
            "evaluate again with activations kept"
        )
    return (
        f"{session} holds none of the {recorded} samples of {run.path}: no rollout in it has the key of one; "
        f"`roentgen capture {run.path}` makes a session that does"
    )


def _join(run: Run, answered: list[Sample]) -> tuple[list[Sample], tuple[Source, ...]]:
    """Find the samples that kept activations, and each one's row of the store's index."""
    samples = [sample for sample in answered if sample.rollouts]
    refs = [min(sample.rollouts, key=lambda ref: ref.turn) for sample in samples]
    by_session = defaultdict(list)
    for number, ref in enumerate(refs):
        by_session[run.session_uri(ref)].append(number)

    sources = []
    for uri, numbers in by_session.items():
        session = Session.open(uri)
        # Not only the unique ones: the record names the rollout that was acknowledged, and a later retry is not it.
        index = session.rollouts(unique=False)[_ROW_COLUMNS].set_index("rollout_id", drop=False)
        wanted = [refs[number].rollout_id for number in numbers]
        missing = [rollout_id for rollout_id in wanted if rollout_id not in index.index]
        if missing:
            raise ProbeDataError(
                f"{session.path} lacks {len(missing)} of the {len(wanted)} rollouts that {run.record_path} names "
                f"(the first is {missing[0]}); was the session deleted or made anew?"
            )
        sources.append(Source(session, index.loc[wanted], np.array(numbers)))
    return samples, tuple(sources)


def _join_session(uri: str | Path, answered: list[Sample]) -> tuple[list[Sample], tuple[Source, ...]]:
    """Find the samples that a session has a rollout of, and its row; a sample's first turn counts."""
    session = Session.open(uri)
    frame = session.rollouts()
    frame = frame[frame["config_hash"].notna()].sort_values("turn", ascending=False)
    place = {
        (config_hash, problem_id, int(epoch)): number
        for number, (config_hash, problem_id, epoch) in enumerate(
            zip(frame["config_hash"], frame["problem_id"], frame["epoch"], strict=True)
        )
    }
    samples = [sample for sample in answered if sample.identity in place]
    rows = frame.iloc[[place[sample.identity] for sample in samples]][_ROW_COLUMNS]
    return samples, (Source(session, rows, np.arange(len(samples))),)


def _common_keys(sources: tuple[Source, ...]) -> tuple[str, ...]:
    """Return the keys that every rollout has, in stored order."""
    specs = [source.session.spec(shard) for source in sources for shard in source.rollouts["shard"].unique()]
    return tuple(key for key in specs[0].keys if all(key in spec.keys for spec in specs))
