"""The probes' page: one static HTML file that needs nothing else, with transcripts in which every token has its score's colour.

Everything a model wrote is escaped, and there is no script on the page: what shows when a token is pointed at is CSS.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from probes.closeup import Closeup, Trace
from probes.plots import METRICS
from probes.report import ProbeReport

TRANSCRIPTS = 24
"""Shown on the page, half of each class as far as there are."""

PICTURES = {
    "auroc_by_layer": "By layer",
    "heatmap": "By layer and position",
    "along_trace": "Along the trace",
    "reliability": "Reliability",
    "projection": "Every sample",
}


@dataclass(frozen=True)
class Token:
    """A token as the page shows it.

    Attributes:
        text: of it; what cannot be seen has a sign.
        position: in the sequence.
        score: None where it has none.
        strength: of its colour, from -1 to 1.
    """

    text: str
    position: int
    score: float | None
    strength: float


def render_page(report: ProbeReport, pictures: Mapping[str, bytes], closeup: Closeup | None) -> str:
    """Return the page.

    Args:
        report: what was found.
        pictures: PNG files by name, see `PICTURES`.
        closeup: the candidate whose transcripts are shown, None for none.
    """
    shown = _choose(closeup.traces) if closeup else []
    # A probe's zero means something only where it was trained to read, so colours begin at the middle of what is shown.
    scores = np.concatenate([trace.scores for trace in shown]) if shown else np.zeros(1)
    middle = float(np.median(scores))
    strongest = float(np.percentile(np.abs(scores - middle), 95)) or 1.0
    return (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            pictures=[
                (title, name, base64.b64encode(pictures[name]).decode())
                for name, title in PICTURES.items()
                if name in pictures
            ],
            closeup=closeup,
            called=METRICS,
            middle=middle,
            transcripts=[(trace, _tokens(trace, middle, strongest)) for trace in shown],
        )
    )


def _choose(traces: tuple[Trace, ...]) -> list[Trace]:
    """Return the first of each class, in turn."""
    own = [[trace for trace in traces if trace.value == value][: TRANSCRIPTS // 2] for value in (False, True)]
    return [trace for number in range(TRANSCRIPTS // 2) for part in own for trace in part[number : number + 1]]


def _tokens(trace: Trace, middle: float, strongest: float) -> tuple[list[Token], list[Token]]:
    """Return the tokens of the prompt and those of the answer."""
    scores = dict(zip(trace.position.tolist(), trace.scores.tolist(), strict=True))
    tokens = []
    for position, text in enumerate(trace.tokens):
        score = scores.get(position)
        strength = 0.0 if score is None else float(np.clip((score - middle) / strongest, -1, 1))
        # A token may be part of a character, which then stands with the first of its tokens.
        tokens.append(Token((text or "·").replace("\n", "↵\n"), position, score, round(strength, 3)))
    return tokens[: trace.n_prompt], tokens[trace.n_prompt :]


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("probes"),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelt name in the template is an error, not a hole in the page
        trim_blocks=True,
        lstrip_blocks=True,
    )
