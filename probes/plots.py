"""Pictures of a `ProbeReport`.

Figures are made with matplotlib's objects, not with pyplot: pyplot keeps every figure in a global list and picks a
display, and neither belongs in a library that runs on a cluster. `figure.savefig(path)` then writes it.
"""

from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probes.report import KeyResult, ProbeReport

MOST_TICKS = 16


def auroc_by_layer(report: ProbeReport) -> Figure:
    """Draw AUROC over layers, one line per hook point with its 95% interval, beside chance and prompt length.

    Model-wide hook points are points with bars: `embed` left of the layers, any other to their right.
    """
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for hook_point, results in groupby(report.keys, key=lambda result: result.hook_point):
        _draw_hook_point(axes, report, hook_point, list(results))

    length = report.baselines["prompt_length"]
    axes.axhline(0.5, color="0.6", linewidth=1, label="chance")
    axes.axhline(length.auroc, color="0.3", linewidth=1, linestyle="--", label=f"prompt length ({length.auroc:.2f})")

    axes.set_title(
        f"Reading “{report.label}” at {report.positions}: best {report.best.estimate} (chosen on inner folds)",
        loc="left",
        fontsize="medium",
    )
    axes.set_xlabel("layer")
    axes.set_ylabel("AUROC, problems unseen in training")
    axes.set_ylim(min(0.3, *(result.estimate.low for result in report.keys)) - 0.02, 1.02)
    layers = _layers(report)
    axes.set_xticks(layers[:: -(-len(layers) // MOST_TICKS)])
    axes.set_xlim(layers[0] - 1.5, layers[-1] + 1.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def _draw_hook_point(axes: Axes, report: ProbeReport, hook_point: str, results: list[KeyResult]) -> None:
    layers = _layers(report)
    outside = layers[0] - 1 if hook_point == "embed" else layers[-1] + 1
    x = [outside if result.layer is None else result.layer for result in results]
    estimates = [result.estimate for result in results]
    auroc = [e.auroc for e in estimates]
    if len(results) > 1:
        (line,) = axes.plot(x, auroc, marker="o", markersize=3, label=hook_point)
        low, high = [e.low for e in estimates], [e.high for e in estimates]
        axes.fill_between(x, low, high, alpha=0.1, linewidth=0, color=line.get_color())
    else:  # one point has no band: give it bars
        below, above = auroc[0] - estimates[0].low, estimates[0].high - auroc[0]
        axes.errorbar(x, auroc, yerr=[[below], [above]], fmt="D", markersize=4, capsize=3, label=hook_point)


def _layers(report: ProbeReport) -> list[int]:
    """Return the layers in order; only 0 if every key is model-wide."""
    return sorted({result.layer for result in report.keys if result.layer is not None}) or [0]
