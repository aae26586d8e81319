"""The page of a stopping sweep: accuracy against tokens, and the chosen settings; a self-contained static HTML file."""

import base64
import io

from matplotlib.figure import Figure

from probes.report import Estimate
from probes.stopping.findings import StopFinding, StopReport, rows
from probes.styles import COLORS, DPI, REFERENCE, WIDTH, darken
from roentgen.pages import page_environment

LOOKS = {
    "probe": ("the probe", COLORS[0], "o"),
    "random": ("random directions", COLORS[5], "v"),
    "fixed_length": ("a fixed length", COLORS[1], "s"),
    "convergence": ("answer convergence", COLORS[3], "D"),
}


def draw(report: StopReport) -> Figure:
    """Plot each setting's accuracy over its tokens, and the chosen setting of each family with its intervals."""
    figure = Figure(figsize=(WIDTH, 4.0), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(report.whole.accuracy.value, color=REFERENCE, linewidth=1, linestyle="--", label="whole answers")
    for kind, (label, color, marker) in LOOKS.items():
        own = [finding for finding in report.findings if finding.setting.kind == kind]
        if own:
            axes.plot(
                [finding.tokens.value for finding in own], [finding.accuracy.value for finding in own], marker,
                color=color, markersize=3, alpha=0.45, label=label,
            )  # fmt: skip
    for one in report.chosen:
        if one.finding is not None:
            _, color, marker = LOOKS[one.kind]
            _point(axes, one.finding, color, marker)
    if report.live is not None:
        live = report.live
        axes.plot(live.tokens.value, live.accuracy.value, "*", color=COLORS[4], markersize=11, label="the probe, live")
    axes.set_xlabel("tokens per answer")
    axes.set_ylabel(f"accuracy, {report.problems[1]} problems that nothing was chosen on", fontsize="small")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def _point(axes: object, found: StopFinding, color: str, marker: str) -> None:
    accuracy, tokens = found.accuracy, found.tokens
    axes.errorbar(  # type: ignore[attr-defined]
        tokens.value, accuracy.value,
        xerr=_arms(tokens),
        yerr=_arms(accuracy),
        fmt=marker, color=color, markersize=8, markeredgecolor=REFERENCE, linewidth=1,
    )  # fmt: skip


def _arms(found: Estimate) -> list[list[float]]:
    """Return the extent of an interval below and above its estimate, at least 0 in spite of rounding."""
    return [[max(found.value - found.low, 0.0)], [max(found.high - found.value, 0.0)]]


def render_page(report: StopReport) -> tuple[str, bytes]:
    """Return the page, and its picture as a PNG file."""
    figure = draw(report)
    light, dark = _png(figure), _png(darken(figure))
    template = page_environment("probes").get_template("stopping.html")
    page = template.render(
        report=report, rows=rows(report), light=base64.b64encode(light).decode(), dark=base64.b64encode(dark).decode()
    )
    return page, light


def _png(figure: Figure) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()
