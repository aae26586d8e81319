"""The details of one sample of a run: conversation, verdicts, the location of its activations, and probe scores.

`find_sample` finds the sample by number, id or problem; `describe` adds data from the store and from the run's probes.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from probes.errors import ProbeDataError
from probes.positions import read
from roentgen.linear_probe import SavedProbe, SavedProbeError, load_probe
from roentgen.runs import Run, RunError, Sample
from roentgen.runs.stored import StoredRollouts, find_rollouts
from roentgen.store import Session, StoreError

_NUMBER = re.compile(r"_0*([0-9]+)(_e[0-9]+)?(_v-.*)?$")
"""A problem's number in a sample's name: `gsm8k_0007_e2_v-calm`."""


@dataclass(frozen=True)
class SelectedSample:
    """A sample, and the other samples with the same number or problem."""

    sample: Sample
    """The first of them by epoch and variant."""
    others: list[str]
    """The names of the others."""


@dataclass(frozen=True)
class StoredRows:
    """The location of one turn's rows."""

    turn: int
    """Number of the turn in the conversation."""
    rollout_id: str
    """The rollout in the session's index."""
    session: str
    """The session's address."""
    shard: str
    """The file in the session."""
    rows: tuple[int, int]
    """Start and end of its rows in every tensor of the file."""
    positions: list[int]
    """Token index of each row; -1 for a mean over several tokens."""
    shapes: dict[str, tuple[int, ...]]
    """Per stored key, `[rows, *shape]`."""
    dtype: str
    """Data type of the stored rows."""


@dataclass(frozen=True)
class ProbeScore:
    """The score of a run's best probe for a label."""

    label: str
    """The probe's label."""
    name: str
    """Name of the probe, such as `layers.12.resid_post@last_prompt`."""
    scores: list[float] = field(default_factory=list)
    """One score per output."""
    unit: str = "score"
    """Unit of the scores: log_odds, logits, value or score."""
    classes: tuple[str, ...] = ()
    """Names of the outputs, if there are several."""
    unread: str = ""
    """Why there is no score; else empty."""

    @property
    def probability(self) -> float | None:
        """Probability that the label is true, for a probe with log-odds; else None."""
        if self.unit != "log_odds" or len(self.scores) != 1:
            return None
        return 1 / (1 + math.exp(-max(min(self.scores[0], 700.0), -700.0)))


@dataclass(frozen=True)
class SampleDetails:
    """The details of a sample."""

    sample: Sample
    """The sample's record: messages, answers, token counts."""
    primary: str
    """The primary extractor."""
    verdicts: dict[str, str | None]
    """Each extractor's verdict: correct, wrong or no_answer; None for a failed sample."""
    stored: list[StoredRows]
    """The location of its rows, one entry per turn."""
    lost: str
    """Why stored rows cannot be located; else empty."""
    scores: list[ProbeScore]
    """Score of the best probe for each label with probes in the run."""
    others: list[str] = field(default_factory=list)
    """Names of the samples of other epochs and variants."""


def find_sample(run: Run, which: str | int, *, epoch: int | None = None, variant: str | None = None) -> SelectedSample:
    """Find a sample.

    Args:
        run: whose.
        which: its name (gsm8k_0007), its problem's id (gsm8k-test-0007), or its problem's number (7).
        epoch: which attempt; the first if None.
        variant: under which of the run's prefixes; the first if None.

    Raises:
        RunError: if there is none, saying what there is; or the record is damaged.
    """
    samples = run.read_samples().by_name()
    names, wanted = samples.names, str(which)
    if not names:
        raise RunError(f"{run.path} has no samples yet")
    places = [place for place, name in enumerate(names) if name == wanted]
    if not places and wanted.isascii() and wanted.isdigit():
        numbers = [_NUMBER.search(name) for name in names]
        places = [place for place, found in enumerate(numbers) if found and int(found[1]) == int(wanted)]
    if not places:
        places = [place for place, sample in enumerate(samples) if sample.problem_id == wanted]
    found = [samples[place] for place in places]
    kept = [s for s in found if epoch in (None, s.epoch) and variant in (None, s.variant)]
    if kept:
        return SelectedSample(kept[0], [sample.sample_id for sample in kept[1:]])
    if found:
        there = ", ".join(sample.sample_id for sample in found)
        asked = [f"epoch {epoch}"] * (epoch is not None) + [f"variant {variant!r}"] * (variant is not None)
        raise RunError(f"{wanted!r} has no sample of {' and '.join(asked)}; there are {there}")
    raise RunError(
        f"{run.path} has no sample {wanted!r}; name one of its {len(names)} samples ({names[0]} to {names[-1]}), a "
        "problem's id, or its number"
    )


