"""Finds which texts a session already has, so that an interrupted capture continues and a finished one does nothing.

Readers count the latest rollout of each key. So the same key must not be captured with other settings (another model, other
layers) into the same session, where it would hide the existing rollout. That is refused before anything runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from roentgen.errors import RoentgenError
from roentgen.store import CaptureSpec, Session
from serve_app.teacher_forcing.tokens import TokenizedTranscript


class OtherCaptureError(RoentgenError):
    """The session has the same rollouts, captured with other settings; the message says what differs."""


@dataclass(frozen=True)
class CapturedTexts:
    """The result of comparing texts with a session."""

    missing: list[TokenizedTranscript]
    """Texts to capture."""
    changed: int
    """Number of these texts that the session has with other tokens; readers will count the new ones."""


def find_missing(session: Session | None, texts: Sequence[TokenizedTranscript], spec: CaptureSpec) -> CapturedTexts:
    """Compare texts with a session's rollouts.

    Args:
        session: the session; None if it does not exist yet.
        texts: the texts to capture.
        spec: the settings of the capture.

    Raises:
        OtherCaptureError: if the session has one of them, captured with other settings.
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
        f"{name} {there} in the session, {here} requested"
        for name, there, here in (
            ("model", f"{stored.model} ({stored.revision})", f"{asked.model} ({asked.revision})"),
            ("keys", sorted(stored.keys), sorted(asked.keys)),
            ("positions", stored.positions, asked.positions),
            ("dtype", stored.dtype, asked.dtype),
            ("computed in", stored.computed_in or asked.computed_in, asked.computed_in),
        )
        # A norm may compute in a wider dtype; then the stored dtypes include the model's.
        if there != here and not (name == "dtype" and asked.dtype in stored.dtype.split(", "))
    ]
    if differences:
        raise OtherCaptureError(
            f"session {session.uri} already has these texts, captured with other settings: {'; '.join(differences)}. "
            "Choose another --session, because readers would count only the latest capture"
        )
