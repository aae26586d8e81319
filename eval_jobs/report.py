"""The run's page: one static HTML file that needs nothing else, to be opened, mailed or archived.

It is made from what is on disk (summary.json, samples.jsonl, the probes' results), so it can be written again at any time,
for instance after probes were trained. Everything a model wrote is escaped; there is no script on the page: its filters are
radio buttons and style sheets.
"""

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from eval_jobs.charts import lengths
from eval_jobs.console import interval, percent, spell_difference, warnings
from eval_jobs.summary import summarise
from roentgen.runs import Run, RunError

TRANSCRIPTS_UP_TO = 2_000
"""A page with more transcripts than this is slow to open; the rest are in samples.jsonl."""


def write_report(run: Run) -> Path:
    """Write `report.html` into the run directory; return its path.

    Raises:
        RunError: if the record or a probe's results are damaged.
    """
    samples = run.samples().by_name()
    summary = run.summary() or {**summarise(run.config, samples), "timing": None}
    page = (
        _environment()
        .get_template("report.html")
        .render(
            config=run.config,
            summary=summary,
            warnings=warnings(summary),
            samples=samples[:TRANSCRIPTS_UP_TO],
            lengths=lengths(samples),
            disagreements=set(summary["disagreements"]),
            left_out=max(0, len(samples) - TRANSCRIPTS_UP_TO),
            probes=[_read_probe(folder) for folder in run.probe_folders()],
        )
    )
    path = run.path / "report.html"
    path.write_text(page)
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("eval_jobs"),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelt name in the template is an error, not a hole in the page
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "interval": interval, "auroc": _auroc, "difference": spell_difference}
    return environment


def _read_probe(folder: Path) -> dict[str, Any]:
    """Read a probe's results for the page; what an older or newer version left out is None."""
    file = folder / "results.json"
    try:
        results = json.loads(file.read_text())
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}") from error
    plot = folder / "auroc_by_layer.png"
    return {
        "label": results.get("label", folder.name),
        "session": results.get("session"),
        "positions": results.get("positions"),
        "n_samples": results.get("n_samples"),
        "n_problems": results.get("n_problems"),
        "prevalence": results.get("prevalence"),
        "best": results.get("best"),
        "baselines": results.get("baselines", {}),
        "keys": results.get("keys", []),
        "notes": results.get("notes", []),
        "plot": base64.b64encode(plot.read_bytes()).decode() if plot.exists() else None,
    }


def _auroc(estimate: dict[str, Any] | None) -> str:
    """Spell an AUROC with its interval, `0.71 [0.62, 0.79]`."""
    if estimate is None or estimate.get("auroc") is None:
        return "–"
    low, high = estimate.get("low"), estimate.get("high")
    return f"{estimate['auroc']:.2f}" + ("" if low is None or high is None else f" [{low:.2f}, {high:.2f}]")
