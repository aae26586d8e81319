"""`roentgen inspect`: list a model's hook points."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from roentgen.cli.console import expected_errors, out, table_of
from roentgen.contract import LAYER_HOOK_POINTS, MODEL_HOOK_POINTS
from roentgen.options import options_of, read_options
from roentgen.workflows.command_settings import InspectSettings

if TYPE_CHECKING:
    from serve_app.capture.structure import ModelStructure


@options_of(InspectSettings)
def inspect(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole record as JSON.")] = False, **options: Any
) -> None:
    """List a model's hook points: the module of each one, or why it is missing."""
    from serve_app.models.inspection import inspect_model

    with expected_errors():
        asked = read_options(InspectSettings, options)
        structure = inspect_model(asked.model, revision=asked.revision, config_only=asked.config_only)
    if as_json:
        out.print_json(data=structure.record())
        return
    s = structure
    out.print(
        f"[bold]{s.model_name}[/bold]  {s.architecture} ({s.model_type}), {s.num_layers} layers of width {s.d_model:,} at "
        f"{s.layers_path}; verified on {s.verified_on}",
        highlight=False,
        soft_wrap=True,
    )
    out.print(hook_point_table(structure))


def hook_point_table(structure: "ModelStructure") -> Table:
    """Return a table of a model's hook points: module, side (input or output) and layers, or why one is missing."""
    from serve_app.capture.structure import ranges

    table = table_of("hook point", "module", "side", "layers")
    for name in LAYER_HOOK_POINTS:
        for place, layers in structure.locations(name).items():
            module, _, side = place.rpartition(".")
            table.add_row(name, module, side, "all" if len(layers) == structure.num_layers else ranges(layers))
        for reason, layers in structure.absences(name).items():
            everywhere = len(layers) == structure.num_layers
            table.add_row(name, f"[dim]missing: {reason}[/dim]", "", "" if everywhere else ranges(layers))
    for name in MODEL_HOOK_POINTS:
        tap = structure.taps.get(name)
        if tap is not None:
            table.add_row(name, tap.module, tap.side, "")
        else:
            table.add_row(name, f"[dim]missing: {structure.missing[name]}[/dim]", "", "")
    return table
