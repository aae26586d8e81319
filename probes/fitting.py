"""Fits and evaluates a probe for every candidate of some data: a stored key at a position.

Activations are read one hook point and position at a time, all its layers together: that is what the fit wants, and all that is
in memory. The metrics beside a saved probe are of probes that had not seen the problems they were tested on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probes import baselines
from probes.bootstrap import bootstrap_weights
from probes.calibration import Calibration
from probes.choosing import Fit, choose_kind
from probes.controls import Controls, Scores, without
from probes.dataset import ProbeDataset
from probes.errors import ProbeDataError
from probes.evaluation import Evaluation, evaluate, nested_best
from probes.folds import Fold, mixed, nested_folds, shuffle_labels
from probes.kinds import DEFAULT_KINDS, KINDS, Kind
from probes.kinds.linear import LinearProbes
from probes.positions import check_positions
from probes.report import Best, Candidate, Estimate, KeyResult, ProbeReport
from probes.sources import SourcePath
from roentgen.contract import execution_order
from roentgen.linear_probe import ProbeCard, SavedProbe, ScoreUnit
from roentgen.version import __version__


@dataclass(frozen=True)
class Trained:
    """What a training gives."""

    report: ProbeReport
    """What it found."""
    scores: Float[np.ndarray, "samples outputs"]
    """Of the best candidate, comparable across folds, `[samples, outputs]`."""
    raw: Float[np.ndarray, "samples outputs"]
    """The same as log-odds, logits or values."""
    probes: list[SavedProbe]
    """One per candidate, fitted on all samples; none for kinds that are no direction."""
    calibrations: tuple[tuple[Calibration, ...], ...]
    """Per candidate, what makes log-odds of the scores of each outer fold's probe."""


def check_reads(kind: Kind, positions: Sequence[str]) -> None:
    """Refuse positions that a kind of probe does not read.

    Raises:
        ProbeDataError: if there are some, or what is named is no position.
    """
    for name in positions:
        if (check_positions(name) == "tokens") != kind.tokens:
            wanted = "tokens" if kind.tokens else "one row per sample"
            raise ProbeDataError(f"positions: the kind {kind.name!r} reads {wanted}, not {name!r}")


def check_seed(seed: int) -> None:
    """Refuse a seed that no generator takes.

    Raises:
        ProbeDataError: if it is one.
    """
    if not 0 <= seed < 2**32:
        raise ProbeDataError(f"seed: {seed} is out of range; allowed are 0 to {2**32 - 1}")


def fit_and_evaluate(
    data: ProbeDataset,
    positions: Sequence[str] = ("last_prompt",),
    kind: str | Kind | Fit | None = None,
    declared: str | None = None,
    seed: int = 0,
    session: SourcePath | None = None,
    device: str = "cpu",
) -> Trained:
    """Train and evaluate a probe per candidate.

    Args:
        data: what to learn from.
        positions: where to read.
        kind: of probe, by a name, a reference, or itself; the usual one of the target if None.
        declared: the name of a candidate chosen beforehand, to be reported beside the best.
        seed: of folds, bootstrap, shuffles and random directions; the same seed gives the same report.
        session: the session that `data` was read from, if not the run's own.
        device: where to fit.

    Raises:
        ProbeDataError: if something asked for is not there.
        OneClassError: if the label does not vary enough.
    """
    chosen = choose_kind(data.target, kind)
    check_reads(chosen, positions)
    contrasts = mixed(data.target.values, data.problems) if chosen.within else None
    folds = nested_folds(data.target, data.groups, seed, contrasts)
    shuffled = shuffle_labels(data.target, data.problems, folds, seed, inside=chosen.within)

    candidates: list[Candidate] = []
    found, by_chance, at_random = [], [], []
    weights: list[LinearProbes] = []
    for place in positions:
        for keys in data.hook_points().values():
            X = torch.stack([data.features(key, place) for key in keys]).to(device)
            candidates += [Candidate(key, place) for key in keys]
            evaluation, shuffled_evaluation = evaluate(X, (data.target, shuffled), data.problems, folds, chosen)
            found.append(evaluation)
            by_chance.append(shuffled_evaluation)
            if not chosen.tokens:
                projected = baselines.random_projection(X, seed)
                at_random += evaluate(projected, (data.target,), data.problems, folds, chosen)
                weights += _refit(X, data, chosen, evaluation)

    controls = Controls(data, bootstrap_weights(data.groups, seed), chosen.within)
    everything = Evaluation.concatenate(found)
    scores, raw, picked = nested_best(everything, folds)
    best = Best(controls.main(scores), tuple(candidates[number].name for number in picked), controls.every(scores, raw))
    results = tuple(
        KeyResult(c.key, c.positions, controls.main(everything.scores[n]), float(everything.strength[n]))
        for n, c in enumerate(candidates)
    )
    simpler = _simpler(data, folds)
    if at_random:
        simpler["random_direction"] = nested_best(Evaluation.concatenate(at_random), folds)[:2]
    first = min(range(len(candidates)), key=lambda n: (execution_order(candidates[n].key), n))
    simpler["first_layer"] = everything.scores[first], everything.raw[first]
    compared = {name: controls.main(own) for name, (own, _) in simpler.items()}
    compared["shuffled_labels"] = controls.main(nested_best(Evaluation.concatenate(by_chance), folds)[0], shuffled)
    against = {name: controls.against(scores, own) for name, (own, _) in simpler.items() if name != "prevalence"}
    if set(picked) == {first}:  # the best is this very probe
        del against["first_layer"]
    forecast, gains = controls.forecast(raw, simpler["prevalence"][1])
    named = None
    if declared is not None:
        number = _find(candidates, declared)
        own = everything.scores[number], everything.raw[number]
        named = Best(controls.main(own[0]), (declared,), controls.every(*own))
    report = ProbeReport(
        sources=data.names,
        label=data.target.name,
        target=data.target.kind,
        classes=data.target.classes,
        kind=chosen.name,
        kind_hash=chosen.digest,
        positions=tuple(positions),
        seed=seed,
        roentgen=__version__,
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
        against=against,
        forecast=forecast,
        gains=gains,
        without=without(data, scores, within=chosen.within, seed=seed),
        n_groups=data.n_groups,
        session=None if session is None else data.sources[0].session.name,
        within=chosen.within,
    )
    probes = [
        SavedProbe(
            part.weight[0, 0], part.bias[0, 0], part.mean[0], part.scale[0],
            card=_card(data, chosen, report, result, controls.every(everything.scores[n], everything.raw[n])),
        )
        for n, (result, part) in enumerate(zip(results, weights, strict=False))
    ]  # fmt: skip
    calibrations = tuple(everything.calibration(n)[1:] for n in range(len(candidates)))
    return Trained(report, scores, raw, probes, calibrations)