def describe(run: Run, sample: Sample, others: list[str]) -> SampleDetails:
    """Return a sample's details; if the store or a probe cannot be read, the details say why.

    Args:
        run: whose.
        sample: which.
        others: names of other samples that it was asked for with (`SelectedSample.others`).

    Raises:
        SavedProbeError: if the run's probes are damaged.
    """
    parts: list[StoredRollouts] = []
    lost = ""
    try:
        parts = find_rollouts(run, [sample])
        stored = [_rows(part, number) for part in parts for number in range(len(part.turns))]
    except (RunError, StoreError) as error:
        stored, lost = [], str(error)
    scores = [_score(folder, parts, lost) for folder in run.probe_folders()]
    verdicts = {name: sample.verdict(name) for name in sample.answers}
    ordered = sorted(stored, key=lambda rows: rows.turn)
    return SampleDetails(sample, run.config.settings["extractor"], verdicts, ordered, lost, scores, others)


def _rows(part: StoredRollouts, number: int) -> StoredRows:
    row = part.rollouts.iloc[number]
    shard = part.session.shard(row["shard"])
    start, stop = int(row["row_start"]), int(row["row_stop"])
    shapes = {name: (stop - start, *shape) for name, _, shape in shard.layout if name in shard.spec.keys}
    return StoredRows(
        turn=part.turns[number],
        rollout_id=row["rollout_id"],
        session=part.session.uri,
        shard=row["shard"],
        rows=(start, stop),
        positions=shard.column("position")[start:stop].tolist(),
        shapes={key: shapes[key] for key in shard.spec.keys},
        dtype=shard.spec.dtype,
    )


def _score(folder: Path, parts: list[StoredRollouts], lost: str) -> ProbeScore:
    label = folder.name
    name = Counter(json.loads((folder / "results.json").read_text())["best"]["keys"]).most_common(1)[0][0]
    try:
        probe = load_probe(folder, name)
    except SavedProbeError as error:  # kinds that are not linear leave none
        return ProbeScore(label, name, unread=str(error))
    if not parts:
        return ProbeScore(label, name, unread=lost or "the sample has no rows")
    first = min(parts, key=lambda part: min(part.turns))
    rollout_id = first.rollouts["rollout_id"].iloc[first.turns.index(min(first.turns))]
    try:
        return _scored(label, probe, first.session, rollout_id)
    except (ProbeDataError, StoreError) as error:
        return ProbeScore(label, name, unread=str(error))


def _scored(label: str, probe: SavedProbe, session: Session, rollout_id: str) -> ProbeScore:
    card = probe.card
    where = session.rollouts(ids=[rollout_id])
    spec = session.spec(where["shard"].iloc[0])
    if (spec.model, spec.revision) != (card.model, card.revision):
        other = f"it reads {card.model} ({card.revision}), and the rows are of {spec.model} ({spec.revision})"
        return ProbeScore(label, card.name, unread=other)
    scores = probe.scores(read(session, where, card.key, card.positions))[0]
    return ProbeScore(label, card.name, scores.tolist(), card.unit, card.classes)
