"""`probes` and `steering`: how a request names what its tokens are scored with and what is added to its stream.

A saved probe is named by a path under one of the folders that the server's configuration allows, `FOLDER/NAME`; or a probe
comes with the request, as numbers. `requests.probes_and_steering` finds what the names stand for; here is the wire.
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
"""Numbers in a vector; no model's stream is wider."""

Number = Annotated[Float, Field(allow_inf_nan=False)]
Vector = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]],
    BeforeValidator(no_booleans),
    Field(min_length=1, max_length=MAX_WIDTH),
]
ProbePath = Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f]+$")]


class InlineProbe(BaseModel):
    """A probe that comes with the request: the score of a row x is `weight · (x − mean) / scale + bias`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=200, description="What the reply calls it.")
    key: str = Field(min_length=1, max_length=512, description="The stored key it reads, `layers.12.resid_post`.")
    weight: Vector = Field(description="As wide as the key's rows.")
    bias: Number = Field(0.0, description="Added to the product.")
    mean: Vector | None = Field(None, description="Zeros if absent.")
    scale: Vector | None = Field(None, description="Ones if absent; no number of it may be 0.")
    stop_when: StopWhen | None = Field(None, description="When its scores end the generation, or the reasoning.")

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


class NamedProbe(BaseModel):
    """A saved probe whose scores may act."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe: ProbePath = Field(description="A saved probe.")
    stop_when: StopWhen | None = Field(None, description="When its scores end the generation, or the reasoning.")

    @property
    def name(self) -> str:
        """What the reply calls it."""
        return self.probe


def _kind_of_probe(value: Any) -> str:
    """Tell the spellings of a probe apart, so that an error is about the one that was meant."""
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
    """One vector to add: `scale` times a saved probe's direction (of length 1), or times a vector as it is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe: ProbePath | None = Field(None, description="A saved probe.")
    output: Int | None = Field(None, ge=0, description="Which of a probe's directions, for one with several.")
    vector: Vector | None = Field(None, description="Numbers, as many as the stream is wide.")
    hook_point: str | None = Field(
        None, min_length=1, max_length=64, description="Where; a saved probe's own, else `resid_post`."
    )
    layer: Int | None = Field(
        None, description="Where; a saved probe's own by default. Negative ones count from the end."
    )
    scale: Number = Field(description="What the vector is multiplied by.")
    positions: SteeredPositions = "all"

    @model_validator(mode="after")
    def _one_source(self) -> "SteeringRequest":
        if (self.probe is None) == (self.vector is None):
            raise ValueError("probe: give either a saved probe or a vector")
        if self.output is not None and self.probe is None:
            raise ValueError("output: only of a saved probe")
        return self


def format_scores(
    scorers: tuple[RequestProbe, ...],
    probed: list[jaxtyping.Float[Tensor, "rows outputs"]],
    n_prompt: int,
    start: int = 0,
    acted: Sequence[Acted] = (),
) -> list[ProbeScores]:
    """Return a choice's `probes`: what each probe gave the rows from position `start` on, and what its scores have done.

    A probe with one output gives a number per row, one with several a list of them.
    """
    spelled: list[ProbeScores] = [
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
        spelled[one.probe]["acted"] = {"then": one.then, "position": one.position, "score": one.score}
    return spelled


def actions_of(scorers: tuple[RequestProbe, ...], acted: Sequence[Acted]) -> list[ProbeAction]:
    """Return what the scores of probes have done, as a rollout's record says it."""
    return [
        ProbeAction(probe=scorers[one.probe].name, then=one.then, position=one.position, score=one.score)
        for one in acted
    ]
