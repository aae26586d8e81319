"""Creates command-line options from a pydantic model, so that an option is declared once, as a field with a description.

    @options_of(ServerConfig)
    def serve(port: Annotated[int, typer.Option(help="0 chooses a free one.")] = PORT, **options: Any) -> None:
        config = read_options(ServerConfig, options)

`options_of` replaces `**options` by the model's fields, before the command's own options. A field becomes an option with its
name, type, default and description; a field without a default becomes an argument. Typer parses numbers, booleans and paths.
All other values are passed as text to the model's validators, so that YAML, Python and the command line share one parser and
its error messages.

A field's `json_schema_extra` may contain `flags` (other names of the option) and `repeated` (the option may be given several
times, once per item).
"""

import inspect
import types
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from roentgen.errors import RoentgenError

Model = TypeVar("Model", bound=BaseModel)
Command = TypeVar("Command", bound=Callable[..., Any])


class OptionError(RoentgenError, ValueError):
    """Options with values that are not allowed; the message has one line per option."""


def options_of(
    model: type[BaseModel], *, leave_out: Collection[str] = (), panel: str | None = None, **defaults: Any
) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the model's fields as options, in place of its `**options`.

    Args:
        model: the model.
        leave_out: fields without an option.
        panel: the panel of the help text.
        defaults: other defaults for this command, by field.
    """

    def decorate(command: Command) -> Command:
        fields = [
            _parameter(name, field, defaults.get(name, field.get_default(call_default_factory=True)), panel)
            for name, field in model.model_fields.items()
            if name not in leave_out
        ]
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        # Typer reads a command's options from its signature.
        command.__signature__ = inspect.Signature([*fields, *own])  # type: ignore[attr-defined]
        return command

    return decorate


def read_options(model: type[Model], values: Mapping[str, Any], error: type[Exception] = OptionError) -> Model:
    """Create the model from parsed options.

    Args:
        model: the model.
        values: the options by field name.
        error: type of the error to raise.

    Raises:
        OptionError: or `error`, if a value is not allowed; the message names the option.
    """
    try:
        return model.model_validate(values)
    except ValidationError as wrong:
        lines = [_line(model, one["loc"], one["msg"], one["input"]) for one in wrong.errors()]
        raise error("\n".join(dict.fromkeys(lines))) from wrong


def _parameter(name: str, field: FieldInfo, default: Any, panel: str | None) -> inspect.Parameter:
    kind, metavar = _read_as(field)
    info: Any
    if field.is_required():
        info, default = typer.Argument(help=field.description), inspect.Parameter.empty
    else:
        info = typer.Option(*_flags(name, field), help=field.description, metavar=metavar, rich_help_panel=panel)
        if kind is str and default is not None:
            default = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        kind = kind | None if default is None else kind
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=default)


def _read_as(field: FieldInfo) -> tuple[Any, str | None]:
    """Return a field's type for Typer, and its placeholder in the help text."""
    if _facts(field).get("repeated"):
        return list[str], None
    annotation = field.annotation
    united = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    plain = [get_args(one)[0] if get_origin(one) is Annotated else one for one in united if one is not type(None)]
    if len(plain) > 1:
        return str, None
    if get_origin(plain[0]) is Literal:
        return str, f"[{'|'.join(get_args(plain[0]))}]"
    return plain[0] if plain[0] in (bool, int, float, Path) else str, None


def _facts(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _flags(name: str, field: FieldInfo) -> list[str]:
    """Return an option's flags; a flag that is on by default gets one to turn it off."""
    flag = name.replace("_", "-")
    flags: list[str] = _facts(field).get("flags", [f"--{flag}/--no-{flag}" if field.default is True else f"--{flag}"])
    return flags


def _line(model: type[BaseModel], location: tuple[int | str, ...], message: str, value: Any) -> str:
    """Format one of pydantic's errors as a line; errors of our own validators already contain the value."""
    text = message.removeprefix("Value error, ")
    field = model.model_fields.get(str(location[0])) if location else None
    if field is None and location and message == "Extra inputs are not permitted":
        close = get_close_matches(str(location[0]), model.model_fields, 1)
        hint = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(model.model_fields)}"
        return f"{location[0]}: unknown option; {hint}"
    if field is None:
        return text
    given = "" if text != message else f" (given: {value!r})"
    name = str(location[0])
    option = name.upper() if field.is_required() else _flags(name, field)[0].partition("/")[0]
    return f"{option}: {text[:1].lower() if given else text[:1]}{text[1:]}{given}"
