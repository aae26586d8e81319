"""The rule by which probe scores end a generation, for running requests and for stored rows alike.

A `StopWhen` defines the threshold, the number of consecutive tokens, and which tokens count. `find_stop` finds the token at
which the condition holds. An engine calls it with each new score, and `roentgen probe stop` with all scores of a stored
rollout, so both stop at the same token.

The score of a token comes from the row where the token was fed. The same forward pass also samples the next token, which is
discarded: the token whose score ends a generation is its last one.
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
    """When a probe's scores end the generation, or the model's reasoning: `for` consecutive tokens have scores above
    `above`."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    above: Number = Field(allow_inf_nan=False, description="Threshold that scores must exceed, in the probe's unit.")
    length: Int = Field(
        1, alias="for", ge=1, le=MAX_INT32, description="Number of consecutive tokens above the threshold."
    )
    where: CountedTokens | None = Field(
        None,
        description="Which tokens count: all generated tokens (the default), or those of the reasoning (the default for "
        "close_reasoning).",
    )
    then: ProbeEffect = Field(
        "stop", description="End the generation, or close the reasoning with the model's marker and let it answer."
    )

    @model_validator(mode="after")
    def _agree(self) -> "StopWhen":
        if self.then == "close_reasoning" and self.where == "generated":
            raise ValueError('where: must be "reasoning" for "close_reasoning"')
        return self

    @property
    def counts(self) -> CountedTokens:
        """The tokens that count."""
        return self.where or ("reasoning" if self.then == "close_reasoning" else "generated")


def find_stop(
    scores: Float[np.ndarray, "tokens"],
    counted: Bool[np.ndarray, "tokens"],
    above: float,
    length: int,
    run: int = 0,
    first: int = 0,
) -> tuple[int | None, int]:
    """Find the token at which scores have exceeded a threshold for several consecutive tokens.

    Args:
        scores: scores of the next tokens.
        counted: which of them count; a token that does not count ends a sequence.
        above: the threshold.
        length: number of consecutive tokens.
        run: number of consecutive tokens above the threshold so far.
        first: first index that may be returned; earlier tokens still count.

    Returns:
        The token's index, or None; and the number of consecutive tokens above the threshold at the end.
    """
    import numpy as np

    over = counted & (
        np.asarray(scores, dtype=np.float32) > np.float32(above)
    )  # the precision of scores during generation
    places = np.arange(len(over))
    # Index of the last token not above the threshold, up to each token; -1 - run stands for the tokens before.
    broken = np.maximum.accumulate(np.where(over, -1 - run, places)) if len(over) else places
    runs = places - broken
    found = np.flatnonzero(over & (runs >= length) & (places >= first))
    return (int(found[0]) if len(found) else None), int(runs[-1]) if len(runs) else run


@dataclass(frozen=True)
class ReasoningTokens:
    """The tokens that delimit a model's reasoning."""

    start: int
    """Begins the reasoning, `<think>`."""
    end: int
    """Ends the reasoning, `</think>`."""

    def begins(self, prompt_ids: Sequence[int]) -> "ReasoningState":
        """Return the state at the beginning of a completion: "inside" if the prompt has opened the reasoning."""
        last = next((token for token in reversed(prompt_ids) if token in (self.start, self.end)), None)
        return "inside" if last == self.start else "before"

    def follow(
        self, token_ids: Sequence[int], state: "ReasoningState"
    ) -> tuple[Bool[np.ndarray, "tokens"], "ReasoningState"]:
        """Return which tokens of a completion belong to its reasoning, excluding the two delimiters.

        A completion reasons once: no token after the end of the reasoning belongs to it.

        Args:
            token_ids: the next tokens.
            state: the state before the first of them.
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
    """The settings of `roentgen probe stop`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Path = Field(description="A run with activations stored at all positions.")
    probe: Path | None = Field(None, description="A saved probe, FOLDER/NAME; the run's best by default.")
    label: str = Field("correct", description="Label of the run's own probes.")
    above: Annotated[tuple[float, ...] | None, BeforeValidator(read_numbers)] = Field(
        None, description="Thresholds, comma-separated; quantiles of the stored scores if absent."
    )
    lengths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(read_numbers)] = Field(
        (1, 2, 4, 8), min_length=1, description="Numbers of consecutive tokens, comma-separated."
    )
    where: CountedTokens | None = Field(
        None, description="Which tokens count: all generated tokens, or those of the reasoning."
    )
    then: ProbeEffect = Field("stop", description="Whether to end the generation or close the reasoning.")
    max_loss: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Accuracy that a setting may lose on the half of the problems used for choosing it.",
    )
    controls: int = Field(2, ge=0, description="Number of random directions as controls.")
    samples: int | None = Field(
        None, ge=2, description="Number of samples, from the beginning of the run; all if absent."
    )
    session: str | None = Field(
        None, description="STORE/SESSION from `roentgen capture`, instead of the run's own activations."
    )
    confirm: bool = Field(False, description="Also run the chosen setting on a server, and report both.")
    base_url: str | None = Field(None, description="A server with the probe's model, for --confirm; started if absent.")
    model: str | None = Field(None, description="Location of the probe's model, if it is not the run's or has moved.")
    parallel: int = Field(16, ge=1, description="Requests in flight.")
    seed: int = Field(0, description="Seed of the halves, the random directions and the bootstrap.")
    output: Path | None = Field(None, description="The output folder; RUN/stopping/LABEL/NAME by default.")

    @model_validator(mode="after")
    def _agree(self) -> "StopSettings":
        if self.then == "close_reasoning" and self.where == "generated":
            raise ValueError("--where: must be reasoning for --then close_reasoning")
        return self

    @property
    def counts(self) -> CountedTokens:
        """The tokens that count."""
        return self.where or ("reasoning" if self.then == "close_reasoning" else "generated")
