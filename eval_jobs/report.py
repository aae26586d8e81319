"""The run's page: a self-contained static HTML file.

It is made from the files on disk (summary.json, samples.jsonl, the probes' results), so it can be regenerated at any time,
for instance after probes were trained. Model output is escaped, and the page contains no script: its filters are radio
buttons and style sheets.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment

from eval_jobs.charts import lengths, panels, ticks
from eval_jobs.summary import summarize_samples
from eval_jobs.terminal_summary import format_count, format_difference, format_samples, interval, percent, warnings
from roentgen.atomic_files import write_text
from roentgen.pages import page_environment
from roentgen.runs import Run, RunError

TRANSCRIPTS_UP_TO = 2_000
"""Maximum number of transcripts, since a page with more is slow to open; the rest are in samples.jsonl."""

KINDS_SHOWN = 10
"""Number of kinds of failures shown; all are in summary.json."""

METRICS = {"auroc": "AUROC", "within_auroc": "AUROC within problems", "r2": "R²"}
"""Display names of the probes' main metrics."""

PLOTS = {"light": "auroc_by_layer.png", "dark": "dark/auroc_by_layer.png"}
"""A probe's plot for each color scheme; folders of older versions have only the light one."""


def write_report(run: Run) -> Path:
    """Write `report.html` into the run directory; return its path.

    Raises:
        RunError: if the record or a probe's results are damaged.
    """
    samples = run.read_samples().by_name()
    # Recomputed, so that the page agrees with the record, also for runs summarized by an older version.
    summary = {**summarize_samples(run.config, samples), "timing": (run.summary() or {}).get("timing")}
    bars = lengths(samples)
    page = (
        _environment()
        .get_template("report.html")
        .render(
            config=run.config,
            summary=summary,
            warnings=warnings(summary),
            kinds_shown=KINDS_SHOWN,
            filters=_filters(summary),
            samples=samples[:TRANSCRIPTS_UP_TO],
            bars=bars,
            panels=panels(bars),
            ticks=ticks(bars[-1].stop + 1) if bars else [],
            several=list(_several(summary)),
            disagreements=set(summary["disagreements"]),
            left_out=max(0, len(samples) - TRANSCRIPTS_UP_TO),
            probes=[_read_probe(folder) for folder in run.probe_folders()],
        )
    )
    path = run.path / "report.html"
    write_text(path, page, errors="replace")  # an unpaired surrogate, which a model may write, has no encoding
    return path


def _filters(summary: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Return the filters of samples: name, label, and number of samples."""
    scores = summary["accuracy"]
    return [
        ("all", "all", summary["samples"] + summary["errors"]),
        ("correct", "correct", scores["correct"]),
        ("wrong", "wrong", scores["n"] - scores["correct"]),
        ("cut", "cut", summary["truncated"]),
        ("unread", "no answer found", summary["unparsable"]),
        ("failed", "failed", summary["errors"]),
        ("disagree", "extractors disagree", len(summary["disagreements"])),
    ]


def _several(summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one row per variant and k with pass@k and maj@k, for runs with several samples per problem."""
    of_variants = ((name, variant["several_samples"]) for name, variant in summary["variants"].items())
    for name, found in ((None, summary["several_samples"]), *of_variants):
        for k, passed in found["pass_at_k"].items() if found else ():
            if passed is not None:
                yield {"variant": name, "k": k, "passed": passed, "agreed": found["maj_at_k"][k]}


def _environment() -> Environment:
    environment = page_environment("eval_jobs")
    environment.filters |= {
        "percent": percent,
        "interval": interval,
        "difference": format_difference,
        "speed": lambda speed: f"{speed:.1f}" if speed < 10 else f"{speed:.0f}",
    }
    environment.globals |= {"count": format_count, "conditions": format_samples}
    return environment


def _read_probe(folder: Path) -> dict[str, Any]:
    """Read a probe's results for the page; fields that other versions omit are None."""
    file = folder / "results.json"
    try:
        results = json.loads(file.read_text())
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}") from error
    best, metric = results.get("best") or {}, results.get("metric")
    return {
        "name": folder.name,
        "label": results.get("label", folder.name),
        "kind": results.get("kind"),
        "session": results.get("session"),
        "positions": results.get("positions"),
        "metric": METRICS.get(metric or "auroc", metric),
        "n_samples": results.get("n_samples"),
        "n_problems": results.get("n_problems"),
        "n_true": results.get("n_true"),
        "prevalence": results.get("prevalence"),
        "best": _estimate(best, metric),
        "chosen": list(dict.fromkeys(best.get("keys") or [])),
        "rows": [_candidate(key, results, metric) for key in results.get("keys") or []],
        "baselines": {
            name.replace("_", " "): _estimate(found, metric) for name, found in (results.get("baselines") or {}).items()
        },
        "notes": results.get("notes") or [],
        "page": (folder / "report.html").exists(),
        "plots": {theme: _embedded(folder / file) for theme, file in PLOTS.items()},
    }


def _candidate(key: dict[str, Any], results: dict[str, Any], metric: str | None) -> dict[str, Any]:
    """Return the table row of a stored key at a position."""
    return {
        "hook_point": key.get("hook_point", key.get("key")),
        "layer": key.get("layer"),
        "positions": key.get("positions", results.get("positions")),
        "estimate": _estimate(key, metric),
    }


def _embedded(file: Path) -> str | None:
    return base64.b64encode(file.read_bytes()).decode() if file.exists() else None


def _estimate(found: dict[str, Any] | None, metric: str | None) -> str:
    """Format a main metric with its interval, `0.71 [0.62, 0.79]`."""
    found = found or {}
    value = next((found[name] for name in (metric or "", *METRICS) if found.get(name) is not None), None)
    if value is None:
        return "–"
    low, high = found.get("low"), found.get("high")
    return f"{value:.2f}" + ("" if low is None or high is None else f" [{low:.2f}, {high:.2f}]")
