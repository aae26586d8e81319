"""One text to be read: what came before, what was said, and whose rollout it is."""

from dataclasses import dataclass, field
from typing import Any, Literal

from roentgen.contract import LabelValue, RolloutKey
from roentgen.tokenized_text import TokenizedText


class TranscriptError(Exception):
    """Transcripts cannot be read; the message names the file, the place and what is allowed."""


@dataclass(frozen=True)
class KnownTokens:
    """The tokens that a model was really fed, as the store kept them; text alone does not always give the same ones back.

    Attributes:
        model: served name of the model whose tokens they are.
        revision: its revision.
        sequence: prompt and completion.
    """

    model: str
    revision: str
    sequence: TokenizedText


@dataclass(frozen=True)
class Transcript:
    """A text to be read by a model.

    Attributes:
        key: its identity in the store.
        prompt: raw text, or a conversation's messages, which the model's own chat template renders.
        completion: what was said then; None if the whole text is prompt.
        finish_reason: "stop" if the speaker ended the completion, which then ends with the model's end-of-turn token.
        labels: stored with its rollout.
        tokens: the tokens as they were when a model said this, if they are known.
    """

    key: RolloutKey
    prompt: str | tuple[dict[str, Any], ...]
    completion: str | None = None
    finish_reason: Literal["stop", "length"] = "length"
    labels: dict[str, LabelValue] = field(default_factory=dict)
    tokens: KnownTokens | None = None

    @property
    def name(self) -> str:
        """What people call it: the problem's id, with epoch and turn where they are not the first."""
        epoch = f" epoch {self.key.epoch}" if self.key.epoch > 1 else ""
        return f"{self.key.problem_id}{epoch}" + (f" turn {self.key.turn}" if self.key.turn else "")
