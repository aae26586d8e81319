"""Options: a command has its model's fields, with their defaults and descriptions; and what the docs say of them is true."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field
from typer.main import get_command
from typer.testing import CliRunner, Result

from eval_jobs.command import evaluate
from eval_jobs.settings import EvalSettings
from roentgen.cli import app
from roentgen.cli.eval_command import OF_THE_SERVER, LaunchOptions
from roentgen.cloud.task import ClusterSettings
from roentgen.contract import ActivationRequest
from roentgen.options import OptionError, options_of, read_options
from roentgen.workflows.command_settings import CaptureSettings, InspectSettings, SteerSettings, VerifySettings
from serve_app.config import ServerConfig

ROOT = Path(__file__).parents[2]


def commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command of an application under its name, `serve` or `probe steer`."""
    for word, one in getattr(command, "commands", {}).items():
        yield from commands(one, f"{name} {word}".strip())
    if not hasattr(command, "commands"):
        yield name, command


COMMANDS = dict(commands(get_command(app)))


def alone(function: Callable[..., Any]) -> Any:
    """Return a function as a command."""
    only = typer.Typer()
    only.command()(function)
    return get_command(only)


def differences(command: Any, models: dict[type[BaseModel], set[str]], **defaults: Any) -> list[str]:
    """Return in what a command is not its models: options that are missing, or have another default or help.

    Args:
        command: the command.
        models: its models, and which of their fields it leaves out.
        defaults: those of the command that are meant to differ from the models'.
    """
    found = []
    parameters = {one.name: one for one in command.params}
    for model, left_out in models.items():
        for name in model.model_fields.keys() - left_out:
            field, parameter = model.model_fields[name], parameters.get(name)
            if parameter is None:
                found.append(f"{name}: no option")
                continue
            if not parameter.help or parameter.help != field.description:
                found.append(f"{name}: help {parameter.help!r} is not {field.description!r}")
            given = {} if field.is_required() or parameter.default is None else {name: parameter.default}
            others = {other: "x" for other, one in model.model_fields.items() if one.is_required()}
            default = getattr(read_options(model, {**others, **given}), name)
            wanted = getattr(read_options(model, {**others, **{k: v for k, v in defaults.items() if k == name}}), name)
            if default != wanted:
                found.append(f"{name}: default {default!r} is not {wanted!r}")
    return found


@pytest.mark.parametrize(
    ("command", "models", "defaults"),
    [
        ("serve", {ServerConfig: set()}, {}),
        (
            "eval",
            {
                EvalSettings: set(),
                ClusterSettings: {"fresh", "taps", *OF_THE_SERVER},
                LaunchOptions: set(),
            },
            {"name": "roentgen-eval"},
        ),
        ("capture", {CaptureSettings: set()}, {}),
        ("inspect", {InspectSettings: set()}, {}),
        ("verify-capture", {VerifySettings: set()}, {}),
        ("up", {ClusterSettings: set()}, {"min_vram": 12}),
        ("probe steer", {SteerSettings: set()}, {}),
    ],
)
def test_a_command_is_its_models(
    command: str, models: dict[type[BaseModel], set[str]], defaults: dict[str, Any]
) -> None:
    assert differences(COMMANDS[command], models, **defaults) == []


def test_the_evaluation_is_the_same_command_without_the_cli() -> None:
    assert differences(alone(evaluate), {EvalSettings: set()}) == []


def test_training_probes_has_the_defaults_of_the_library() -> None:
    import probes

    for name, function in (("probe train", probes.train), ("probe compare", probes.compare)):
        parameters = inspect.signature(function).parameters.values()
        wanted = {p.name: ",".join(p.default) if isinstance(p.default, tuple) else p.default for p in parameters}
        given = {one.name: one.default for one in COMMANDS[name].params if one.param_type_name == "option"}
        assert given.items() <= wanted.items() | {("output", None)}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is(command: str) -> None:
    unsaid = [one.name for one in COMMANDS[command].params if not one.help]
    assert unsaid == []


def test_help_waits_for_nothing_heavy() -> None:
    heavy = {"ray", "openai", "datasets", "torch", "numpy", "transformers", "fastapi"}
    check = f"import sys, roentgen.cli; sys.exit(', '.join({heavy} & sys.modules.keys()) or 0)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False).stderr == ""


def test_an_option_that_is_declared_again_is_found() -> None:
    def again(
        samples: Annotated[int, typer.Option(help="Number of problems.")] = 4,
        offset: Annotated[int, typer.Option(help="Another text.")] = 0,
    ) -> None: ...

    left_out = EvalSettings.model_fields.keys() - {"samples", "offset", "seed"}
    assert sorted(differences(alone(again), {EvalSettings: left_out})) == [
        "offset: help 'Another text.' is not 'Number of problems to skip first.'",
        "samples: default 4 is not 3",
        "seed: no option",
    ]


