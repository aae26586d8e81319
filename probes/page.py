"""The probes' page: a self-contained static HTML file with transcripts colored by token scores.

Model output is escaped, and the page contains no script: the tooltips of tokens are CSS.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from probes.candidate_detail import CandidateDetail, Trace
from probes.plots import METRICS, called
from probes.report import ProbeReport
from roentgen.pages import page_environment
from roentgen.runs.record import natural_order

TRANSCRIPTS = 24
"""Number of transcripts shown, half of each class as far as possible."""

PICTURES = {
    "auroc_by_layer": (
        "By layer",
        "lines over layers, one per hook point and position, beside chance and prompt length",
    ),
    "heatmap": (
        "By layer and position",
        "a panel per hook point, layers across, positions down, colored by the metric",
    ),
    "along_trace": (
        "Along the trace",
        "the mean score of each class from the end of the prompt to the end of the answer",
    ),
    "reliability": ("Reliability", "the share of samples whose label is True over the probability that the probe gave"),
    "scores": ("Scores by class", "the distribution of each class's scores, as shares of the class"),
    "projection": ("Every sample", "a point per sample: its score, and the largest variation across the probe"),
}
"""Titles and descriptions of the pictures, in page order."""

OPEN_UP_TO = 24
"""Number of candidates above which the table is collapsed."""


@dataclass(frozen=True)
class Token:
    """A token as shown on the page."""

    text: str
    """Its text, with invisible characters made visible."""
    position: int
    """Position in the sequence."""
    score: float | None
    """Score; None if it has none."""
    strength: float
    """Intensity of its color, from -1 to 1."""


@dataclass(frozen=True)
class _Picture:
    """A picture as shown on the page; files are base64, and `dark` is None if there is no dark variant."""

    name: str
    title: str
    alt: str
    light: str
    dark: str | None


def render_page(
    report: ProbeReport,
    pictures: Mapping[str, bytes],
    detail: CandidateDetail | None,
    dark: Mapping[str, bytes] | None = None,
) -> str:
    """Return the page.

    Args:
        report: what was found.
        pictures: PNG files by name, see `PICTURES`.
        detail: the candidate whose transcripts are shown, None for none.
        dark: the same pictures for dark backgrounds.
    """
    shown = _choose(detail.traces) if detail else []
    # A probe's zero means something only where it was trained to read, so colors begin at the middle of what is shown.
    scores = np.concatenate([trace.scores for trace in shown]) if shown else np.zeros(1)
    middle = float(np.median(scores))
    strongest = float(np.percentile(np.abs(scores - middle), 95)) or 1.0
    return (
        page_environment("probes")
        .get_template("report.html")
        .render(
            report=report,
            pictures=[_picture(name, report, pictures, dark or {}) for name in PICTURES if name in pictures],
            metric=called(report),
            several_epochs=any(trace.example.epoch > 1 for trace in shown),
            folded=len(report.results) > OPEN_UP_TO,
            detail=detail,
            called=METRICS,
            middle=middle,
            transcripts=[(trace, _tokens(trace, middle, strongest)) for trace in shown],
        )
    )


def _picture(name: str, report: ProbeReport, light: Mapping[str, bytes], dark: Mapping[str, bytes]) -> _Picture:
    title, described = PICTURES[name]
    alt = f"{title}: {described}"
    if name in ("auroc_by_layer", "heatmap"):
        best = max(report.results, key=lambda result: np.nan_to_num(result.estimate.value, nan=-np.inf))
        alt += f"; the highest is {best.estimate} at {best.name}. The table of candidates has the numbers."
    dark_file = base64.b64encode(dark[name]).decode() if name in dark else None
    return _Picture(name, title, alt, base64.b64encode(light[name]).decode(), dark_file)


def _choose(traces: tuple[Trace, ...]) -> list[Trace]:
    """Return the first traces of each class, alternating, in the order of problems and epochs."""
    ordered = sorted(traces, key=lambda trace: (natural_order(trace.example.problem), trace.example.epoch))
    own = [[trace for trace in ordered if trace.value == value][: TRANSCRIPTS // 2] for value in (False, True)]
    return [trace for number in range(TRANSCRIPTS // 2) for part in own for trace in part[number : number + 1]]


def _tokens(trace: Trace, middle: float, strongest: float) -> tuple[list[Token], list[Token]]:
    """Return the tokens of the prompt and of the answer."""
    scores = dict(zip(trace.position.tolist(), trace.scores.tolist(), strict=True))
    tokens = []
    for position, text in enumerate(trace.tokens):
        score = scores.get(position)
        strength = 0.0 if score is None else float(np.clip((score - middle) / strongest, -1, 1))
        # A token may be part of a character, which is shown with its first token.
        tokens.append(Token((text or "·").replace("\n", "↵\n"), position, score, round(strength, 3)))
    return tokens[: trace.n_prompt], tokens[trace.n_prompt :]
