"""Which texts a session holds already, so that a capture that was stopped goes on and one that is done does nothing.

Readers count a rollout once by its key, the latest. So the same key captured in another way (another model, other layers)
must not go into the same session: it would hide what is there. That is refused, before anything runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from roentgen.errors import RoentgenError
from roentgen.store import CaptureSpec, Session
from serve_app.teacher_forcing.tokens import TokenizedTranscript


class OtherCaptureError(RoentgenError):
    """The session holds the same rollouts, captured otherwise; the message says what differs."""


@dataclass(frozen=True)
class CapturedTexts:
    """What a session has of some texts."""

    missing: list[TokenizedTranscript]
    """Texts to capture."""
    changed: int
    """How many of those it has under the same key with other tokens; readers will count the new ones."""


def find_missing(session: Session | None, texts: Sequence[TokenizedTranscript], spec: CaptureSpec) -> CapturedTexts:
    """Compare texts with what a session holds.

    Args:
        session: where they would go; None if there is none yet.
        texts: what is to be captured.
        spec: how.

    Raises:
        OtherCaptureError: if the session holds one of them, captured otherwise.
        StoreError: if the session cannot be read.
    """
    if session is None:
        return CapturedTexts(list(texts), 0)
    frame = session.rollouts()
    keyed = frame[frame["config_hash"].notna()]
    rows = {
        (row["config_hash"], row["problem_id"], int(row["epoch"]), int(row["turn"])): row
        for row in keyed[["config_hash", "problem_id", "epoch", "turn", "shard", "token_ids", "n_prompt"]].to_dict(
            "records"
        )
    }
    missing, changed = [], 0
    for text in texts:
        key = text.transcript.key
        row = rows.get((key.config_hash, key.problem_id, key.epoch, key.turn))
        if row is None:
            missing.append(text)
            continue
        _check_same(session, session.spec(row["shard"]), spec)
        if (list(row["token_ids"]), row["n_prompt"]) != (text.sequence.token_ids, text.sequence.n_prompt):
            missing.append(text)
            changed += 1
    return CapturedTexts(missing, changed)


def _check_same(session: Session, stored: CaptureSpec, asked: CaptureSpec) -> None:
    differences = [
        f"{name} {there} there, {here} asked for"
        for name, there, here in (
            ("model", f"{stored.model} ({stored.revision})", f"{asked.model} ({asked.revision})"),
            ("keys", sorted(stored.keys), sorted(asked.keys)),
            ("positions", stored.positions, asked.positions),
            ("dtype", stored.dtype, asked.dtype),
            ("computed in", stored.computed_in or asked.computed_in, asked.computed_in),
        )
        # Of several dtypes (a norm may compute in a wider one), the model's is among the stored ones.
        if there != here and not (name == "dtype" and asked.dtype in stored.dtype.split(", "))
    ]
    if differences:
        raise OtherCaptureError(
            f"session {session.uri} holds these texts already, captured otherwise: {'; '.join(differences)}. "
            "Choose another --session: readers would count only the later of the two"
        )
