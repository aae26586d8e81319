"""Writes docs/api.md from the docstrings of the public names of `roentgen`; tests/test_api_page.py holds the page to them.

python tools/api_page.py > docs/api.md
"""

import ast
import inspect
import re
import textwrap
from types import ModuleType
from typing import Any

import roentgen

INTRO = """\
# Python library

`tools/api_page.py` makes this page from the docstrings; `roentgen.__all__` lists the names. They are stable within a minor
version. `import roentgen` is fast and imports neither torch nor Ray: a name is loaded when it is first used. Install from the
wheel or the repository ([README](../README.md#install)). Everything is typed (`py.typed`); the
[examples](../examples/README.md) run as they stand.

In a notebook, all functions work inside the running event loop, and rollouts, runs and probes display as HTML. What uses a
server also has coroutines: `async with roentgen.serve(…) as server`, `server.async_client`,
`await roentgen.evaluate_async(…)`. On Ctrl-C or cancellation, everything that was started is stopped, and what was recorded
stays. Several evaluations can run at once, in threads or coroutines.

A mistake in a script, or a failure around it, raises a `RoentgenError`. Its one line names the argument, the value and what
is allowed. `RequestError`, and the errors that the functions below name, are subclasses. An argument of a wrong type raises
`TypeError`.

"""

WIDTH = 124


def page() -> str:
    """Return the page."""
    parts = [INTRO]
    values = {name: getattr(roentgen, name) for name in roentgen.__all__}
    # What one begins with comes first: functions, modules, then what they take and give.
    for name, value in sorted(
        values.items(), key=lambda item: (inspect.isclass(item[1]), isinstance(item[1], ModuleType))
    ):
        if inspect.isfunction(value):
            parts.append(function(f"roentgen.{name}", value, "##"))
        elif inspect.isclass(value):
            parts.append(described_class(name, value))
        elif isinstance(value, ModuleType):
            parts.append(f"## `roentgen.{name}`\n\n{prose(value.__doc__ or '')}\n\n")
            parts += [described(f"roentgen.{name}", one, getattr(value, one)) for one in value.__all__]
    return "".join(parts).rstrip() + "\n"


def described(home: str, name: str, value: Any) -> str:
    """Return what a module has, a function or a class."""
    if inspect.isfunction(value):
        return function(f"{home}.{name}", value, "###")
    return described_class(name, value, home, "###")


def described_class(name: str, kind: type, home: str = "roentgen", level: str = "##") -> str:
    """Return a class: what it is, its fields and properties, its methods."""
    text = f"{level} `{home}.{name}`\n\n{prose(inspect.getdoc(kind) or '')}\n\n"
    told = dict(fields(kind))
    for one, value in own(kind):
        if isinstance(value, property):
            told[one] = inspect.getdoc(value) or ""
    text += "".join(f"- `{one}`: {flowing(doc)}\n" for one, doc in told.items() if doc)
    text += "\n" if told else ""
    for one, value in own(kind):
        method = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if inspect.isfunction(method):
            text += function(f"{name}.{one}", method, level + "#")
    return text


def own(kind: type) -> list[tuple[str, Any]]:
    """Return the public attributes that a class has of its own packages, those of its bases first."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] in ("roentgen", "serve_app", "eval_jobs", "probes"):
            found |= vars(base)
    public = {name: value for name, value in found.items() if not name.startswith("_") or name == "__getitem__"}
    return list(public.items())


def fields(kind: type) -> list[tuple[str, str]]:
    """Return the fields of a class with the docstrings below them."""
    found = []
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] not in ("roentgen", "serve_app", "eval_jobs", "probes"):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, below in zip(node.body, node.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)):
                continue
            if not field.target.id.startswith("_"):
                found.append((field.target.id, inspect.cleandoc(ast.literal_eval(below.value))))
    return found


def function(name: str, value: Any, level: str) -> str:
    """Return a function: how it is called, and its docstring."""
    shown = [
        display_name(parameter)
        for parameter in inspect.signature(value).parameters.values()
        if parameter.name != "self"
    ]
    kinds = [p.kind for p in inspect.signature(value).parameters.values() if p.name != "self"]
    first = next((i for i, kind in enumerate(kinds) if kind is inspect.Parameter.KEYWORD_ONLY), None)
    if first is not None and inspect.Parameter.VAR_POSITIONAL not in kinds:
        shown.insert(first, "*")
    call = textwrap.fill(f"{name}({', '.join(shown)})", WIDTH, subsequent_indent="    ", break_long_words=False)
    return f"{level} `{name}`\n\n```python\n{call}\n```\n\n{prose(inspect.getdoc(value) or '')}\n\n"


def display_name(parameter: inspect.Parameter) -> str:
    """Return a parameter as it stands in a call; what is not a plain value is left out."""
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
    plain = isinstance(parameter.default, str | int | float | tuple | None.__class__)
    written = f'"{parameter.default}"' if isinstance(parameter.default, str) else repr(parameter.default)
    default = "" if parameter.default is inspect.Parameter.empty else f"={written}" if plain else "=…"
    return f"{stars}{parameter.name}{default}"


def prose(docstring: str) -> str:
    """Return a docstring with its sections as lists."""
    lines = []
    for block in re.split(r"\n(?=(?:Args|Raises|Attributes|Returns):\n)", docstring.strip()):
        head, _, body = block.partition("\n")
        if head not in ("Args:", "Raises:", "Attributes:", "Returns:"):
            lines.append(block.strip())
            continue
        entries = re.split(r"\n(?=\S)", textwrap.dedent(body).strip())
        named = [entry.partition(": ") for entry in entries]
        title = {"Args:": "Arguments"}.get(head, head[:-1])
        listed = "\n".join(f"- `{name.strip()}`: {flowing(text)}" for name, _, text in named)
        lines.append(f"*{title}*\n\n{listed}")
    return "\n\n".join(lines)


def flowing(text: str) -> str:
    """Return text on one line."""
    return " ".join(text.split())


if __name__ == "__main__":
    print(page(), end="")
