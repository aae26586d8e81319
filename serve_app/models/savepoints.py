"""Savepoints: hook points with names of their own, given when a model is loaded, which requests can use.

A selector is a module's path from the root, with layers as `layers[12]` or `layers.12`, optionally followed by `.input` or
`.output`. It is parsed by one regular expression and looked up among the model's modules; nothing of it is evaluated.
"""

import re
from typing import get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from roentgen.contract import LAYER_HOOK_POINTS, MODEL_HOOK_POINTS
from serve_app.capture.structure import Side, Tap

_PART = r"(?:[A-Za-z_]\w*(?:\[\d+\])*|\d+)"
SELECTOR = re.compile(rf"{_PART}(?:\.{_PART})*", re.ASCII)


class Savepoint(BaseModel):
    """A name for a location in the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-]{1,64}$", description="What requests call it; not a canonical hook point's name."
    )
    selector: str = Field(
        max_length=512,
        json_schema_extra={"pattern": f"^{SELECTOR.pattern}$"},
        description="Where it is, such as `model.layers[12].mlp` (its output) or `model.layers.12.mlp.input`.",
    )

    @field_validator("name")
    @classmethod
    def _no_hook_point(cls, name: str) -> str:
        if name in LAYER_HOOK_POINTS or name in MODEL_HOOK_POINTS:
            raise ValueError(f"{name!r} is the name of a canonical hook point; choose another")
        return name

    @field_validator("selector")
    @classmethod
    def _safe(cls, selector: str) -> str:
        if not SELECTOR.fullmatch(selector):
            raise ValueError(
                f"{selector!r} is not a selector; a selector is a module path with integer indices, then optionally .input "
                "or .output, such as model.layers[12].mlp.output"
            )
        return selector

    @property
    def tap(self) -> Tap:
        """The location: the module's output if the selector has no side."""
        path = re.sub(r"\[(\d+)\]", r".\1", self.selector)
        module, _, side = path.rpartition(".")
        if module and side in get_args(Side):
            return Tap(module, "input" if side == "input" else "output")
        return Tap(path, "output")


def unique_names(savepoints: tuple[Savepoint, ...]) -> tuple[Savepoint, ...]:
    """Return the savepoints, if their names are unique.

    Raises:
        ValueError: naming the first that is used twice.
    """
    names = [savepoint.name for savepoint in savepoints]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"the name {twice!r} is used twice")
    return savepoints
