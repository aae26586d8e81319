"""Turns a finished generation into the rollout that is stored, and the store's receipt into the reply's `activations`.

The text and the captured rows may be in different processes: an engine whose model runs in workers leaves the rows there. So
everything but the rows is a `RolloutMetadata`, which is small and is sent to the process with the rows. `join` combines both
into a rollout. `describe` returns the reply's `activations` once the rollout is committed.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from roentgen.contract import (
    SAMPLED_FEATURES,
    ActivationReply,
    ActivationRequest,
    LabelValue,
    RolloutKey,
    StoredTensor,
)
from roentgen.store import CapturedRollout, CaptureSpec, Receipt
from roentgen.store.quantization import QUANTIZED
from roentgen.tokenized_text import TokenizedText
from serve_app.capture.rows import CapturedRows
from serve_app.engines.protocol import Finished
from serve_app.engines.served_model import ServedModel
from serve_app.models.tokenization import completed

Delivery = Literal["reference", "sample", "full"]


@dataclass(frozen=True)
class RolloutMetadata:
    """Everything that the store keeps of a finished generation, except its rows."""

    session_id: str
    """Session to store it in."""
    rollout_id: str
    """Its id, a ULID."""
    model: str
    """The model's served name."""
    revision: str
    """The model's revision."""
    positions: str
    """Position policy of the captured rows."""
    sequence: TokenizedText
    """Prompt and completion."""
    logprobs: Float[np.ndarray, "tokens"]
    """Log-probability of each token when it was sampled; NaN for the prompt's tokens."""
    finish_reason: str
    """"stop" or "length"."""
    key: RolloutKey | None
    """The caller's own key of the rollout, if it gave one."""
    labels: dict[str, LabelValue]
    """The caller's labels."""
    delivery: Delivery
    """Whether the reply carries values: none, a sample of them, or all."""
    computed_in: str | None = None
    """Dtype that the model computes in."""
    model_quantization: str | None = None
    """How the model's weights are quantized, None if they are not."""
    allow_non_finite: bool = False
    """Whether rows may contain NaN and infinity."""
    quantized: bool = False
    """Whether rows are stored as int8."""
    forced: tuple[int, ...] = ()
    """Positions of tokens that were forced and not sampled; their log-probability is NaN."""


def make_metadata(
    model: ServedModel,
    prompt: TokenizedText,
    role: str,
    asked: ActivationRequest,
    finished: Finished,
    session_id: str,
    rollout_id: str,
) -> RolloutMetadata:
    """Create the entry of a finished generation.

    Args:
        model: the model that generated it.
        prompt: the prompt.
        role: role of the completion's speaker.
        asked: the request's `activations`.
        finished: the engine's result.
        session_id: session to store it in.
        rollout_id: its id, a ULID.
    """
    return RolloutMetadata(
        session_id=session_id,
        rollout_id=rollout_id,
        model=model.source.name,
        revision=model.source.revision,
        positions=asked.positions,
        sequence=completed(model.tokenizer, prompt, finished.token_ids, role),
        logprobs=np.array([np.nan] * prompt.n_prompt + [score.logprob for score in finished.scores], dtype=np.float32),
        finish_reason=finished.finish_reason,
        key=asked.key,
        labels=asked.labels,
        delivery=asked.delivery,
        computed_in=str(model.dtype),
        model_quantization=model.quantization,
        allow_non_finite=asked.allow_non_finite,
        quantized=asked.dtype == "int8",
        forced=finished.forced,
    )


def join(entry: RolloutMetadata, captured: CapturedRows) -> CapturedRollout:
    """Combine an entry and its captured rows into a rollout."""
    dtypes = {str(tensor.dtype) for tensor in captured.tensors.values()}
    return CapturedRollout(
        session_id=entry.session_id,
        rollout_id=entry.rollout_id,
        spec=CaptureSpec(
            model=entry.model,
            revision=entry.revision,
            keys=tuple(captured.tensors),
            positions=entry.positions,
            dtype=QUANTIZED if entry.quantized else ", ".join(sorted(dtypes)),
            computed_in=entry.computed_in,
            model_quantization=entry.model_quantization,
        ),
        tensors=captured.tensors,
        position=captured.position,
        sequence=entry.sequence,
        logprobs=entry.logprobs,
        finish_reason=entry.finish_reason,
        key=entry.key,
        labels=entry.labels,
        require_finite=not entry.allow_non_finite,
    )


def describe(rollout: CapturedRollout, receipt: Receipt, delivery: Delivery = "reference") -> dict[str, Any]:
    """Return the reply's `activations` object for a committed rollout.

    Args:
        rollout: the rollout.
        receipt: where it was committed.
        delivery: whether the reply carries values: none, a sample of them, or all.
    """
    path = f"{receipt.uri}/{receipt.shard}"
    found = rollout.non_finite
    reply = ActivationReply(
        session_id=receipt.session_id,
        rollout_id=receipt.rollout_id,
        uri=receipt.uri,
        shard=receipt.shard,
        row_start=receipt.row_start,
        row_stop=receipt.row_stop,
        tensors={key: _tensor(rollout, key, path, delivery) for key in rollout.tensors},
        non_finite_rows=found.rows if found else None,
    )
    return reply.model_dump(mode="json", exclude_none=True)


def _tensor(rollout: CapturedRollout, key: str, path: str, delivery: Delivery) -> StoredTensor:
    values = rollout.tensors[key]
    dtype = QUANTIZED if rollout.quantized else str(values.dtype)
    if delivery == "reference":
        return StoredTensor(shape=tuple(values.shape), dtype=dtype, stored_path=path)
    whole = rollout.as_read(key)[None].float()
    if delivery == "full":
        return StoredTensor(
            format="complete_tensor", shape=tuple(whole.shape), dtype=dtype, stored_path=path, data=_listed(whole)
        )
    return StoredTensor(
        format="sampled_tensor",
        shape=tuple(whole.shape),
        dtype=dtype,
        stored_path=path,
        data=_listed(whole[..., :SAMPLED_FEATURES]),
        sample_info=f"first_{SAMPLED_FEATURES}_features",
    )


def _listed(values: Float[Tensor, "..."]) -> list[Any]:
    """Convert values to nested lists, with None for values that JSON cannot represent."""
    finite = values.isfinite()
    if finite.all():
        return values.tolist()
    listed = values.numpy().astype(object)
    listed[~finite.numpy()] = None
    found: list[Any] = listed.tolist()
    return found
