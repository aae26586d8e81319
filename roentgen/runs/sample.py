"""One attempt at one problem, as the record keeps it and as everything later reads it."""

from itertools import takewhile
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from roentgen.contract import ActivationReply, LabelValue
from roentgen.runs.questions import Posed

VERDICTS = ("correct", "wrong", "no_answer")
"""What an extractor can say of an output. One in which it found no answer counts against the accuracy, and is counted apart."""


class RolloutRef(ActivationReply):
    """Where the activations of one turn are: the server's reply, and which turn it answered."""

    turn: int


class Turn(BaseModel):
    """One request of a conversation, and its reply."""

    model_config = ConfigDict(frozen=True)

    finish_reason: str | None = None
    """Why the model stopped: "stop", "length", "tool_calls"."""
    prompt_tokens: int = 0
    """Tokens of the prompt, the conversation before included."""
    cached_tokens: int = 0
    """Those of them that the server had in its prefix cache, as far as it says."""
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
    """Names its files, after its problem set: "gsm8k_0001", "arithmetic_0001_e2_v-calm"."""
    problem_id: str
    """The problem, stable across runs."""
    epoch: int = 1
    """Which of several attempts, from 1."""
    variant: str | None = None
    """Under which of the run's prompt prefixes; None if it has none."""
    config_hash: str
    """The configuration it was made under; with problem_id and epoch it is the sample's identity."""
    question: str
    """As posed."""
    solution: str
    """The gold rationale."""
    gold: str
    """The gold answer."""
    template: str | None = None
    """What the question was made from, where problems are made from templates; None of others and of old records."""
    fields: dict[str, Any] = Field(default_factory=dict)
    """What else the problem's record has; plain values are labels of the stored rollouts too."""
    messages: list[dict[str, Any]] = Field(default_factory=list)
    """The conversation, the model's last message included."""
    response: str = ""
    """The model's last message."""
    answers: dict[str, str | None] = Field(default_factory=dict)
    """What each extractor read, None where it found nothing."""
    correct_by: dict[str, bool] = Field(default_factory=dict)
    """Each extractor's verdict."""
    correct: bool = False
    """The primary extractor's verdict."""
    values: dict[str, LabelValue] = Field(default_factory=dict)
    """What scorers found beside their verdicts, such as a judge's grade."""
    finish_reason: str | None = None
    """"stop", "length" if it was cut, "max_turns" if it was still calling tools in its last turn."""
    prompt_tokens: int = 0
    """Tokens of the prompts, over all turns."""
    cached_tokens: int = 0
    """Those of them that the server had in its prefix cache, as far as it says."""
    completion_tokens: int = 0
    """Tokens generated, over all turns."""
    seconds: float = 0.0
    """Wall time, from the first request to the last reply."""
    turns: list[Turn] = Field(default_factory=list)
    """Request by request."""
    finished: float | None = None
    """When, seconds since 1970; None of old records."""
    rollouts: list[RolloutRef] = Field(default_factory=list)
    """Where its activations are, one per turn."""
    error: str | None = None
    """Why there is no answer; such a sample is tried again on resume."""

    @property
    def identity(self) -> tuple[str, str, int]:
        """What makes it the same sample when it is tried again."""
        return self.config_hash, self.problem_id, self.epoch

    @property
    def prompt_messages(self) -> list[dict[str, Any]]:
        """The messages with which the problem was posed: the conversation up to the model's first."""
        return list(takewhile(lambda message: message["role"] != "assistant", self.messages))

    @property
    def posed(self) -> Posed:
        """What it was asked, to be compared with what others were asked."""
        return Posed(self.problem_id, self.question, self.template)

    def verdict(self, extractor: str | None) -> str | None:
        """Return what an extractor says of the output, one of `VERDICTS`; None if it failed, or of an unknown extractor."""
        if self.error is not None or extractor not in self.correct_by:
            return None
        return "no_answer" if self.answers[extractor] is None else "correct" if self.correct_by[extractor] else "wrong"
