"""Acts on the scores of a job's probes while it runs: ends the generation, or has the model close its reasoning.

A `StopWatch` sees each generated token that has passed through the model, with its scores, and says at which one something is
to be done. That is before the next token is chosen: to stop is to choose none, and to close the reasoning is to take the marker
in place of what the model would have said. Both engines do so between a forward and the choice that follows it, in the process
that has the scores, so nothing is generated that would have to be taken back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from roentgen.contract import ProbeEffect
from roentgen.stop_rule import ReasoningTokens, StopWhen, find_stop


@dataclass(frozen=True)
class StopRule:
    """When the scores of one probe of a job act."""

    probe: int
    """Its place among the job's probes; it has one output."""
    when: StopWhen
    """When, and what then happens."""


@dataclass(frozen=True)
class Stopping:
    """What a job's scores are to do."""

    rules: tuple[StopRule, ...]
    """At least one; of several that act at a token, the first counts."""
    reasoning: ReasoningTokens | None = None
    """What marks the model's reasoning, if a rule needs it."""
    min_tokens: int = 0
    """Tokens that have to be generated before any acts."""


@dataclass(frozen=True)
class Action:
    """What is to be done before the next token is chosen."""

    rule: StopRule
    """Whose scores ask for it."""
    position: int
    """The token whose score decided it: the last one of those that the model has chosen so far."""


@dataclass(frozen=True)
class Acted:
    """What has been done."""

    probe: int
    """The place of the probe among the job's."""
    then: ProbeEffect
    """What."""
    position: int
    """The token whose score decided it."""
    score: float = math.nan
    """That score."""


class StopWatch:
    """Watches the scores of one running job.

    Attributes:
        next: the position of the next token to be seen.
    """

    def __init__(self, stopping: Stopping, prompt_ids: Sequence[int]) -> None:
        """Begin before the first generated token.

        Args:
            stopping: when to act.
            prompt_ids: the job's prompt.
        """
        self.next = len(prompt_ids)
        self._stopping = stopping
        self._first = len(prompt_ids) + max(stopping.min_tokens - 1, 0)
        self._runs = [0] * len(stopping.rules)
        self._state = stopping.reasoning.begins(prompt_ids) if stopping.reasoning is not None else "after"

    def see(self, token_ids: Sequence[int], scores: Sequence[Float[Tensor, "tokens outputs"]]) -> Action | None:
        """Take the next tokens and say what is to be done behind the last of them, None for nothing.

        Args:
            token_ids: the tokens; one, unless a forward has been repeated.
            scores: of each, per probe.
        """
        start, self.next = self.next, self.next + len(token_ids)
        inside = np.zeros(len(token_ids), dtype=bool)
        if self._stopping.reasoning is not None:
            inside, self._state = self._stopping.reasoning.follow(token_ids, self._state)
        action: Action | None = None
        for number, rule in enumerate(self._stopping.rules):
            counted = inside if rule.when.counts == "reasoning" else np.ones_like(inside)
            place, self._runs[number] = find_stop(
                scores[rule.probe][:, 0].numpy(), counted, rule.when.above, rule.when.length,
                self._runs[number], max(self._first - start, 0),
            )  # fmt: skip
            if place == len(token_ids) - 1:
                action = action or Action(rule, start + place)
        return action
