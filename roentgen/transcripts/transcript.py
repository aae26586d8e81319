"""Transcripts: texts for a model to read, with the rollout keys that they are stored under."""

from dataclasses import dataclass, field
from typing import Any, Literal

from roentgen.contract import LabelValue, RolloutKey
from roentgen.errors import RoentgenError
from roentgen.tokenized_text import TokenizedText


class TranscriptError(RoentgenError):
    """Transcripts cannot be read; the message names the file, the location and what is allowed."""


@dataclass(frozen=True)
class KnownTokens:
    """The tokens that a model was fed, as stored; tokenizing the text again does not always reproduce them."""

    model: str
    """Served name of the model."""
    revision: str
    """Its revision."""
    sequence: TokenizedText
    """Prompt and completion."""


@dataclass(frozen=True)
class Transcript:
    """A text for a model to read."""

    key: RolloutKey
    """Its rollout key in the store."""
    prompt: str | tuple[dict[str, Any], ...]
    """Raw text, or a conversation's messages, which the model's chat template renders."""
    completion: str | None = None
    """The completion; None if the whole text is prompt."""
    finish_reason: Literal["stop", "length"] = "length"
    """"stop" if the completion is complete and ends with the model's end-of-turn token."""
    labels: dict[str, LabelValue] = field(default_factory=dict)
    """Labels stored with its rollout."""
    tokens: KnownTokens | None = None
    """The original tokens, if they are known."""

    @property
    def name(self) -> str:
        """Display name: the problem's id, with epoch and turn if they are not the first."""
        epoch = f" epoch {self.key.epoch}" if self.key.epoch > 1 else ""
        return f"{self.key.problem_id}{epoch}" + (f" turn {self.key.turn}" if self.key.turn else "")
