"""When the scores of a probe end a generation: one rule, for a request while it runs and for stored rows afterwards.

A `StopWhen` says above which score, for how many tokens in a row, and of which tokens. `find_stop` finds the token at which
that is so. An engine calls it with each new score, `roentgen probe stop` with all scores of a stored rollout, so both stop at
the same token.

The score of a token is of the row where the token was fed. It comes from the forward that also samples the next token, which
is thrown away: the token whose score ends a generation is the last one of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from roentgen.contract import MAX_INT32, Int, ProbeEffect, read_numbers
from roentgen.contract import Float as Number

if TYPE_CHECKING:  # the command's help waits for nothing heavy
    import numpy as np
    from jaxtyping import Bool, Float

CountedTokens = Literal["generated", "reasoning"]


class StopWhen(BaseModel):
    """When a probe's scores end the generation, or the model's reasoning: `for` tokens in a row have scores above `above`."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    above: Number = Field(allow_inf_nan=False, description="A score that is to be exceeded, in the probe's unit.")
    length: Int = Field(1, alias="for", ge=1, le=MAX_INT32, description="By how many tokens in a row.")
    where: CountedTokens | None = Field(
        None,
        description="Which tokens count: all that are generated, or those of the reasoning; by default the former, and the "
        "latter to close it.",
    )
    then: ProbeEffect = Field(
        "stop", description="End the generation, or close the reasoning with the model's marker and let it answer."
    )

    @model_validator(mode="after")
    def _agree(self) -> "StopWhen":
        if self.then == "close_reasoning" and self.where == "generated":
            raise ValueError('where: only the reasoning can be closed; "close_reasoning" allows "reasoning"')
        return self

    @property
    def counts(self) -> CountedTokens:
        """Which tokens count."""
        return self.where or ("reasoning" if self.then == "close_reasoning" else "generated")


def find_stop(
    scores: Float[np.ndarray, "tokens"],
    counted: Bool[np.ndarray, "tokens"],
    above: float,
    length: int,
    run: int = 0,
    first: int = 0,
) -> tuple[int | None, int]:
    """Find the token at which scores have been above a value for several tokens in a row.

    Args:
        scores: of the next tokens.
        counted: which of them count; one that does not ends a row.
        above: the value.
        length: how many tokens in a row.
        run: how many tokens in a row were above it up to here.
        first: the first place that may be found; those before it count all the same.

    Returns:
        Its place, None if there is none; and how many tokens in a row are above the value at the end.
    """
    import numpy as np

    over = counted & (np.asarray(scores, dtype=np.float32) > np.float32(above))  # the precision of live scores
    places = np.arange(len(over))
    # The last place that is not above, up to each: -1 - run stands for what came before.
    broken = np.maximum.accumulate(np.where(over, -1 - run, places)) if len(over) else places
    runs = places - broken
    found = np.flatnonzero(over & (runs >= length) & (places >= first))
    return (int(found[0]) if len(found) else None), int(runs[-1]) if len(runs) else run


@dataclass(frozen=True)
class ReasoningTokens:
    """The tokens between which a model reasons."""

    start: int
    """Begins it, `<think>`."""
    end: int
    """Ends it, `</think>`."""

    def begins(self, prompt_ids: Sequence[int]) -> "ReasoningState":
        """Return where a completion begins: in the reasoning if the prompt has opened it."""
        last = next((token for token in reversed(prompt_ids) if token in (self.start, self.end)), None)
        return "inside" if last == self.start else "before"

    def follow(
        self, token_ids: Sequence[int], state: "ReasoningState"
    ) -> tuple[Bool[np.ndarray, "tokens"], "ReasoningState"]:
        """Tell which tokens of a completion belong to its reasoning, without the two that mark it.

        A completion reasons once: behind the token that ends it, nothing belongs to it.

        Args:
            token_ids: the next tokens.
            state: before the first of them.
        """
        import numpy as np

        inside: Bool[np.ndarray, "tokens"] = np.zeros(len(token_ids), dtype=bool)
        for place, token in enumerate(token_ids):
            if state == "before" and token == self.start:
                state = "inside"
            elif state == "inside" and token == self.end:
                state = "after"
            else:
                inside[place] = state == "inside"
        return inside, state


ReasoningState = Literal["before", "inside", "after"]


class StopSettings(BaseModel):
    """What `roentgen probe stop` is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Path = Field(description="A run whose activations were kept at all positions.")
    probe: Path | None = Field(None, description="A saved probe, FOLDER/NAME; else the run's best.")
    label: str = Field("correct", description="Of the run's own: whose probes.")
    above: Annotated[tuple[float, ...] | None, BeforeValidator(read_numbers)] = Field(
        None, description="Scores that are to be exceeded, comma-separated; quantiles of the stored ones if absent."
    )
    lengths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(read_numbers)] = Field(
        (1, 2, 4, 8), min_length=1, description="For how many tokens in a row, comma-separated."
    )
    where: CountedTokens | None = Field(
        None, description="Which tokens count: all that are generated, or those of the reasoning."
    )
    then: ProbeEffect = Field("stop", description="End the generation, or close the reasoning.")
    max_loss: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Accuracy that a setting may lose on the half of the problems that it is chosen on.",
    )
    controls: int = Field(2, ge=0, description="Random directions beside the probe.")
    samples: int | None = Field(None, ge=2, description="How many samples, the first of the run; all if absent.")
    session: str | None = Field(
        None, description="STORE/SESSION of `roentgen capture`, instead of the run's own activations."
    )
    confirm: bool = Field(False, description="Have a server answer with the chosen setting, and report both.")
    base_url: str | None = Field(
        None, description="A server of the probe's model, to confirm with; else one is started."
    )
    model: str | None = Field(
        None, description="Where the probe's model is, if it was not the run's own or has been moved since."
    )
    parallel: int = Field(16, ge=1, description="Requests in flight.")
    seed: int = Field(0, description="Seed of the halves, the random directions and the bootstrap.")
    output: Path | None = Field(None, description="The folder; else RUN/stopping/LABEL/NAME.")

    @model_validator(mode="after")
    def _agree(self) -> "StopSettings":
        if self.then == "close_reasoning" and self.where == "generated":
            raise ValueError("--where: only the reasoning can be closed; allowed is reasoning")
        return self

    @property
    def counts(self) -> CountedTokens:
        """Which tokens count."""
        return self.where or ("reasoning" if self.then == "close_reasoning" else "generated")
