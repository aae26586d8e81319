"""Datasets for probes: examples of runs and sessions, joined to their stored rows (X, y and groups).

`ProbeDataset.open` joins any number of runs and sessions (`sources`) to a label (`labels`). Labels, groups and lengths are
small and are read at once; activations are not, so `features` reads one key at one position on demand.

Attempts at one problem are not independent, not even across runs, so splits must keep them together. A problem is a
question, not an id, and problems made from one template count as one for splits and draws (`roentgen.runs.questions`).
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes import positions as places
from probes.errors import OneClassError, ProbeDataError
from probes.labels import Example, Target, read_label
from probes.sources import SessionExamples, SourcePath, open_source
from roentgen.contract import execution_order, split_key
from roentgen.runs import same_question, same_template
from roentgen.store import StoreError


@dataclass(frozen=True)
class ProbeDataset:
    """The training data of a probe: one row per example."""

    names: tuple[str, ...]
    """Names of the runs and sessions."""
    target: Target
    """The requested label."""
    groups: Int[np.ndarray, "samples"]
    """Group of each example, from 0, which splits and draws keep together: its problem, or its template if it has one,
    `[samples]`."""
    problems: Int[np.ndarray, "samples"]
    """The problem of each example, numbered from 0, `[samples]`."""
    origin: Int[np.ndarray, "samples"]
    """Run or session of each example, as an index into `names`, `[samples]`."""
    examples: tuple[Example, ...]
    """The examples, grouped by session."""
    keys: tuple[str, ...]
    """Stored keys that every example has."""
    left_out: int
    """Number of samples excluded because they failed, have no activations, or lack the label."""
    sources: tuple[SessionExamples, ...]
    """The sessions' parts of the dataset."""

    @classmethod
    def open(
        cls,
        sources: SourcePath | Sequence[SourcePath],
        label: str = "correct",
        *,
        session: SourcePath | None = None,
        table: SourcePath | None = None,
    ) -> "ProbeDataset":
        """Join runs and sessions to a label.

        Args:
            sources: run directories, sessions, or a single one.
            label: see `labels.read_label`; the label `source` is the name of an example's source.
            session: a session with other activations of the runs' answers; the runs' own if None.
            table: a CSV or parquet file with labels.

        Raises:
            RunError: if a run is damaged.
            ProbeDataError: if the label is unknown or there are no activations.
            OneClassError: if the label does not vary enough.
        """
        where = [sources] if isinstance(sources, str | Path) else list(sources)
        joined: list[SessionExamples] = []
        origin: list[int] = []
        left_out = 0
        for number, place in enumerate(where):
            try:
                parts, missing = open_source(place, session)
                joined += parts
                left_out += missing
                origin += [number] * sum(len(part.examples) for part in parts)
            except StoreError as error:
                raise ProbeDataError(f"the activations of {place} cannot be read: {error}") from error
        examples = [example for part in joined for example in part.examples]
        names = tuple(Path(str(place)).name for place in where)
        values = [names[n] for n in origin] if label == "source" else read_label(label, examples, table)
        kept = np.array([value is not None for value in values], dtype=bool)
        if not kept.any():
            raise ProbeDataError(f"label: none of the {len(examples)} examples has a value of {label!r}")
        joined = _keep(joined, kept)
        examples = [example for part in joined for example in part.examples]
        target = Target.of(label, [value for value in values if value is not None])
        if not np.isfinite(target.values).all():
            worst = int(np.flatnonzero(~np.isfinite(target.values))[0])
            found = f"{examples[worst].problem} has {target.values[worst]}"
            raise ProbeDataError(f"label: {label!r} must be a finite number; {found}")
        posed = [example.posed for example in examples]
        groups, problems = np.array(same_template(posed)), np.array(same_question(posed))
        _check_varies(target, groups)
        keys = _common_keys(joined)
        if not keys:
            raise ProbeDataError(f"no key was stored for every example of {', '.join(names)}")
        return cls(
            names, target, groups, problems, np.array(origin)[kept], tuple(examples), keys, left_out + int((~kept).sum()),
            tuple(joined),
        )  # fmt: skip

    @property
    def n_problems(self) -> int:
        """Number of problems."""
        return int(self.problems.max()) + 1

    @property
    def n_groups(self) -> int:
        """Number of groups, which is smaller if problems share templates."""
        return int(self.groups.max()) + 1

    @property
    def data_hash(self) -> str:
        """A hash of the examples and their labels: 16 hex digits."""
        digest = hashlib.sha256()
        for example, value in zip(self.examples, self.target.values.tolist(), strict=True):
            digest.update(f"{example.rollout_id} {value}\n".encode())
        return digest.hexdigest()[:16]

    def hook_points(self) -> dict[str, list[str]]:
        """Return the keys by hook point; hook points and layers are in the model's order of execution."""
        keys = defaultdict(list)
        for key in sorted(self.keys, key=execution_order):
            keys[split_key(key)[0]].append(key)
        return dict(keys)

    def features(
        self, key: str, positions: str = "last_prompt"
    ) -> Float[Tensor, "samples d"] | Float[Tensor, "samples tokens d"]:
        """Read one key in float32, one row per example (or, for `tokens`, all rows, padded with NaN).

        Args:
            key: one of `keys`.
            positions: the position, see `positions`.

        Raises:
            ProbeDataError: if the key or position is not allowed, or rows are missing or not finite.
        """
        places.check_positions(positions)
        if key not in self.keys:
            raise ProbeDataError(f"key: {key!r} was not stored for every sample; allowed are {', '.join(self.keys)}")
        parts = []
        for source in self.sources:
            values = places.read(source.session, source.rollouts, key, positions)
            if positions != "tokens":
                places.check_finite(values.isfinite().all(1).tolist(), key, source.session)
            parts.append(values)
        if positions == "tokens":
            longest = max(part.shape[1] for part in parts)
            parts = [torch.nn.functional.pad(p, (0, 0, 0, longest - p.shape[1]), value=torch.nan) for p in parts]
        return torch.cat(parts)

    def mean_logprob(self) -> Float[np.ndarray, "samples"] | None:
        """Return the mean log-probability of each example's generated tokens; None if it was not stored for all."""
        values = np.concatenate([_mean_logprob(source) for source in self.sources])
        return values if np.isfinite(values).all() else None


