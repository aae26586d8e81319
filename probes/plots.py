"""Pictures of a `ProbeReport`.

Figures are made with matplotlib's objects, not with pyplot: pyplot keeps every figure in a global list and picks a
display, and neither belongs in a library that runs on a cluster. `figure.savefig(path)` then writes it.
"""

from itertools import groupby

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probes.closeup import Closeup
from probes.intervals import bootstrap_weights
from probes.metrics import BINS, bins
from probes.report import KeyResult, ProbeReport

MOST_TICKS = 16
COLOURS = {True: "#17754a", False: "#b3402f"}
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
"""What metrics are called where people read them."""


def by_layer(report: ProbeReport) -> Figure:
    """Draw the main metric over layers, one line per hook point and position with its 95% interval, beside chance and length.

    Model-wide hook points are points with bars: `embed` left of the layers, any other to their right.
    """
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (positions, hook_point), results in groupby(
        report.results, key=lambda result: (result.positions, result.hook_point)
    ):
        label = hook_point if len(report.positions) == 1 else f"{hook_point}@{positions}"
        _draw_hook_point(axes, report, hook_point, label, list(results))

    length = report.baselines["prompt_length"]
    axes.axhline(report.chance, color="0.6", linewidth=1, label="chance")
    axes.axhline(length.value, color="0.3", linewidth=1, linestyle="--", label=f"prompt length ({length.value:.2f})")

    axes.set_title(
        f"Reading “{report.label}” at {', '.join(report.positions)}\nbest {report.best.estimate} (chosen on inner folds)",
        loc="left",
        fontsize="medium",
    )
    axes.set_xlabel("layer")
    axes.set_ylabel(f"{METRICS[report.metric]}, problems unseen in training")
    floor = min(0.3, *(result.estimate.low for result in report.results if np.isfinite(result.estimate.low)), 0.3)
    axes.set_ylim(max(floor, -1) - 0.02, 1.02)
    layers = _layers(report)
    axes.set_xticks(layers[:: -(-len(layers) // MOST_TICKS)])
    axes.set_xlim(layers[0] - 1.5, layers[-1] + 1.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def heatmap(report: ProbeReport) -> Figure:
    """Draw the main metric over layers and positions, a panel per hook point."""
    layered = [result for result in report.results if result.layer is not None]
    hook_points = list(dict.fromkeys(result.hook_point for result in layered))
    layers, positions = _layers(report), list(report.positions)
    figure = Figure(
        figsize=(8, 1.2 + (0.8 + 0.3 * len(positions)) * max(1, len(hook_points))), dpi=150, layout="constrained"
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
        axes.set_yticks(range(len(positions)), positions)
        step = -(-len(layers) // MOST_TICKS)
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    panels[-1].set_xlabel("layer")
    if image is not None:
        figure.colorbar(image, ax=list(panels), label=METRICS[report.metric])
    return figure


def reliability(log_odds: Float[np.ndarray, "samples"], y: Bool[np.ndarray, "samples"]) -> Figure:
    """Draw how often the label is True over what the probe said, per tenth of probability; points are as large as their bin."""
    said = 1 / (1 + np.exp(-log_odds.clip(-500, 500)))
    place = bins(said)
    figure = Figure(figsize=(4.5, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    there = [b for b in range(BINS) if (place == b).any()]
    observed = [float(y[place == b].mean()) for b in there]
    axes.plot([float(said[place == b].mean()) for b in there], observed, color="C0", linewidth=1)
    axes.scatter(
        [float(said[place == b].mean()) for b in there],
        observed,
        s=[20 + 300 * float((place == b).mean()) for b in there],
    )
    axes.set_xlabel("probability that the probe gave")
    axes.set_ylabel("share that was True")
    axes.set_title("Reliability, problems unseen in training", loc="left", fontsize="medium")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def along_trace(closeup: Closeup, label: str) -> Figure:
    """Draw the mean score from the last token of the prompt to the last row, per class, with its interval over problems."""
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    fractions = np.linspace(0, 1, 21)
    for value, colour in COLOURS.items():
        traces = [trace for trace in closeup.traces if trace.value == value]
        values = np.stack([trace.along(fractions) for trace in traces])
        weights = bootstrap_weights(np.unique([trace.group for trace in traces], return_inverse=True)[1])
        low, high = np.percentile(weights @ values / weights.sum(1, keepdims=True), [2.5, 97.5], axis=0)
        axes.plot(fractions, values.mean(0), color=colour, label=f"{label} is {value} ({len(traces)})")
        axes.fill_between(fractions, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(0, color="0.7", linewidth=1)
    axes.set_xlabel("from the end of the prompt to the end of the answer")
    axes.set_ylabel(f"score (log-odds at {closeup.name.rpartition('@')[2]}), problems unseen in training")
    axes.set_title(closeup.name, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return figure


def projection(closeup: Closeup, y: Bool[np.ndarray, "samples"], label: str) -> Figure:
    """Draw each sample's score against the largest variation that the probe does not see."""
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for value, colour in COLOURS.items():
        own = y == value
        axes.scatter(
            closeup.scores[own],
            closeup.across[own],
            s=12,
            alpha=0.7,
            color=colour,
            label=f"{label} is {value}",
            linewidth=0,
        )
    axes.axvline(0, color="0.7", linewidth=1)
    axes.set_xlabel("score (log-odds), problems unseen in training")
    axes.set_ylabel("first principal coordinate across the probe")
    axes.set_title(closeup.name, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _draw_hook_point(axes: Axes, report: ProbeReport, hook_point: str, label: str, results: list[KeyResult]) -> None:
    layers = _layers(report)
    outside = layers[0] - 1 if hook_point == "embed" else layers[-1] + 1
    x = [outside if result.layer is None else result.layer for result in results]
    estimates = [result.estimate for result in results]
    values = [e.value for e in estimates]
    if len(results) > 1:
        (line,) = axes.plot(x, values, marker="o", markersize=3, label=label)
        low, high = [e.low for e in estimates], [e.high for e in estimates]
        axes.fill_between(x, low, high, alpha=0.1, linewidth=0, color=line.get_color())
    else:  # one point has no band: give it bars
        below, above = values[0] - estimates[0].low, estimates[0].high - values[0]
        axes.errorbar(x, values, yerr=[[below], [above]], fmt="D", markersize=4, capsize=3, label=label)


def _layers(report: ProbeReport) -> list[int]:
    """Return the layers in order; only 0 if every key is model-wide."""
    return sorted({result.layer for result in report.results if result.layer is not None}) or [0]
