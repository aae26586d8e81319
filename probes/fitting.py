"""Fits and evaluates a probe for every candidate: a stored key at a position.

    activations ─▶ nested cross-validation of all candidates ─▶ best candidate, chosen on inner folds
                └▶ the same on shuffled labels and on random directions ─▶ baselines
                └▶ refit on all samples, calibrated by the outer scores ─▶ saved probes

Activations are read one hook point and position at a time, with all its layers, which is what the fit needs and all that is
in memory. The metrics on the card of a saved probe come from probes that had not seen the problems they were tested on.
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
from probes.labels import Target
from probes.positions import check_positions
from probes.report import Best, Candidate, Estimate, KeyResult, ProbeReport
from probes.sources import SourcePath
from roentgen.contract import execution_order
from roentgen.linear_probe import ProbeCard, SavedProbe, ScoreUnit
from roentgen.version import __version__


@dataclass(frozen=True)
class Trained:
    """The result of a training."""

    report: ProbeReport
    """The report."""
    scores: Float[np.ndarray, "samples outputs"]
    """Scores of the best candidate, comparable across folds, `[samples, outputs]`."""
    raw: Float[np.ndarray, "samples outputs"]
    """The same scores as log-odds, logits or values."""
    probes: list[SavedProbe]
    """One probe per candidate, fitted on all samples; empty for kinds that are not linear."""
    calibrations: tuple[tuple[Calibration, ...], ...]
    """Per candidate, the calibration of each outer fold's probe."""


def check_reads(kind: Kind, positions: Sequence[str]) -> None:
    """Check that a kind of probe can read the positions.

    Raises:
        ProbeDataError: if it cannot, or a name is not a position.
    """
    for name in positions:
        if (check_positions(name) == "tokens") != kind.tokens:
            wanted = "tokens" if kind.tokens else "one row per sample"
            raise ProbeDataError(f"positions: the kind {kind.name!r} reads {wanted}, not {name!r}")


def check_seed(seed: int) -> None:
    """Check that random generators accept a seed.

    Raises:
        ProbeDataError: if they do not.
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
        data: the dataset.
        positions: the positions to read.
        kind: the kind of probe: a name, a reference, or an object; the target's default if None.
        declared: name of a candidate chosen beforehand, which is reported in addition to the best.
        seed: seed of folds, bootstrap, shuffles and random directions; the same seed gives the same report.
        session: the session that `data` was read from, if not the run's own.
        device: the device for fitting.

    Raises:
        ProbeDataError: if requested data does not exist.
        OneClassError: if the label does not vary enough.
    """
    chosen = choose_kind(data.target, kind)
    check_reads(chosen, positions)
    contrasts = mixed(data.target.values, data.problems) if chosen.within else None
    folds = nested_folds(data.target, data.groups, seed, contrasts)
    found = _evaluate_candidates(data, positions, chosen, folds, seed, device)
    evaluation = found.evaluation

    controls = Controls(data, bootstrap_weights(data.groups, seed), chosen.within)
    scores, raw, picked = nested_best(evaluation, folds)
    results = tuple(
        KeyResult(c.key, c.positions, controls.main(evaluation.scores[n]), float(evaluation.strength[n]))
        for n, c in enumerate(found.candidates)
    )
    first, simpler = found.first_layer(), _simpler(data, folds, found)
    compared = {name: controls.main(own) for name, (own, _) in simpler.items()}
    compared["shuffled_labels"] = controls.main(nested_best(found.by_chance, folds)[0], found.shuffled)
    against = {name: controls.against(scores, own) for name, (own, _) in simpler.items() if name != "prevalence"}
    if set(picked) == {first}:  # the best candidate is this baseline itself
        del against["first_layer"]
    forecast, gains = controls.forecast(raw, simpler["prevalence"][1])
    numeric, binary = data.target.kind == "real", data.target.kind == "binary"
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
        n_rarest=len(data.groups) if numeric else int(np.bincount(data.target.values.astype(int)).min()),
        n_true=int(data.target.values.sum()) if binary else None,
        results=results,
        best=Best(controls.main(scores), tuple(found.candidates[n].name for n in picked), controls.every(scores, raw)),
        declared=None if declared is None else _declared(found, declared, controls),
        baselines=compared,
        against=against,
        forecast=forecast,
        gains=gains,
        without=without(data, scores, within=chosen.within, seed=seed),
        n_groups=data.n_groups,
        session=None if session is None else data.sources[0].session.name,
        within=chosen.within,
    )
    calibrations = tuple(evaluation.calibration(n)[1:] for n in range(len(found.candidates)))
    return Trained(report, scores, raw, _saved_probes(data, chosen, report, found, controls), calibrations)


