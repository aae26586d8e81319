"""What a training of probes found, as the page draws it: `results.json`, with the scores and curves of `curves.json`.

Reports that were made before there were curves have the numbers alone; training again adds the rest.
"""

import json
from pathlib import Path
from typing import Any

from roentgen.view.errors import ViewError
from roentgen.view.schemas import Candidate, Estimate, ProbeReport

METRICS = ("auroc", "within_auroc", "macro_auroc", "r2")
_FACTS = (
    "kind", "target", "positions", "session", "n_samples", "n_problems", "n_groups", "n_left_out", "n_folds", "n_true",
    "prevalence", "seed", "data_hash", "roentgen",
)  # fmt: skip


def read_report(folder: Path) -> ProbeReport:
    """Return what was found.

    Raises:
        ViewError: 404 if nothing was, 409 if a file is damaged.
    """
    results = _read(folder / "results.json")
    if results is None:
        raise ViewError(f"{folder.name}: there is no report of probes of this name", 404)
    curves = _read(folder / "curves.json") or {}
    try:
        return _report(folder.name, results, curves)
    except (KeyError, TypeError, AttributeError) as error:
        raise ViewError(f"{folder / 'results.json'} is damaged: it lacks {error}", 409) from error


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ViewError(f"{file} is damaged: {error}", 409) from error
    return found


def _report(name: str, results: dict[str, Any], curves: dict[str, Any]) -> ProbeReport:
    best = results["best"]
    notes = list(results.get("notes", []))
    if not curves:
        notes.append(
            "Scores and curves were not kept by the version that trained these probes; train again to see them."
        )
    return {
        "name": name,
        "label": results["label"],
        "n": results["n_samples"],
        "metric": results.get("metric", "auroc"),
        "facts": {fact: results[fact] for fact in _FACTS if results.get(fact) is not None},
        "notes": notes,
        "by_candidate": [_candidate(key, results) for key in results["keys"]],
        "best": {
            **_estimate(best),
            "keys": best["keys"],
            "metrics": {metric: _estimate(found, metric) for metric, found in best.get("metrics", {}).items()},
        },
        "baselines": {baseline: _estimate(found) for baseline, found in results["baselines"].items()},
        "reliability": curves.get("reliability", []),
        "risk_coverage": curves.get("risk_coverage", []),
        "scores": {"unit": curves.get("unit"), "classes": curves.get("classes", [])},
        "traces": curves.get("traces", []),
        "errors": curves.get("errors", []),
    }


def _candidate(key: dict[str, Any], results: dict[str, Any]) -> Candidate:
    position = key.get("positions", results.get("positions", ""))
    name = f"{key['key']}@{position}"
    return {
        "name": name, "key": key["key"], "layer": key["layer"], "hook_point": key["hook_point"], "position": position,
        "auroc": _estimate(key), "chosen": name in results["best"]["keys"],
    }  # fmt: skip


def _estimate(found: dict[str, Any], *names: str) -> Estimate:
    """Return an estimate, whose value stands under the metric's name."""
    value = next((found[name] for name in names or METRICS if found.get(name) is not None), None)
    return {"value": value, "low": found.get("low"), "high": found.get("high")}