class Tea(BaseModel):
    """An order of tea."""

    leaf: Path = Field(description="Where it is.")
    color: Literal["green", "black"] = Field(default="green", description="Of the leaf.")
    cups: int = Field(default=2, ge=1, description="How many.")
    milk: bool = Field(default=False, description="With it.")
    hot: bool = Field(default=True, description="Or iced.")
    guests: tuple[str, ...] = Field(
        default=(), description="Who comes.", json_schema_extra={"flags": ["--guest", "-g"], "repeated": True}
    )


def order(*words: str) -> Result:
    """Run a command that has the options of `Tea`, and one of its own."""

    @options_of(Tea, cups=3)
    def command(sugar: Annotated[int, typer.Option(help="Lumps.")] = 0, **options: Any) -> None:
        typer.echo(read_options(Tea, options).model_dump_json())
        typer.echo(f"sugar {sugar}")

    tea = typer.Typer()
    tea.command()(command)
    return CliRunner().invoke(tea, list(words), env={"COLUMNS": "200"})


def test_fields_become_options() -> None:
    done = order("tin", "--sugar", "1", "--guest", "Ada", "-g", "Bob", "--no-hot", "--milk")
    assert json.loads(done.stdout.splitlines()[0]) == {
        "leaf": "tin",
        "color": "green",
        "cups": 3,
        "milk": True,
        "hot": False,
        "guests": ["Ada", "Bob"],
    }
    assert done.stdout.splitlines()[1] == "sugar 1"
    shown = order("--help").stdout
    assert re.search(r"--color +\[green\|black\] +Of the leaf. \[default: green\]", shown)
    assert "--no-milk" not in shown
    assert [shown.index(name) for name in ("--color", "--guest", "--sugar")] == sorted(
        shown.index(name) for name in ("--color", "--guest", "--sugar")
    )


def test_every_wrong_option_is_named_as_it_was_given() -> None:
    with pytest.raises(OptionError) as caught:
        read_options(Tea, {"leaf": "tin", "cups": 0, "guests": [1], "hot": "very"})
    assert [line.partition(" (given")[0] for line in str(caught.value).splitlines()] == [
        "--cups: input should be greater than or equal to 1",
        "--hot: input should be a valid boolean, unable to interpret input",
        "--guest: input should be a valid string",
    ]
    with pytest.raises(OptionError, match=r"^LEAF: field required"):
        read_options(Tea, {})


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def shown_commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the commands of ours in a page's code blocks, and the options that they are given."""
    for block in re.findall(r"```\w*\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = re.sub(r"^\s*|(?<=\s)(?:#|\|).*", "", line).split()
            if words[:1] == ["roentgen"]:
                name = next((" ".join(words[1:n]) for n in (3, 2) if " ".join(words[1:n]) in COMMANDS), "")
                yield name, [word.partition("=")[0] for word in words if word.startswith("--")]


def unknown_options(text: str) -> list[str]:
    """Return the options in a page's code blocks that their commands do not have."""
    return [
        f"{name} {flag}"
        for name, flags in shown_commands(text)
        for flag in flags
        if not any(flag in [*one.opts, *one.secondary_opts] for one in COMMANDS[name].params)
    ]


def test_the_options_in_the_docs_are_there() -> None:
    assert sum(len(list(shown_commands(page.read_text()))) for page in PAGES) > 20
    assert [(page.name, option) for page in PAGES for option in unknown_options(page.read_text())] == []
    assert unknown_options("```\nroentgen serve --port 1 --speed 9\n```") == ["serve --speed"]


def test_the_page_of_the_cluster_has_every_option_of_a_cluster() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    options = [[*one.opts, *one.secondary_opts] for one in COMMANDS["up"].params]
    assert [flags for flags in options if not any(re.search(rf"`[^`]*{flag}\b", page) for flag in flags)] == []
    (table,) = re.findall(r"\| option \|.*?\n\n", page, re.S)
    assert set(re.findall(r"--[a-z][a-z-]*", table)) <= {flag for flags in options for flag in flags}
    defaults = {one.name: one.default for one in COMMANDS["up"].params}
    default = f"`up` takes {defaults['min_vram']} GB and port {defaults['port']} by default"
    assert f"{default}, `eval --launch` {ClusterSettings().min_vram} GB." in page


def test_the_page_of_the_routes_has_every_field_of_a_capture_with_its_default() -> None:
    page = (ROOT / "docs" / "http.md").read_text()
    section = page.partition("\n## Activations")[2].partition("\n\nThe two default hook points")[0]
    told = {name: text.strip("`") for name, text in re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section, re.M)}
    defaults = {}
    for name, value in ActivationRequest().model_dump(mode="json", by_alias=True).items():
        defaults[name] = value if isinstance(value, str) else json.dumps(value)
    absent = {"session_id": "one per server start", "key": "none", "since": "none"}
    assert told == {name: absent.get(name, text) for name, text in defaults.items()}
