"""`probes` and `steering`: how a request names what its tokens are scored with and what is added to its stream.

A saved probe is named by a path under one of the folders that the server's configuration allows, `FOLDER/NAME`; or a probe
comes with the request, as numbers. `requests.probes_and_steering` finds what the names stand for; here is the wire.
"""

from typing import Annotated

import jaxtyping
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from torch import Tensor

from roentgen.contract import Float, Int, Positions, no_booleans
from serve_app.capture.scoring import Scorer
from serve_app.openai_api.schemas import ProbeScores

MAX_PROBES = 16
MAX_ADDITIONS = 16
MAX_WIDTH = 65_536
"""Numbers in a vector; no model's stream is wider."""

Number = Annotated[Float, Field(allow_inf_nan=False)]
Vector = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]],
    BeforeValidator(no_booleans),
    Field(min_length=1, max_length=MAX_WIDTH),
]
ProbePath = Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f]+$")]

STEERING_LABEL = "steering"
"""The label that the rollouts of steered requests carry, and no others."""

STEERABLE = ("all", "prompt", "generated", "last_prompt", "stride:k")


def _knowable(value: str) -> str:
    """Refuse policies that say which rows only when all are there."""
    positions = Positions.parse(value)
    if positions.pooled or positions.policy == "last":
        raise ValueError(f"{value!r} does not say which rows while they are made; allowed are {', '.join(STEERABLE)}")
    return str(positions)


class InlineProbe(BaseModel):
    """A probe that comes with the request: the score of a row x is `weight · (x − mean) / scale + bias`.

    Attributes:
        name: what the reply calls it.
        key: the stored key it reads, `layers.12.resid_post`.
        weight: as wide as the key's rows.
        bias: added to the product.
        mean: zeros if absent.
        scale: ones if absent; no number of it may be 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=200)
    key: str = Field(min_length=1, max_length=512)
    weight: Vector
    bias: Number = 0.0
    mean: Vector | None = None
    scale: Vector | None = None

    @model_validator(mode="after")
    def _fits(self) -> "InlineProbe":
        for part in ("mean", "scale"):
            values = getattr(self, part)
            if values is not None and len(values) != len(self.weight):
                raise ValueError(
                    f"{part}: has {len(values)} numbers and weight {len(self.weight)}; they must be as many"
                )
        if self.scale is not None and 0 in self.scale:
            raise ValueError("scale: a row cannot be divided by 0")
        return self


ProbeRequest = Annotated[
    Annotated[ProbePath, Tag("probe-path")] | Annotated[InlineProbe, Tag("probe-inline")],
    Discriminator(lambda value: "probe-path" if isinstance(value, str) else "probe-inline"),
]


class SteeringRequest(BaseModel):
    """One vector to add: `scale` times a saved probe's direction (of length 1), or times a vector as it is given.

    Attributes:
        probe: a saved probe.
        output: which of a probe's directions, for one with several.
        vector: numbers, as many as the stream is wide.
        hook_point: where; a saved probe's own, else `resid_post`.
        layer: where; a saved probe's own by default. Negative ones count from the end.
        scale: factor.
        positions: to which rows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe: ProbePath | None = None
    output: Annotated[Int, Field(ge=0)] | None = None
    vector: Vector | None = None
    hook_point: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    layer: Int | None = None
    scale: Number
    positions: Annotated[str, AfterValidator(_knowable)] = "all"

    @model_validator(mode="after")
    def _one_source(self) -> "SteeringRequest":
        if (self.probe is None) == (self.vector is None):
            raise ValueError("probe: give either a saved probe or a vector")
        if self.output is not None and self.probe is None:
            raise ValueError("output: only of a saved probe")
        return self


def spell_scores(
    scorers: tuple[Scorer, ...], probed: list[jaxtyping.Float[Tensor, "rows outputs"]], n_prompt: int, start: int = 0
) -> list[ProbeScores]:
    """Return a choice's `probes`: what each probe gave the rows from position `start` on.

    A probe with one output gives a number per row, one with several a list of them.
    """
    return [
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
