"""Fits and evaluates a probe for every candidate of some data: a stored key at a position.

Activations are read one hook point and position at a time, all its layers together: that is what the fit wants, and all that is
in memory. The metrics beside a saved probe are of probes that had not seen the problems they were tested on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import roentgen
from probes import baselines
from probes.dataset import ProbeDataset
from probes.errors import ProbeDataError
from probes.evaluation import Evaluation, all_estimates, evaluate, main_estimate, nested_best
from probes.folds import Fold, nested_folds, shuffle_labels
from probes.intervals import bootstrap_weights
from probes.kinds import DEFAULT_KINDS, KINDS, Kind
from probes.kinds.linear import LinearProbes
from probes.labels import Target
from probes.positions import check_positions
from probes.report import Best, Estimate, KeyResult, ProbeReport
from probes.sources import Where
from roentgen.contract import split_key
from roentgen.saved_probes import ProbeCard, SavedProbe

MainMeasure = Callable[[Float[np.ndarray, "rows outputs"]], Estimate]
FullMeasure = Callable[[Float[np.ndarray, "rows outputs"], Float[np.ndarray, "rows outputs"]], dict[str, Estimate]]


@dataclass(frozen=True)
class Candidate:
    """A stored key at a position."""

    key: str
    positions: str

    @property
    def name(self) -> str:
        """What its saved probe is called."""
        return f"{self.key}@{self.positions}"


@dataclass(frozen=True)
class Trained:
    """What a training gives.

    Attributes:
        report: what it found.
        scores: of the best candidate, comparable across folds, `[samples, outputs]`.
        raw: the same as the probes gave them.
        probes: one per candidate, fitted on all samples; none for kinds that are no direction.
    """

    report: ProbeReport
    scores: Float[np.ndarray, "samples outputs"]
    raw: Float[np.ndarray, "samples outputs"]
    probes: list[SavedProbe]


def choose_kind(target: Target, name: str | None) -> Kind:
    """Return the kind of probe to fit.

    Raises:
        ProbeDataError: if there is no such kind, or it does not read such a target.
    """
    fitting = [kind.name for kind in KINDS.values() if kind.target == target.kind]
    kind = KINDS.get(name or DEFAULT_KINDS[target.kind])
    if kind is None or kind.target != target.kind:
        raise ProbeDataError(
            f"kind: {name!r} does not read {target.name!r}, which is {target.kind}; allowed are {', '.join(fitting)}"
        )
    return kind


def fit_and_evaluate(
    data: ProbeDataset,
    positions: Sequence[str] = ("last_prompt",),
    kind: str | None = None,
    declared: str | None = None,
    seed: int = 0,
    session: Where | None = None,
    device: str = "cpu",
) -> Trained:
    """Train and evaluate a probe per candidate.

    Args:
        data: what to learn from.
        positions: where to read.
        kind: of probe; the usual one of the target if None.
        declared: the name of a candidate chosen beforehand, to be reported beside the best.
        seed: of folds, bootstrap, shuffles and random directions; the same seed gives the same report.
        session: the session that `data` was read from, if not the run's own.
        device: where to fit.

    Raises:
        ProbeDataError: if something asked for is not there.
        OneClassError: if the label does not vary enough.
    """
    chosen = choose_kind(data.target, kind)
    for name in positions:
        if (check_positions(name) == "tokens") != chosen.tokens:
            wanted = "tokens" if chosen.tokens else "one row per sample"
            raise ProbeDataError(f"positions: the kind {chosen.name!r} reads {wanted}, not {name!r}")
    folds = nested_folds(data.target, data.groups, seed)
    shuffled = shuffle_labels(data.target, data.groups, folds, seed)

    candidates: list[Candidate] = []
    found, by_chance, at_random = [], [], []
    weights: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for place in positions:
        for keys in data.hook_points().values():
            X = torch.stack([data.features(key, place) for key in keys]).to(device)
            candidates += [Candidate(key, place) for key in keys]
            told, shuffled_told = evaluate(X, (data.target, shuffled), data.groups, folds, chosen)
            found.append(told)
            by_chance.append(shuffled_told)
            if not chosen.tokens:
                projected = baselines.random_projection(X, seed)
                at_random += evaluate(projected, (data.target,), data.groups, folds, chosen)
                weights += _refit(X, data, chosen, found[-1].strength)

    draws = bootstrap_weights(data.groups, seed)

    def main(scores: Float[np.ndarray, "rows outputs"], target: Target = data.target) -> Estimate:
        return main_estimate(scores, target, data.groups, draws, within=chosen.within)

    def full(scores: Float[np.ndarray, "rows outputs"], raw: Float[np.ndarray, "rows outputs"]) -> dict[str, Estimate]:
        return all_estimates(scores, raw, data.target, data.groups, draws, within=chosen.within)

    everything = Evaluation.concatenate(found)
    scores, raw, picked = nested_best(everything, folds)
    best = Best(main(scores), tuple(candidates[number].name for number in picked), full(scores, raw))
    results = tuple(
        KeyResult(c.key, *split_key(c.key), c.positions, main(everything.scores[n]), float(everything.strength[n]))
        for n, c in enumerate(candidates)
    )
    chance = main(nested_best(Evaluation.concatenate(by_chance), folds)[0], shuffled)
    compared = _simpler(data, folds, main) | {"shuffled_labels": chance}
    if at_random:
        compared["random_direction"] = main(nested_best(Evaluation.concatenate(at_random), folds)[0])
    compared["first_layer"] = min(results, key=lambda r: (r.hook_point != "embed", r.layer or 0)).estimate
    named = None
    if declared is not None:
        number = _find(candidates, declared)
        own = everything.scores[number], everything.raw[number]
        named = Best(main(own[0]), (declared,), full(*own))
    report = ProbeReport(
        sources=data.names,
        label=data.target.name,
        target=data.target.kind,
        classes=data.target.classes,
        kind=chosen.name,
        positions=tuple(positions),
        seed=seed,
        roentgen=roentgen.__version__,
        data_hash=data.data_hash,
        n_samples=len(data.groups),
        n_problems=data.n_problems,
        n_left_out=data.left_out,
        n_folds=len(folds),
        n_rarest=len(data.groups)
        if data.target.kind == "real"
        else int(np.bincount(data.target.values.astype(int)).min()),
        n_true=int(data.target.values.sum()) if data.target.kind == "binary" else None,
        results=results,
        best=best,
        declared=named,
        baselines=compared,
        uncut=_uncut(data, scores, within=chosen.within, seed=seed),
        session=None if session is None else data.sources[0].session.name,
        within=chosen.within,
    )
    probes = [
        SavedProbe(*parts, card=_card(data, report, result, everything, n, full))
        for n, (result, parts) in enumerate(zip(results, weights, strict=False))
    ]
    return Trained(report, scores, raw, probes)


def _refit(
    X: Float[Tensor, "models rows d"], data: ProbeDataset, kind: Kind, strength: Float[np.ndarray, "models"]
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Fit each model on all rows at its own strength."""
    y, groups = torch.from_numpy(data.target.values).to(X.device), torch.from_numpy(data.groups).to(X.device)
    parts = []
    for number, value in enumerate(strength):
        strengths = torch.tensor([value], dtype=torch.float64, device=X.device)
        probes = kind.fit(X[number : number + 1], y, groups, strengths)
        assert isinstance(probes, LinearProbes)
        parts.append((probes.weight[0, 0], probes.bias[0, 0], probes.mean[0], probes.scale[0]))
    return parts


