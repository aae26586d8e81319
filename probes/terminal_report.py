"""Renders a `ProbeReport` for the terminal: the main metric by hook point and layer, the nested best, the baselines, the
notes."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from probes.plots import METRICS, called
from probes.report import ProbeReport


def render(report: ProbeReport) -> RenderableType:
    """Return a rich renderable of the report: one row per layer and position, one column per hook point."""
    return Group(
        _header(report),
        _layers(report),
        _summary(report),
        _names(report),
        *(Text(f"! {note}", "yellow") for note in report.notes()),
    )


def _header(report: ProbeReport) -> Text:
    places = ", ".join(report.positions)
    where = f"{places} in {report.session}" if report.session else places
    templates = report.n_groups is not None and report.n_groups < report.n_problems
    grouped = f" ({report.n_groups} groups: templates count once)" if templates else ""
    share = "" if report.prevalence is None else f", {report.n_true} True ({report.prevalence:.1%})"
    return Text(
        f"{report.label} read by {report.kind} at {where}: {report.n_samples} samples of {report.n_problems} problems{grouped}"
        f"{share}, {report.n_folds} folds by problem"
    )


def _layers(report: ProbeReport) -> Table:
    layered = [result for result in report.results if result.layer is not None]
    cells = {(result.layer, result.positions, result.hook_point): str(result.estimate) for result in layered}
    hook_points = list(dict.fromkeys(result.hook_point for result in layered))
    several = len(report.positions) > 1
    table = Table(title=f"{called(report)} [95% interval]", title_justify="left")
    table.add_column("layer", justify="right")
    if several:
        table.add_column("position", overflow="fold")
    for hook_point in hook_points:
        table.add_column(hook_point, overflow="fold")  # wraps, so that values are never truncated
    for positions in report.positions:
        for layer in sorted({result.layer for result in layered if result.layer is not None}):
            place = [positions] if several else []
            table.add_row(str(layer), *place, *(cells.get((layer, positions, name), "") for name in hook_points))
        table.add_section()
    return table


def _summary(report: ProbeReport) -> Table:
    table = Table(box=None, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for result in report.results:
        if result.layer is None:
            name = result.key if len(report.positions) == 1 else result.name
            table.add_row(name, str(result.estimate), "model-wide")
    table.add_row("best, chosen on inner folds", str(report.best.estimate), "")
    for name, estimate in report.best.metrics.items():
        if name != report.metric:
            plain = report.forecast.get(name)
            beside = "" if plain is None else f"without any input {plain}"
            table.add_row(f"  its {METRICS[name]}", str(estimate), beside)
    if report.declared is not None:
        table.add_row("declared beforehand", str(report.declared.estimate), "")
    for name, estimate in report.baselines.items():
        table.add_row(name.replace("_", " "), str(estimate), "baseline")
    return table


def _names(report: ProbeReport) -> Text:
    """Print probe names outside of tables, so that they are never truncated and can be copied into the next command."""
    lines = [f"best: {name}" for name in dict.fromkeys(report.best.names)]
    if report.declared is not None:
        lines.append(f"declared beforehand: {report.declared.names[0]}")
    return Text("\n".join(lines))
