"""What a request took: small enough to travel beside its reply, from the replica to the ingress that has the metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.engines.storage import Done


@dataclass(frozen=True)
class ChoiceStats:
    """What one generation took."""

    tokens: int
    """Generated."""
    queued_s: float
    """Until its prompt began to be read."""
    first_token_s: float
    """Until its first token."""
    total_s: float
    """Until its last."""
    capture_bytes: int = 0
    """Of the activations kept."""
    commit_s: float | None = None
    """How long they took to become durable, None if there were none."""


@dataclass(frozen=True)
class RequestStats:
    """What one request took."""

    prompt_tokens: int
    """Of all its prompts."""
    session: str | None
    """Where its activations are, None if it kept none."""
    choices: tuple[ChoiceStats, ...]
    """Each generation."""

    @property
    def completion_tokens(self) -> int:
        """Tokens generated, over all choices."""
        return sum(choice.tokens for choice in self.choices)

    @classmethod
    def of(cls, dones: Sequence[Done], prompt_tokens: int) -> "RequestStats":
        """Sum up a request whose choices are done."""
        stored = next((done.stored for done in dones if done.stored is not None), None)
        return cls(
            prompt_tokens,
            session=stored.reply["session_id"] if stored else None,
            choices=tuple(_choice(done) for done in dones),
        )


def _choice(done: Done) -> ChoiceStats:
    timings = done.finished.timings
    return ChoiceStats(
        tokens=len(done.finished.token_ids),
        queued_s=timings.queued,
        first_token_s=timings.first_token,
        total_s=timings.total,
        capture_bytes=done.stored.nbytes if done.stored else 0,
        commit_s=done.stored.seconds if done.stored else None,
    )