def _simpler(data: ProbeDataset, folds: Sequence[Fold], main: MainMeasure) -> dict[str, Estimate]:
    """Evaluate the baselines that need no activations with the usual kind of the target."""
    kind = KINDS[DEFAULT_KINDS[data.target.kind]]
    features = baselines.covariates(data)
    return {
        name: main(evaluate(X, (data.target,), data.groups, folds, kind)[0].scores[0]) for name, X in features.items()
    }


def _uncut(
    data: ProbeDataset, scores: Float[np.ndarray, "samples outputs"], *, within: bool, seed: int
) -> Estimate | None:
    """Estimate the best candidate on samples that were not truncated, None where that says nothing new or cannot be said."""
    kept = baselines.truncated(data) == 0
    target = Target(data.target.name, data.target.kind, data.target.values[kept], data.target.classes)
    if kept.all() or len(np.unique(target.values)) < max(2, len(target.classes)):
        return None
    groups = np.unique(data.groups[kept], return_inverse=True)[1]
    return main_estimate(scores[kept], target, groups, bootstrap_weights(groups, seed), within=within)


def _find(candidates: list[Candidate], name: str) -> int:
    names = [candidate.name for candidate in candidates]
    if name not in names:
        raise ProbeDataError(f"declared: {name!r} is not a candidate; allowed are {', '.join(names)}")
    return names.index(name)


def _card(
    data: ProbeDataset, report: ProbeReport, result: KeyResult, everything: Evaluation, number: int, full: FullMeasure
) -> ProbeCard:
    spec = data.sources[0].session.spec(str(data.sources[0].rollouts["shard"].iloc[0]))
    metrics = full(everything.scores[number], everything.raw[number])
    return ProbeCard(
        model=spec.model,
        revision=spec.revision,
        key=result.key,
        positions=result.positions,
        kind=report.kind,
        label=report.label,
        target=report.target,
        classes=report.classes,
        strength=result.strength,
        folds=report.n_folds,
        metrics={name: estimate.to_json() for name, estimate in metrics.items()},
        data_hash=report.data_hash,
        seed=report.seed,
        roentgen=report.roentgen,
    )
