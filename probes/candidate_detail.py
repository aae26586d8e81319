"""Details of one candidate: every sample's score, and the scores along traces, token by token.

Everything is out of fold: a sample, and each of its tokens, is scored by the probe of the fold that had not seen its
problem. Reading whole traces is much more expensive than reading one row each, so only a limited number is read, half of
them of each class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.calibration import Calibration
from probes.dataset import ProbeDataset
from probes.folds import Fold
from probes.kinds import Kind
from probes.kinds.linear import LinearProbes
from probes.labels import Example
from probes.report import Candidate
from roentgen.store import RolloutRows
from roentgen.tokenized_text import token_texts

MOST_TRACES = 200


@dataclass(frozen=True)
class Trace:
    """A rollout scored token by token."""

    example: Example
    """The example."""
    value: bool
    """Its label."""
    n_prompt: int
    """Number of prompt tokens."""
    tokens: tuple[str, ...]
    """The text of every token, including the last one, which has no score."""
    position: Int[np.ndarray, "rows"]
    """Positions of the scores, `[rows]`."""
    scores: Float[np.ndarray, "rows"]
    """Log-odds at these positions, `[rows]`."""
    group: int
    """Number of its problem."""

    def along(self, fractions: Float[np.ndarray, "points"]) -> Float[np.ndarray, "points"]:
        """Return the scores at fractions of the trace: 0 is the last prompt token, 1 the last row."""
        own = self.scores[self.position >= self.n_prompt - 1]
        scores: np.ndarray = np.interp(fractions, np.linspace(0, 1, len(own)), own)
        return scores


@dataclass(frozen=True)
class CandidateDetail:
    """A candidate's out-of-fold scores of a binary label."""

    name: str
    """The candidate's name."""
    scores: Float[np.ndarray, "samples"]
    """Log-odds at the position of training, `[samples]`."""
    across: Float[np.ndarray, "samples"]
    """The largest variation of the rows that the probe does not see: their first principal coordinate after removal of the
    component along the probe's direction, `[samples]`."""
    traces: tuple[Trace, ...]
    """The traces shown; empty if not all rows were stored."""


def score_candidate(
    data: ProbeDataset,
    key: str,
    positions: str,
    kind: Kind,
    strength: float,
    folds: Sequence[Fold],
    seed: int = 0,
    calibrations: Sequence[Calibration] | None = None,
) -> CandidateDetail:
    """Score every sample, and a limited number of traces.

    Args:
        data: data with a binary label.
        key: the candidate's key.
        positions: the candidate's position.
        kind: a linear kind of probe.
        strength: strength of its penalty.
        folds: the outer folds.
        seed: seed of the choice of traces.
        calibrations: the calibration of each fold's probe; None leaves scores uncalibrated.
    """
    X, y = data.features(key, positions).double(), torch.from_numpy(data.target.values)
    groups, strengths = torch.from_numpy(data.problems), torch.tensor([strength], dtype=torch.float64)
    probe_of = np.zeros(len(y), dtype=int)
    probes: list[LinearProbes] = []
    scores = np.zeros(len(y))
    for number, fold in enumerate(folds):
        fitted = kind.fit(X[None, fold.train], y[fold.train], groups[fold.train], strengths)
        assert isinstance(fitted, LinearProbes)
        fitted = fitted if calibrations is None else calibrations[number].probes(fitted)
        probes.append(fitted)
        probe_of[fold.test] = number
        scores[fold.test] = _scores(fitted, X[fold.test])
    whole = kind.fit(X[None], y, groups, strengths)
    assert isinstance(whole, LinearProbes)
    chosen = _choose(data.target.values, seed) if _all_stored(data) else np.zeros(0, dtype=int)
    traces: list[Trace] = []
    start = 0
    for source in data.sources:
        own = chosen[(chosen >= start) & (chosen < start + len(source.examples))]
        rollouts = source.rollouts.iloc[own - start]
        items = source.session.activations(key, where=rollouts) if len(own) else []
        for number, item, (_, row) in zip(own, items, rollouts.iterrows(), strict=True):
            traces.append(_trace(data, int(number), row, item, probes[probe_of[number]]))
        start += len(source.examples)
    return CandidateDetail(Candidate(key, positions).name, scores, _across(X, whole), tuple(traces))


def _scores(probe: LinearProbes, X: Float[Tensor, "rows d"]) -> Float[np.ndarray, "rows"]:
    return probe.scores(X[None])[0, 0, 0].numpy()


def _across(X: Float[Tensor, "rows d"], probe: LinearProbes) -> Float[np.ndarray, "rows"]:
    Z = (X - probe.mean[0]) / probe.scale[0]
    direction = torch.nn.functional.normalize(probe.weight[0, 0, 0], dim=0)
    rest = Z - (Z @ direction)[:, None] * direction
    rest -= rest.mean(0)
    return (rest @ torch.pca_lowrank(rest, q=1, center=False)[2])[:, 0].numpy()


def _all_stored(data: ProbeDataset) -> bool:
    specs = [source.session.spec(str(shard)) for source in data.sources for shard in source.rollouts["shard"].unique()]
    return all(spec.positions == "all" for spec in specs)


def _choose(values: np.ndarray, seed: int) -> Int[np.ndarray, "chosen"]:
    """Return which samples' traces to read: equally many of each class, as far as possible."""
    generator = np.random.default_rng(seed)
    own = [generator.permutation(np.flatnonzero(values == value))[: MOST_TRACES // 2] for value in (True, False)]
    return np.sort(np.concatenate(own))


def _trace(data: ProbeDataset, number: int, row: pd.Series, item: RolloutRows, probe: LinearProbes) -> Trace:
    tokens = tuple(token_texts(str(row["text"]), row["token_offsets"]))
    scores = _scores(probe, item.values.double().flatten(1))
    value, group = bool(data.target.values[number]), int(data.groups[number])
    return Trace(data.examples[number], value, int(row["n_prompt"]), tokens, item.position, scores, group)
