"""Shows a `ProbeReport` in a terminal: the main metric by hook point and layer, the honest best, the baselines, the notes."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from probes.plots import METRICS
from probes.report import ProbeReport


def render(report: ProbeReport) -> RenderableType:
    """Return the report as something rich can print: one row per layer, one column per hook point and position."""
    return Group(
        _header(report), _layers(report), _summary(report), *(Text(f"! {note}", "yellow") for note in report.notes())
    )


def _header(report: ProbeReport) -> Text:
    places = ", ".join(report.positions)
    where = f"{places} in {report.session}" if report.session else places
    templates = report.n_groups is not None and report.n_groups < report.n_problems
    grouped = f" ({report.n_groups} groups: templates count once)" if templates else ""
    share = "" if report.prevalence is None else f", {report.prevalence:.0%} True"
    return Text(
        f"{report.label} read by {report.kind} at {where}: {report.n_samples} samples of {report.n_problems} problems{grouped}"
        f"{share}, {report.n_folds} folds by problem"
    )


def _layers(report: ProbeReport) -> Table:
    layered = [result for result in report.results if result.layer is not None]
    cells = {(result.layer, result.hook_point, result.positions): str(result.estimate) for result in layered}
    columns = list(dict.fromkeys((result.hook_point, result.positions) for result in layered))
    within = ", within problems" if report.within else ""
    table = Table(title=f"{METRICS[report.metric]}{within} [95% interval]", title_justify="left")
    table.add_column("layer", justify="right")
    for hook_point, positions in columns:
        table.add_column(hook_point if len(report.positions) == 1 else f"{hook_point}@{positions}")
    for layer in sorted({result.layer for result in layered if result.layer is not None}):
        table.add_row(str(layer), *(cells.get((layer, *column), "") for column in columns))
    return table


def _summary(report: ProbeReport) -> Table:
    table = Table(box=None, show_header=False)
    for result in report.results:
        if result.layer is None:
            table.add_row(result.key, str(result.estimate), "model-wide")
    table.add_row("best, chosen on inner folds", str(report.best.estimate), ", ".join(dict.fromkeys(report.best.names)))
    for name, estimate in report.best.metrics.items():
        if name != report.metric:
            plain = report.forecast.get(name)
            beside = "" if plain is None else f"without reading anything {plain}"
            table.add_row(f"  its {METRICS[name]}", str(estimate), beside)
    if report.declared is not None:
        table.add_row("named beforehand", str(report.declared.estimate), report.declared.names[0])
    for name, estimate in report.baselines.items():
        table.add_row(name.replace("_", " "), str(estimate), "baseline")
    return table
