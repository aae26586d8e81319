"""The tools that a model may call with `--mode with-tools`, in OpenAI's format.

A call never fails the rollout: an unknown tool or invalid arguments are answered with an error text that the model can act
on.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from eval_jobs.calculator import calculate


@dataclass(frozen=True)
class EvalTool:
    """A tool."""

    name: str
    """Name."""
    description: str
    """Description for the model."""
    argument: str
    """Name of its single argument, a text."""
    run: Callable[[str], str]
    """Computes the result of a call."""

    @property
    def definition(self) -> dict[str, Any]:
        """The entry in a request's `tools`."""
        parameters = {
            "type": "object",
            "properties": {self.argument: {"type": "string"}},
            "required": [self.argument],
            "additionalProperties": False,
        }
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


TOOLS: dict[str, EvalTool] = {
    tool.name: tool
    for tool in (
        EvalTool(
            "calculator",
            "Compute an arithmetic expression, such as (17 + 5) * 3 / 2. Also sqrt, abs, round, floor, ceil, min, max, gcd, "
            "lcm, factorial, log, exp.",
            "expression",
            calculate,
        ),
    )
}


class _Function(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: str
    arguments: str = "{}"


class ModelToolCall(BaseModel):
    """A tool call in a reply."""

    model_config = ConfigDict(extra="ignore")

    id: str
    type: str = "function"
    function: _Function


def answer(call: ModelToolCall) -> dict[str, str]:
    """Run a call and return the tool message."""
    return {"role": "tool", "tool_call_id": call.id, "content": _run(call.function)}


def _run(function: _Function) -> str:
    tool = TOOLS.get(function.name)
    if tool is None:
        return f"error: there is no tool {function.name!r}; there are: {', '.join(TOOLS)}"
    try:
        arguments = json.loads(function.arguments)
    except (ValueError, RecursionError) as error:
        return f"error: the arguments are not JSON: {error}"
    if not isinstance(arguments, dict) or arguments.keys() != {tool.argument}:
        return f'error: the arguments must be {{"{tool.argument}": "…"}}'
    value = arguments[tool.argument]
    if not isinstance(value, str | int | float):
        return f"error: {tool.argument} must be a text"
    return tool.run(str(value))
