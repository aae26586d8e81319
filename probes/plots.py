"""Plots of a `ProbeReport`.

Figures use matplotlib's object interface, not pyplot: pyplot keeps figures in a global list and chooses a display backend,
which does not suit a library on a cluster. `figure.savefig(path)` writes a figure in dark on white; after
`styles.darken(figure)` it is light on transparent, for a page with a dark background.
"""

import textwrap
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from probes.candidate_detail import CandidateDetail
from probes.curves import mean_along
from probes.metrics import BINS, bins
from probes.report import KeyResult, ProbeReport
from probes.styles import (
    CLASSES,
    COLORS,
    DPI,
    LEGEND_CHARACTERS,
    LINE_STYLES,
    MARKERS,
    REFERENCE,
    TITLE_CHARACTERS,
    WIDTH,
)

MOST_TICKS = 12
SCORE_BINS = 24
METRICS = {
    "auroc": "AUROC",
    "within_auroc": "AUROC within problems",
    "auprc": "AUPRC",
    "accuracy": "accuracy",
    "brier": "Brier score",
    "ece": "ECE",
    "r2": "R²",
    "spearman": "Spearman's ρ",
}
"""Display names of metrics."""


def by_layer(report: ProbeReport) -> Figure:
    """Plot the main metric over layers, one line per hook point and position with its 95% interval, with chance and prompt
    length as references.

    Model-wide hook points are points with error bars: `embed` left of the layers, others right of them.
    """
    groups = [
        (*names, list(results))
        for names, results in groupby(report.results, key=lambda result: (result.hook_point, result.positions))
    ]
    labels = [hook_point if len(report.positions) == 1 else f"{hook_point}@{place}" for hook_point, place, _ in groups]
    length = report.baselines["prompt_length"]
    references = {
        "chance": (report.chance, "-"),
        f"prompt length ({length.value:.2f})": (length.value, "--"),
    }
    columns = _legend_columns([*labels, *references])
    rows = -(-(len(labels) + len(references)) // columns)
    figure = Figure(figsize=(WIDTH, 3.4 + 0.2 * rows), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for label, style, (hook_point, _, results) in zip(labels, _styles(groups), groups, strict=True):
        _draw_hook_point(axes, report, hook_point, label, style, results)
    for label, (value, line) in references.items():
        axes.axhline(value, color=REFERENCE, linewidth=1, linestyle=line, label=label)

    _title(
        axes,
        f"Reading “{report.label}” at {', '.join(report.positions)}: best {report.best.estimate}, chosen on inner folds",
    )
    axes.set_xlabel("layer")
    axes.set_ylabel(f"{called(report)}, problems unseen in training", fontsize="small")
    floor = min(0.3, *(result.estimate.low for result in report.results if np.isfinite(result.estimate.low)), 0.3)
    axes.set_ylim(max(floor, -1) - 0.02, 1.02)
    layers = _layers(report)
    axes.set_xticks(layers[:: -(-len(layers) // MOST_TICKS)])
    axes.set_xlim(layers[0] - 1.5, layers[-1] + 1.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    return figure


def heatmap(report: ProbeReport) -> Figure:
    """Plot the main metric over layers and positions, one panel per hook point."""
    layered = [result for result in report.results if result.layer is not None]
    hook_points = list(dict.fromkeys(result.hook_point for result in layered))
    layers, positions = _layers(report), list(report.positions)
    figure = Figure(
        figsize=(WIDTH, 1.2 + (0.8 + 0.3 * len(positions)) * max(1, len(hook_points))), dpi=DPI, layout="constrained"
    )
    panels = figure.subplots(max(1, len(hook_points)), 1, squeeze=False)[:, 0]
    image = None
    for axes, hook_point in zip(panels, hook_points, strict=False):
        values = np.full((len(positions), len(layers)), np.nan)
        for result in layered:
            if result.hook_point == hook_point:
                values[positions.index(result.positions), layers.index(result.layer or 0)] = result.estimate.value
        image = axes.imshow(values, vmin=report.chance, vmax=1.0, aspect="auto", cmap="viridis")
        axes.set_title(hook_point, loc="left", fontsize="medium")
        axes.set_ylabel("position", fontsize="small")
        axes.set_yticks(range(len(positions)), positions)
        step = -(-len(layers) // MOST_TICKS)
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    panels[-1].set_xlabel("layer")
    if image is not None:
        below = any(result.estimate.value < report.chance for result in layered)
        figure.colorbar(image, ax=list(panels), label=called(report), extend="min" if below else "neither")
    return figure


def reliability(log_odds: Float[np.ndarray, "samples"], y: Bool[np.ndarray, "samples"]) -> Figure:
    """Plot the frequency of True over the predicted probability, per tenth of probability, with sample counts."""
    said = 1 / (1 + np.exp(-log_odds.clip(-500, 500)))
    place = bins(said)
    figure = Figure(figsize=(WIDTH, 4.2), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=REFERENCE, linewidth=1)
    there = [b for b in range(BINS) if (place == b).any()]
    observed = [float(y[place == b].mean()) for b in there]
    axes.plot([float(said[place == b].mean()) for b in there], observed, color=COLORS[0], linewidth=1)
    axes.scatter(
        [float(said[place == b].mean()) for b in there],
        observed,
        s=[20 + 300 * float((place == b).mean()) for b in there],
        color=COLORS[0],
    )
    for b, share in zip(there, observed, strict=True):
        radius = np.sqrt(20 + 300 * float((place == b).mean())) / 2
        axes.annotate(
            str(int((place == b).sum())), (float(said[place == b].mean()), share), xytext=(0, 3 + radius),
            textcoords="offset points", horizontalalignment="center", fontsize="x-small",
        )  # fmt: skip
    axes.set_xlabel("probability that the probe gave")
    axes.set_ylabel("share that was True")
    _title(axes, "Reliability, problems unseen in training; beside points: samples")
    axes.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.09), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def along_trace(detail: CandidateDetail, label: str) -> Figure:
    """Draw the mean score from the last token of the prompt to the last row, per class, with its interval over problems."""
    figure, axes = _one_panel()
    fractions = np.linspace(0, 1, 21)
    for value in _commonest_first(np.array([trace.value for trace in detail.traces])):
        mean, low, high = mean_along(detail, value, fractions)
        traces = [trace for trace in detail.traces if trace.value == value]
        look = CLASSES[value]
        axes.plot(
            fractions, mean, color=look["color"], linestyle=look["linestyle"],
            label=f"{label} is {value} (n = {len(traces)} traces)",
        )  # fmt: skip
        axes.fill_between(fractions, low, high, color=look["color"], alpha=0.15, linewidth=0)
    if axes.get_ylim()[0] <= 0 <= axes.get_ylim()[1]:
        axes.axhline(0, color=REFERENCE, linewidth=1)
    axes.set_xlabel("from the end of the prompt (0) to the end of the answer (1)", fontsize="small")
    place = detail.name.rpartition("@")[2]
    axes.set_ylabel(f"score (log-odds at {place}), problems unseen", fontsize="small")
    _finish(figure, axes, detail.name)
    return figure


def distributions(detail: CandidateDetail, y: Bool[np.ndarray, "samples"], label: str) -> Figure:
    """Plot the distribution of each class's scores as outlines of shares, with a mark for every sample.

    Each class sums to 1, so that two samples among a thousand are as visible as the rest.
    """
    figure, axes = _one_panel()
    edges = np.histogram_bin_edges(detail.scores, SCORE_BINS)
    for row, value in enumerate(_commonest_first(y)):
        own, look = detail.scores[y == value], CLASSES[value]
        shares = np.histogram(own, edges)[0] / len(own)
        axes.stairs(shares, edges, fill=True, color=look["color"], alpha=0.15, linewidth=0)
        axes.stairs(
            shares, edges, color=look["color"], linestyle=look["linestyle"], linewidth=1.8,
            label=f"{label} is {value} (n = {len(own)})",
        )  # fmt: skip
        marks = np.full(len(own), -0.035 - 0.045 * row)
        axes.plot(
            own,
            marks,
            linestyle="none",
            marker="|",
            markersize=6,
            color=look["color"],
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )
    _draw_threshold(axes)
    axes.tick_params("x", pad=14)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("score (log-odds), problems unseen in training")
    axes.set_ylabel("share of the class's samples", fontsize="small")
    _finish(figure, axes, detail.name)
    return figure


def projection(detail: CandidateDetail, y: Bool[np.ndarray, "samples"], label: str) -> Figure:
    """Plot each sample's score against the largest variation that the probe does not see, with the rarer class on top."""
    figure, axes = _one_panel()
    common, _ = _commonest_first(y)
    for value in _commonest_first(y):
        own, look = y == value, CLASSES[value]
        axes.scatter(
            detail.scores[own], detail.across[own], s=16 if value == common else 30,
            alpha=0.45 if value == common else 0.95, color=look["color"], marker=look["marker"],
            linewidth=0 if value == common else 0.6, edgecolor="white", label=f"{label} is {value} (n = {int(own.sum())})",
        )  # fmt: skip
    _draw_threshold(axes)
    axes.set_xlabel("score (log-odds), problems unseen in training")
    axes.set_ylabel("first principal coordinate across the probe", fontsize="small")
    _finish(figure, axes, detail.name)
    return figure


def called(report: ProbeReport) -> str:
    """Return the display name of the main metric."""
    return METRICS["within_auroc" if report.within else report.metric]


def _one_panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 3.8), dpi=DPI, layout="constrained")
    return figure, figure.add_subplot()


def _finish(figure: Figure, axes: Axes, title: str) -> None:
    _title(axes, title)
    axes.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):  # points that are faint where they are many
            handle.set(alpha=1, sizes=[36])


def _draw_threshold(axes: Axes) -> None:
    """Mark a score of 0, unless all scores are on one side of it: including it would compress them."""
    if axes.get_xlim()[0] <= 0 <= axes.get_xlim()[1]:
        axes.axvline(0, color=REFERENCE, linewidth=1)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(textwrap.fill(text, TITLE_CHARACTERS), loc="left", fontsize="medium")


def _commonest_first(y: Bool[np.ndarray, "samples"]) -> list[bool]:
    """Return both classes, the rarer one last, so that it is drawn on top."""
    return [True, False] if 2 * int(y.sum()) > len(y) else [False, True]


def _legend_columns(labels: list[str]) -> int:
    """Return how many of these labels fit in one row below a figure."""
    return max(1, min(3, len(labels), LEGEND_CHARACTERS // (max(map(len, labels)) + 6)))


def _styles(groups: list[tuple[str, str, list[KeyResult]]]) -> Iterator[dict[str, Any]]:
    """Yield the style of each line: hook points differ in color and positions in line style; with a single hook point,
    positions differ in both."""
    hook_points = list(dict.fromkeys(hook_point for hook_point, _, _ in groups))
    positions = list(dict.fromkeys(place for _, place, _ in groups))
    for hook_point, place, _ in groups:
        one, other = hook_points.index(hook_point), positions.index(place)
        color = one if len(hook_points) > 1 else other
        yield {
            "color": COLORS[color % len(COLORS)],
            "linestyle": LINE_STYLES[other % len(LINE_STYLES)],
            "marker": MARKERS[color // len(COLORS) % len(MARKERS)],
        }


def _draw_hook_point(
    axes: Axes, report: ProbeReport, hook_point: str, label: str, style: dict[str, Any], results: list[KeyResult]
) -> None:
    layers = _layers(report)
    outside = layers[0] - 1 if hook_point == "embed" else layers[-1] + 1
    x = [outside if result.layer is None else result.layer for result in results]
    estimates = [result.estimate for result in results]
    values = [e.value for e in estimates]
    if len(results) > 1:
        axes.plot(x, values, markersize=3.5, label=label, **style)
        low, high = [e.low for e in estimates], [e.high for e in estimates]
        axes.fill_between(x, low, high, alpha=0.1, linewidth=0, color=style["color"])
    else:  # a single point has error bars instead of a band
        below, above = values[0] - estimates[0].low, estimates[0].high - values[0]
        axes.errorbar(
            x, values, yerr=[[below], [above]], fmt="D", markersize=4, capsize=3, label=label, color=style["color"]
        )


def _layers(report: ProbeReport) -> list[int]:
    """Return the layers in order; [0] if every key is model-wide."""
    return sorted({result.layer for result in report.results if result.layer is not None}) or [0]
