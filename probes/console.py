"""Shows a `ProbeReport` in a terminal: AUROC by hook point and layer, the honest best, the baselines, the notes."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from probes.report import ProbeReport


def render(report: ProbeReport) -> RenderableType:
    """Return the report as something rich can print: one row per layer, one column per hook point."""
    return Group(
        _header(report), _layers(report), _summary(report), *(Text(f"! {note}", "yellow") for note in report.notes())
    )


def _header(report: ProbeReport) -> Text:
    where = f"{report.positions} in {report.session}" if report.session else report.positions
    return Text(
        f"{report.label} read at {where}: {report.n_samples} samples of {report.n_problems} problems, "
        f"{report.prevalence:.0%} True, {report.n_folds} folds by problem"
    )


def _layers(report: ProbeReport) -> Table:
    layered = [result for result in report.keys if result.layer is not None]
    cells = {(result.layer, result.hook_point): str(result.estimate) for result in layered}
    hook_points = list(dict.fromkeys(result.hook_point for result in layered))
    table = Table(title="AUROC [95% interval]", title_justify="left")
    table.add_column("layer", justify="right")
    for hook_point in hook_points:
        table.add_column(hook_point)
    for layer in sorted({result.layer for result in layered if result.layer is not None}):
        table.add_row(str(layer), *(cells.get((layer, hook_point), "") for hook_point in hook_points))
    return table


def _summary(report: ProbeReport) -> Table:
    table = Table(box=None, show_header=False)
    for result in report.keys:
        if result.layer is None:
            table.add_row(result.key, str(result.estimate), "model-wide")
    table.add_row("best, chosen on inner folds", str(report.best.estimate), ", ".join(dict.fromkeys(report.best.keys)))
    for name, estimate in report.baselines.items():
        table.add_row(name.replace("_", " "), str(estimate), "baseline")
    return table
