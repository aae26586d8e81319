"""Applies the actions of a job's probe scores while it runs: ends the generation, or closes the model's reasoning.

A `StopWatch` receives each generated token that the model has processed, with its scores, and returns the action that is
required at that token, before the next token is chosen. To stop is to choose no token; to close the reasoning is to force the
marker in place of a sampled token. Both engines do this between a forward and the choice that follows it, in the process that
has the scores. So nothing is generated that would have to be undone.
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
    """When the scores of one probe require an action."""

    probe: int
    """The probe's index among the job's probes; it has one output."""
    when: StopWhen
    """The condition, and the action."""


@dataclass(frozen=True)
class Stopping:
    """The actions of a job's scores."""

    rules: tuple[StopRule, ...]
    """At least one rule; if several apply at a token, the first counts."""
    reasoning: ReasoningTokens | None = None
    """Tokens that mark the model's reasoning, if a rule needs them."""
    min_tokens: int = 0
    """Tokens that must be generated before a rule applies."""


@dataclass(frozen=True)
class Action:
    """An action that is required before the next token is chosen."""

    rule: StopRule
    """The rule that requires it."""
    position: int
    """Position of the token whose score decided it: the last token that the model has chosen so far."""


@dataclass(frozen=True)
class Acted:
    """An action that has been taken."""

    probe: int
    """The probe's index among the job's probes."""
    then: ProbeEffect
    """The action."""
    position: int
    """Position of the token whose score decided it."""
    score: float = math.nan
    """The score."""


class StopWatch:
    """Checks the scores of one running job.

    Attributes:
        next: position of the next token to check.
    """

    def __init__(self, stopping: Stopping, prompt_ids: Sequence[int]) -> None:
        """Start before the first generated token.

        Args:
            stopping: the actions of its scores.
            prompt_ids: the job's prompt.
        """
        self.next = len(prompt_ids)
        self._stopping = stopping
        self._first = len(prompt_ids) + max(stopping.min_tokens - 1, 0)
        self._runs = [0] * len(stopping.rules)
        self._state = stopping.reasoning.begins(prompt_ids) if stopping.reasoning is not None else "after"

    def see(self, token_ids: Sequence[int], scores: Sequence[Float[Tensor, "tokens outputs"]]) -> Action | None:
        """Check the next tokens; returns the action required after the last of them, None for none.

        Args:
            token_ids: the tokens; a single one, unless a forward has been repeated.
            scores: per probe, their scores.
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
