"""A sample: one attempt at one problem, as recorded and as everything later reads it."""

from itertools import takewhile
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from roentgen.contract import ActivationReply, LabelValue
from roentgen.runs.questions import Posed

VERDICTS = ("correct", "wrong", "no_answer")
"""Possible verdicts on an output. An output without an answer counts as incorrect and is also counted separately."""


class RolloutRef(ActivationReply):
    """The location of one turn's activations: the server's reply, and the number of the turn."""

    turn: int


class Turn(BaseModel):
    """One request of a conversation, and its reply."""

    model_config = ConfigDict(frozen=True)

    finish_reason: str | None = None
    """Why the model stopped: "stop", "length", "tool_calls"."""
    prompt_tokens: int = 0
    """Tokens of the prompt, including the conversation before it."""
    cached_tokens: int = 0
    """Prompt tokens that the server reports as cached."""
    completion_tokens: int = 0
    """Tokens generated."""
    seconds: float = 0.0
    """Wall time of the request."""
    tool_calls: int = 0
    """Tools called."""


class Sample(BaseModel):
    """One attempt at one problem."""

    model_config = ConfigDict(frozen=True)

    sample_id: str
    """Name of its files, prefixed by its problem set: "gsm8k_0001", "arithmetic_0001_e2_v-calm"."""
    problem_id: str
    """Id of the problem, stable across runs."""
    epoch: int = 1
    """Number of the attempt, from 1."""
    variant: str | None = None
    """The run's variant; None if it has none."""
    config_hash: str
    """Hash of its configuration; together with problem_id and epoch it identifies the sample."""
    question: str
    """As posed."""
    solution: str
    """The reference solution."""
    gold: str
    """The gold answer."""
    template: str | None = None
    """Template of the question; None if it has none, and in old records."""
    fields: dict[str, Any] = Field(default_factory=dict)
    """Additional fields of the problem's record; those with plain values are also labels of the stored rollouts."""
    messages: list[dict[str, Any]] = Field(default_factory=list)
    """The conversation, including the model's last message."""
    response: str = ""
    """The model's last message."""
    answers: dict[str, str | None] = Field(default_factory=dict)
    """The answer that each extractor read; None if it found none."""
    correct_by: dict[str, bool] = Field(default_factory=dict)
    """Each extractor's verdict."""
    correct: bool = False
    """The primary extractor's verdict."""
    values: dict[str, LabelValue] = Field(default_factory=dict)
    """Additional values from scorers, such as a judge's grade."""
    finish_reason: str | None = None
    """"stop", "length" if it was truncated, "max_turns" if it still called tools in its last turn."""
    prompt_tokens: int = 0
    """Tokens of the prompts, over all turns."""
    cached_tokens: int = 0
    """Prompt tokens that the server reports as cached."""
    completion_tokens: int = 0
    """Tokens generated, over all turns."""
    seconds: float = 0.0
    """Wall time, from the first request to the last reply."""
    turns: list[Turn] = Field(default_factory=list)
    """The requests in order."""
    finished: float | None = None
    """Time of completion in seconds since 1970; None in old records."""
    rollouts: list[RolloutRef] = Field(default_factory=list)
    """Locations of its activations, one per turn."""
    error: str | None = None
    """Why it has no answer; such a sample is retried when the run is resumed."""

    @property
    def identity(self) -> tuple[str, str, int]:
        """Identity of the sample across retries."""
        return self.config_hash, self.problem_id, self.epoch

    @property
    def prompt_messages(self) -> list[dict[str, Any]]:
        """The messages that pose the problem: the conversation before the model's first message."""
        return list(takewhile(lambda message: message["role"] != "assistant", self.messages))

    @property
    def posed(self) -> Posed:
        """The problem, for comparison with those of other samples."""
        return Posed(self.problem_id, self.question, self.template)

    def verdict(self, extractor: str | None) -> str | None:
        """Return an extractor's verdict, one of `VERDICTS`; None for a failed sample or an unknown extractor."""
        if self.error is not None or extractor not in self.correct_by:
            return None
        return "no_answer" if self.answers[extractor] is None else "correct" if self.correct_by[extractor] else "wrong"
