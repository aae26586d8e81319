"""Command-line options made from a pydantic model, so that an option is declared once: as a field with a description.

    @options_of(ServerConfig)
    def serve(port: Annotated[int, typer.Option(help="0 chooses a free one.")] = PORT, **options: Any) -> None:
        config = read_options(ServerConfig, options)

`options_of` puts the model's fields before the command's own options, in place of `**options`. A field is an option of its
name, type, default and description; a field without a default is an argument. Typer reads numbers, booleans and paths.
Everything else arrives as text, which the model's validators read: YAML, Python and the command line have one parser and one
error text.

A field's `json_schema_extra` may have `flags` (other spellings of the option) and `repeated` (an item for every time the option
is given, instead of one text).
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
    """Options that are not allowed; the message has a line for each."""


def options_of(
    model: type[BaseModel], *, leave_out: Collection[str] = (), panel: str | None = None, **defaults: Any
) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the model's fields as options, in place of its `**options`.

    Args:
        model: whose fields are options.
        leave_out: fields that are none.
        panel: the help's panel to show them in.
        defaults: of fields whose default is another one for this command.
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
    """Return the model that the options make.

    Args:
        model: what to make.
        values: the options by field name.
        error: what to raise.

    Raises:
        OptionError: if a value is not allowed, naming its option; or `error`.
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
    """Return the type that Typer reads a field as, and what the help shows in its place."""
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
    """Return an option's spellings; one that is on by default can be turned off."""
    flag = name.replace("_", "-")
    return _facts(field).get("flags", [f"--{flag}/--no-{flag}" if field.default is True else f"--{flag}"])


def _line(model: type[BaseModel], location: tuple[int | str, ...], message: str, value: Any) -> str:
    """Return one of pydantic's errors as a line; those of our own validators name the value already."""
    text = message.removeprefix("Value error, ")
    field = model.model_fields.get(str(location[0])) if location else None
    if field is None and location and message == "Extra inputs are not permitted":
        close = get_close_matches(str(location[0]), model.model_fields, 1)
        hint = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(model.model_fields)}"
        return f"{location[0]}: there is no such option; {hint}"
    if field is None:
        return text
    given = "" if text != message else f" (given: {value!r})"
    name = str(location[0])
    option = name.upper() if field.is_required() else _flags(name, field)[0].partition("/")[0]
    return f"{option}: {text[:1].lower() if given else text[:1]}{text[1:]}{given}"
