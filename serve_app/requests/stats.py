"""What a request took: small enough to travel beside its reply, from the replica to the ingress that has the metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.engines.storage import Done


@dataclass(frozen=True)
class ChoiceStats:
    """What one generation took.

    Attributes:
        tokens: generated.
        queued_s: until its prompt began to be read.
        first_token_s: until its first token.
        total_s: until its last.
        capture_bytes: of the activations kept.
        commit_s: how long they took to become durable, None if there were none.
    """

    tokens: int
    queued_s: float
    first_token_s: float
    total_s: float
    capture_bytes: int = 0
    commit_s: float | None = None


@dataclass(frozen=True)
class RequestStats:
    """What one request took.

    Attributes:
        prompt_tokens: of all its prompts.
        session: where its activations are, None if it kept none.
        choices: each generation.
    """

    prompt_tokens: int
    session: str | None
    choices: tuple[ChoiceStats, ...]

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