def _keep(sources: list[SessionExamples], kept: np.ndarray) -> list[SessionExamples]:
    """Remove the examples without a label."""
    found, start = [], 0
    for source in sources:
        own = kept[start : start + len(source.examples)]
        start += len(own)
        if own.any():
            examples = tuple(e for e, keep in zip(source.examples, own, strict=True) if keep)
            found.append(SessionExamples(source.session, source.rollouts[own], examples))
    return found


def _common_keys(sources: list[SessionExamples]) -> tuple[str, ...]:
    """Return the keys that all rollouts have, in stored order."""
    specs = [source.session.spec(shard) for source in sources for shard in source.rollouts["shard"].unique()]
    return tuple(key for key in specs[0].keys if all(key in spec.keys for spec in specs))


def _mean_logprob(source: SessionExamples) -> Float[np.ndarray, "rollouts"]:
    """Read the row column `logprob` of the shards; NaN if no generated row was stored."""
    found = np.full(len(source.rollouts), np.nan)
    for shard, rows in source.rollouts.reset_index(drop=True).groupby("shard"):
        try:
            values = source.session.shard(str(shard)).column("logprob")
        except StoreError as error:
            raise ProbeDataError(str(error)) from error
        for number, start, stop, final in zip(
            rows.index, rows["row_start"], rows["row_stop"], rows["final_logprob"], strict=True
        ):
            own = np.append(values[start:stop], final)
            found[number] = own[np.isfinite(own)].mean() if np.isfinite(own).any() else np.nan
    return found


def _check_varies(target: Target, groups: Int[np.ndarray, "samples"]) -> None:
    """Check that a label varies enough for a grouped split."""
    if target.kind == "real":
        if len(np.unique(target.values)) == 1:
            raise OneClassError(
                f"all {len(groups)} samples have {target.name} = {target.values[0]}: the label does not vary"
            )
        return
    classes = target.classes or (False, True)
    problems = [len(np.unique(groups[target.values == number])) for number in range(len(classes))]
    there = [shown for shown, count in zip(classes, problems, strict=True) if count]
    if len(there) == 1:
        raise OneClassError(
            f"all {len(groups)} samples have {target.name} = {there[0]}: a probe needs both classes; "
            "evaluate more problems, or easier or harder ones"
        )
    if min(problems) == 1:
        raise OneClassError(
            f"only one problem has samples with {target.name} = {classes[problems.index(1)]}: probes are tested on unseen "
            "problems, so each class needs at least two; evaluate more problems "
            "(the same question under several ids, and questions of one template, count as one problem)"
        )
