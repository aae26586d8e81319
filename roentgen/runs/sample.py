"""One attempt at one problem, as the record keeps it and as everything later reads it."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from roentgen.contract import ActivationReply
from roentgen.runs.questions import Posed


class RolloutRef(ActivationReply):
    """Where the activations of one turn are: the server's reply, and which turn it answered."""

    turn: int


class Turn(BaseModel):
    """One request of a conversation, and its reply.

    Attributes:
        finish_reason: why the model stopped: "stop", "length", "tool_calls".
        prompt_tokens: tokens of the prompt, the conversation before included.
        completion_tokens: tokens generated.
        seconds: wall time of the request.
        tool_calls: tools called.
    """

    model_config = ConfigDict(frozen=True)

    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    tool_calls: int = 0


class Sample(BaseModel):
    """One attempt at one problem.

    Attributes:
        sample_id: names its files, "gsm8k_0001", "gsm8k_0001_e2_v-calm".
        problem_id: the problem, stable across runs.
        epoch: which of several attempts, from 1.
        variant: under which of the run's prompt prefixes; None if it has none.
        config_hash: the configuration it was made under; with problem_id and epoch it is the sample's identity.
        question: as posed.
        solution: the gold rationale.
        gold: the gold answer.
        template: what the question was made from, where problems are made from templates; None of others and of old records.
        messages: the conversation, the model's last message included.
        response: the model's last message.
        answers: what each extractor read, None where it found nothing.
        correct_by: each extractor's verdict.
        correct: the primary extractor's verdict.
        finish_reason: "stop", "length" if it was cut, "max_turns" if it was still calling tools in its last turn.
        prompt_tokens: tokens of the prompts, over all turns.
        completion_tokens: tokens generated, over all turns.
        seconds: wall time, from the first request to the last reply.
        turns: request by request.
        finished: when, seconds since 1970; None of old records.
        rollouts: where its activations are, one per turn.
        error: why there is no answer; such a sample is tried again on resume.
    """

    model_config = ConfigDict(frozen=True)

    sample_id: str
    problem_id: str
    epoch: int = 1
    variant: str | None = None
    config_hash: str
    question: str
    solution: str
    gold: str
    template: str | None = None
    messages: list[dict[str, Any]] = Field(default_factory=list)
    response: str = ""
    answers: dict[str, str | None] = Field(default_factory=dict)
    correct_by: dict[str, bool] = Field(default_factory=dict)
    correct: bool = False
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    turns: list[Turn] = Field(default_factory=list)
    finished: float | None = None
    rollouts: list[RolloutRef] = Field(default_factory=list)
    error: str | None = None

    @property
    def identity(self) -> tuple[str, str, int]:
        """What makes it the same sample when it is tried again."""
        return self.config_hash, self.problem_id, self.epoch

    @property
    def posed(self) -> Posed:
        """What it was asked, to be compared with what others were asked."""
        return Posed(self.problem_id, self.question, self.template)