def _refit(
    X: Float[Tensor, "models rows d"], data: ProbeDataset, kind: Kind, evaluation: Evaluation
) -> list[LinearProbes]:
    """Fit each model on all rows at its own strength, and calibrate it by the scores of the outer folds."""
    y, problems = (torch.from_numpy(part).to(X.device) for part in (data.target.values, data.problems))
    fitted = []
    for number, value in enumerate(evaluation.strength):
        strengths = torch.tensor([value], dtype=torch.float64, device=X.device)
        probes = kind.fit(X[number : number + 1], y, problems, strengths)
        if not isinstance(probes, LinearProbes):  # a user's kind that is no direction: nothing is saved
            return []
        fitted.append(evaluation.calibration(number)[0].probes(probes))
    return fitted


def _simpler(data: ProbeDataset, folds: Sequence[Fold]) -> dict[str, tuple[Scores, Scores]]:
    """Return the scores, comparable ones and raw, that the baselines without activations get with the usual kind of target."""
    kind = KINDS[DEFAULT_KINDS[data.target.kind]]
    found = {}
    for name, X in baselines.covariates(data).items():
        (evaluation,) = evaluate(X, (data.target,), data.problems, folds, kind)
        found[name] = evaluation.scores[0], evaluation.raw[0]
    return found


def _find(candidates: list[Candidate], name: str) -> int:
    names = [candidate.name for candidate in candidates]
    if name not in names:
        raise ProbeDataError(f"declared: {name!r} is not a candidate; allowed are {', '.join(names)}")
    return names.index(name)


def _card(
    data: ProbeDataset, kind: Kind, report: ProbeReport, result: KeyResult, metrics: dict[str, Estimate]
) -> ProbeCard:
    spec = data.sources[0].session.spec(str(data.sources[0].rollouts["shard"].iloc[0]))
    return ProbeCard(
        model=spec.model,
        revision=spec.revision,
        key=result.key,
        positions=result.positions,
        kind=report.kind,
        label=report.label,
        target=report.target,
        classes=report.classes,
        unit=_unit(kind),
        strength=result.strength,
        folds=report.n_folds,
        metrics={name: estimate.to_json() for name, estimate in metrics.items()},
        data_hash=report.data_hash,
        seed=report.seed,
        roentgen=report.roentgen,
    )


def _unit(kind: Kind) -> ScoreUnit:
    """Return what the scores of a saved probe are."""
    if not kind.probabilistic:
        return "value" if kind.target == "real" else "score"
    return "logits" if kind.target == "classes" else "log_odds"
