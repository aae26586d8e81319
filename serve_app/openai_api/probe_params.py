"""The request fields `probes` and `steering`.

A saved probe is named by its path inside one of the folders that the server's configuration allows, `FOLDER/NAME`. A probe may
also be sent with the request, as numbers. `requests.probes_and_steering` resolves these fields.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import jaxtyping
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from torch import Tensor

from roentgen.contract import Float, Int, ProbeAction, SteeredPositions, no_booleans
from roentgen.stop_rule import StopWhen
from serve_app.capture.probe_scores import RequestProbe
from serve_app.engines.probe_stopping import Acted
from serve_app.openai_api.schemas import ProbeScores

MAX_PROBES = 16
MAX_ADDITIONS = 16
MAX_WIDTH = 65_536
"""Maximum width of a vector; no model's residual stream is wider."""

Number = Annotated[Float, Field(allow_inf_nan=False)]
Vector = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]],
    BeforeValidator(no_booleans),
    Field(min_length=1, max_length=MAX_WIDTH),
]
ProbePath = Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f]+$")]


class InlineProbe(BaseModel):
    """A probe sent with the request: the score of a row x is `weight · (x − mean) / scale + bias`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=200, description="The probe's name in the reply.")
    key: str = Field(
        min_length=1, max_length=512, description="The stored key that it reads, such as `layers.12.resid_post`."
    )
    weight: Vector = Field(description="Weights, one per feature of the key's rows.")
    bias: Number = Field(0.0, description="The bias.")
    mean: Vector | None = Field(None, description="Mean to subtract; zeros if absent.")
    scale: Vector | None = Field(None, description="Scale to divide by, without zeros; ones if absent.")
    stop_when: StopWhen | None = Field(
        None, description="Condition on its scores that ends the generation or the reasoning."
    )

    @model_validator(mode="after")
    def _fits(self) -> "InlineProbe":
        for part in ("mean", "scale"):
            values = getattr(self, part)
            if values is not None and len(values) != len(self.weight):
                raise ValueError(
                    f"{part}: has {len(values)} numbers but weight has {len(self.weight)}; the lengths must be equal"
                )
        if self.scale is not None and 0 in self.scale:
            raise ValueError("scale: 0 is not allowed")
        return self


class NamedProbe(BaseModel):
    """A saved probe, with an optional stop rule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe: ProbePath = Field(description="The saved probe, FOLDER/NAME.")
    stop_when: StopWhen | None = Field(
        None, description="Condition on its scores that ends the generation or the reasoning."
    )

    @property
    def name(self) -> str:
        """The probe's name in the reply."""
        return self.probe


def _kind_of_probe(value: Any) -> str:
    """Return the kind of a probe's value, so that an error concerns only that kind."""
    if isinstance(value, str):
        return "probe-path"
    named = isinstance(value, NamedProbe) or (isinstance(value, dict) and "probe" in value)
    return "probe-named" if named else "probe-inline"


ProbeRequest = Annotated[
    Annotated[ProbePath, Tag("probe-path")]
    | Annotated[NamedProbe, Tag("probe-named")]
    | Annotated[InlineProbe, Tag("probe-inline")],
    Discriminator(_kind_of_probe),
]


class SteeringRequest(BaseModel):
    """A steering vector: `scale` times a saved probe's direction (of length 1), or times the given vector."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe: ProbePath | None = Field(None, description="A saved probe, FOLDER/NAME.")
    output: Int | None = Field(None, ge=0, description="Index of the direction, for a probe with several.")
    vector: Vector | None = Field(None, description="A vector of the residual stream's width.")
    hook_point: str | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="Hook point to steer. Default: the saved probe's own, else `resid_post`.",
    )
    layer: Int | None = Field(
        None, description="Layer to steer; negative numbers count from the end. Default: the saved probe's own."
    )
    scale: Number = Field(description="Factor of the vector.")
    positions: SteeredPositions = "all"

    @model_validator(mode="after")
    def _one_source(self) -> "SteeringRequest":
        if (self.probe is None) == (self.vector is None):
            raise ValueError("probe: send exactly one of probe and vector")
        if self.output is not None and self.probe is None:
            raise ValueError("output: allowed only with a saved probe")
        return self


def format_scores(
    scorers: tuple[RequestProbe, ...],
    probed: list[jaxtyping.Float[Tensor, "rows outputs"]],
    n_prompt: int,
    start: int = 0,
    acted: Sequence[Acted] = (),
) -> list[ProbeScores]:
    """Return a choice's `probes`: each probe's scores of the rows from position `start`, and the action that it took.

    A probe with one output has a number per row, a probe with several a list.
    """
    formatted: list[ProbeScores] = [
        {
            "probe": scorer.name,
            "key": scorer.key,
            "label": scorer.label,
            "classes": list(scorer.classes),
            "unit": scorer.unit,
            "n_prompt": n_prompt,
            "start": start,
            "scores": (scores[:, 0] if scores.shape[1] == 1 else scores).tolist(),
        }
        for scorer, scores in zip(scorers, probed, strict=True)
    ]
    for one in acted:
        formatted[one.probe]["acted"] = {"then": one.then, "position": one.position, "score": one.score}
    return formatted


def actions_of(scorers: tuple[RequestProbe, ...], acted: Sequence[Acted]) -> list[ProbeAction]:
    """Return the actions of probes in the format of a rollout's record."""
    return [
        ProbeAction(probe=scorers[one.probe].name, then=one.then, position=one.position, score=one.score)
        for one in acted
    ]