@dataclass(frozen=True)
class _Evaluated:
    """All candidates, evaluated on the same folds."""

    candidates: tuple[Candidate, ...]
    """The candidates."""
    evaluation: Evaluation
    """Their nested scores."""
    shuffled: Target
    """The shuffled labels."""
    by_chance: Evaluation
    """The candidates' nested scores on the shuffled labels."""
    at_random: Evaluation | None
    """Nested scores of one random direction per candidate; None for kinds that read all tokens."""
    refits: list[LinearProbes]
    """The candidates' probes, fitted on all samples; empty for kinds that are not linear."""

    def first_layer(self) -> int:
        """Return the candidate that is first in the model's order of execution."""
        return min(range(len(self.candidates)), key=lambda n: (execution_order(self.candidates[n].key), n))

    def find(self, name: str) -> int:
        """Return the number of a candidate.

        Raises:
            ProbeDataError: if no candidate has that name.
        """
        names = [candidate.name for candidate in self.candidates]
        if name not in names:
            raise ProbeDataError(f"declared: {name!r} is not a candidate; allowed are {', '.join(names)}")
        return names.index(name)


def _evaluate_candidates(
    data: ProbeDataset, positions: Sequence[str], kind: Kind, folds: Sequence[Fold], seed: int, device: str
) -> _Evaluated:
    """Evaluate all candidates, reading one hook point and position at a time."""
    shuffled = shuffle_labels(data.target, data.problems, folds, seed, inside=kind.within)
    candidates: list[Candidate] = []
    found, by_chance, at_random = [], [], []
    refits: list[LinearProbes] = []
    for position in positions:
        for keys in data.hook_points().values():
            X = torch.stack([data.features(key, position) for key in keys]).to(device)
            candidates += [Candidate(key, position) for key in keys]
            own, own_by_chance = evaluate(X, (data.target, shuffled), data.problems, folds, kind)
            found.append(own)
            by_chance.append(own_by_chance)
            if not kind.tokens:
                projected = baselines.random_projection(X, seed)
                at_random += evaluate(projected, (data.target,), data.problems, folds, kind)
                refits += _refit(X, data, kind, own)
    return _Evaluated(
        tuple(candidates),
        Evaluation.concatenate(found),
        shuffled,
        Evaluation.concatenate(by_chance),
        Evaluation.concatenate(at_random) if at_random else None,
        refits,
    )


def _declared(found: _Evaluated, name: str, controls: Controls) -> Best:
    """Return the results of the candidate that was declared beforehand."""
    number = found.find(name)
    scores, raw = found.evaluation.scores[number], found.evaluation.raw[number]
    return Best(controls.main(scores), (name,), controls.every(scores, raw))


def _saved_probes(
    data: ProbeDataset, kind: Kind, report: ProbeReport, found: _Evaluated, controls: Controls
) -> list[SavedProbe]:
    """Return the refitted probes, each with a card that has its out-of-fold metrics."""
    return [
        SavedProbe(
            part.weight[0, 0], part.bias[0, 0], part.mean[0], part.scale[0],
            card=_card(data, kind, report, result, controls.every(found.evaluation.scores[n], found.evaluation.raw[n])),
        )
        for n, (result, part) in enumerate(zip(report.results, found.refits, strict=False))
    ]  # fmt: skip


def _refit(
    X: Float[Tensor, "models rows d"], data: ProbeDataset, kind: Kind, evaluation: Evaluation
) -> list[LinearProbes]:
    """Fit each model on all rows at its own strength, and calibrate it by the scores of the outer folds."""
    y, problems = (torch.from_numpy(part).to(X.device) for part in (data.target.values, data.problems))
    fitted = []
    for number, value in enumerate(evaluation.strength):
        strengths = torch.tensor([value], dtype=torch.float64, device=X.device)
        probes = kind.fit(X[number : number + 1], y, problems, strengths)
        if not isinstance(probes, LinearProbes):  # a custom kind that is not linear: nothing is saved
            return []
        fitted.append(evaluation.calibration(number)[0].probes(probes))
    return fitted


def _simpler(data: ProbeDataset, folds: Sequence[Fold], found: _Evaluated) -> dict[str, tuple[Scores, Scores]]:
    """Return the baselines' scores, comparable ones and raw; those without activations use the target's default kind."""
    kind = KINDS[DEFAULT_KINDS[data.target.kind]]
    simpler = {}
    for name, X in baselines.covariates(data).items():
        (own,) = evaluate(X, (data.target,), data.problems, folds, kind)
        simpler[name] = own.scores[0], own.raw[0]
    if found.at_random is not None:
        simpler["random_direction"] = nested_best(found.at_random, folds)[:2]
    first = found.first_layer()
    simpler["first_layer"] = found.evaluation.scores[first], found.evaluation.raw[first]
    return simpler


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
    """Return the unit of a saved probe's scores."""
    if not kind.probabilistic:
        return "value" if kind.target == "real" else "score"
    return "logits" if kind.target == "classes" else "log_odds"
