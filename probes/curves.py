"""What the probes' page draws beside the numbers of `results.json`: scores out of fold, and curves of them; `curves.json`.

unit            of the scores: log_odds, logits, value or score
samples         per sample its score by the best candidate, found by probes that had not seen its problem
classes         the same by class, of True or False
reliability     how often the label is True over the probability that the probe gave, per tenth of it
risk_coverage   the share of wrong answers among the most confident ones, over how many of them are kept
traces          the mean score from the end of the prompt to the end of the answer, per class
errors          samples that the probe takes for the other class, the most confident first
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from probes.bootstrap import bootstrap_weights
from probes.candidate_detail import CandidateDetail
from probes.dataset import ProbeDataset
from probes.fitting import Trained
from probes.metrics import bins

Scores = Float[np.ndarray, "samples"]

MOST_ERRORS = 200
COVERAGES = np.linspace(0.05, 1, 20)
FRACTIONS = np.linspace(0, 1, 21)


def curves_of(trained: Trained, data: ProbeDataset, detail: CandidateDetail | None) -> dict[str, Any]:
    """Return the contents of `curves.json`.

    Args:
        trained: what the training gave.
        data: what it was of.
        detail: the candidate whose traces are drawn, None for none.
    """
    names = [example.rollout_id if example.sample is None else example.sample.sample_id for example in data.examples]
    report = trained.report
    found: dict[str, Any] = {"unit": trained.probes[0].card.unit if trained.probes else "score"}
    if trained.raw.shape[1] == 1:
        found["samples"] = dict(zip(names, map(_rounded, trained.raw[:, 0].tolist()), strict=True))
    if report.target == "binary" and not report.within:
        found |= _of_binary(trained.raw[:, 0], data.target.values.astype(bool), data.groups, names)
    if detail is not None and detail.traces:
        found["traces"] = [_along_traces(detail, value) for value in (True, False) if _has(detail, value)]
    return found


def _of_binary(
    log_odds: Scores, y: Bool[np.ndarray, "samples"], groups: Int[np.ndarray, "samples"], names: list[str]
) -> dict[str, Any]:
    given = 1 / (1 + np.exp(-log_odds.clip(-500, 500)))
    place = bins(given)
    wrong = (log_odds > 0) != y
    confident = np.argsort(-np.abs(log_odds), kind="stable")
    return {
        "classes": [{"name": str(value), "values": [*map(_rounded, log_odds[y == value])]} for value in (True, False)],
        "reliability": [
            {"predicted": float(given[place == b].mean()), "observed": float(y[place == b].mean()), "n": int(n)}
            for b, n in zip(*np.unique(place, return_counts=True), strict=True)
        ],
        "risk_coverage": _risk_coverage(wrong[confident], groups[confident]),
        "errors": [
            {"sample_id": names[i], "label": bool(y[i]), "score": _rounded(log_odds[i])} for i in confident if wrong[i]
        ][:MOST_ERRORS],
    }


def _risk_coverage(wrong: Bool[np.ndarray, "samples"], groups: Int[np.ndarray, "samples"]) -> list[dict[str, float]]:
    """Return the risk at some coverages, with its interval over problems; the samples come in order of confidence."""
    weights = bootstrap_weights(np.unique(groups, return_inverse=True)[1])
    kept = np.maximum(1, np.round(COVERAGES * len(wrong)).astype(int))
    drawn = np.cumsum(weights, axis=1)[:, kept - 1]
    risks = np.cumsum(weights * wrong, axis=1)[:, kept - 1] / np.where(drawn, drawn, np.nan)
    low, high = np.nanpercentile(risks, [2.5, 97.5], axis=0)
    risk = np.cumsum(wrong)[kept - 1] / kept
    return [
        {"coverage": float(c), "risk": float(r), "low": float(one), "high": float(other)}
        for c, r, one, other in zip(kept / len(wrong), risk, low, high, strict=True)
    ]


def mean_along(
    detail: CandidateDetail, value: bool, fractions: Float[np.ndarray, "points"]
) -> tuple[Float[np.ndarray, "points"], Float[np.ndarray, "points"], Float[np.ndarray, "points"]]:
    """Return the mean score of a class at fractions of the trace, and the ends of its interval over problems."""
    traces = [trace for trace in detail.traces if trace.value == value]
    values = np.stack([trace.along(fractions) for trace in traces])
    weights = bootstrap_weights(np.unique([trace.group for trace in traces], return_inverse=True)[1])
    low, high = np.percentile(weights @ values / weights.sum(1, keepdims=True), [2.5, 97.5], axis=0)
    return values.mean(0), low, high


def _along_traces(detail: CandidateDetail, value: bool) -> dict[str, Any]:
    mean, low, high = (list(map(_rounded, one)) for one in mean_along(detail, value, FRACTIONS))
    n = sum(trace.value == value for trace in detail.traces)
    return {"name": str(value), "n": n, "x": FRACTIONS.tolist(), "mean": mean, "low": low, "high": high}


def _has(detail: CandidateDetail, value: bool) -> bool:
    return any(trace.value == value for trace in detail.traces)


def _rounded(number: float) -> float | None:
    return float(f"{number:.6g}") if np.isfinite(number) else None
