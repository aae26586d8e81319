"""One text to be read: what came before, what was said, and whose rollout it is."""

from dataclasses import dataclass, field
from typing import Any, Literal

from roentgen.contract import LabelValue, RolloutKey
from roentgen.errors import RoentgenError
from roentgen.tokenized_text import TokenizedText


class TranscriptError(RoentgenError):
    """Transcripts cannot be read; the message names the file, the place and what is allowed."""


@dataclass(frozen=True)
class KnownTokens:
    """The tokens that a model was really fed, as the store kept them; text alone does not always give the same ones back."""

    model: str
    """Served name of the model whose tokens they are."""
    revision: str
    """Its revision."""
    sequence: TokenizedText
    """Prompt and completion."""


@dataclass(frozen=True)
class Transcript:
    """A text to be read by a model."""

    key: RolloutKey
    """Its identity in the store."""
    prompt: str | tuple[dict[str, Any], ...]
    """Raw text, or a conversation's messages, which the model's own chat template renders."""
    completion: str | None = None
    """What was said then; None if the whole text is prompt."""
    finish_reason: Literal["stop", "length"] = "length"
    """"stop" if the speaker ended the completion, which then ends with the model's end-of-turn token."""
    labels: dict[str, LabelValue] = field(default_factory=dict)
    """Stored with its rollout."""
    tokens: KnownTokens | None = None
    """The tokens as they were when a model said this, if they are known."""

    @property
    def name(self) -> str:
        """What people call it: the problem's id, with epoch and turn where they are not the first."""
        epoch = f" epoch {self.key.epoch}" if self.key.epoch > 1 else ""
        return f"{self.key.problem_id}{epoch}" + (f" turn {self.key.turn}" if self.key.turn else "")
