"""From a finished generation to the rollout that is stored, and from its receipt to what the reply says."""

from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from roentgen.contract import SAMPLED_FEATURES, ActivationReply, ActivationRequest, StoredTensor
from roentgen.store import CaptureSpec, Receipt, Rollout, Segment
from serve_app.capture.rows import CapturedRows
from serve_app.engines.protocol import Finished
from serve_app.engines.text import completion_offsets
from serve_app.models import LoadedModel
from serve_app.openai_api.prompt import Prompt

Delivery = Literal["reference", "sample", "full"]


def build_rollout(
    model: LoadedModel,
    prompt: Prompt,
    asked: ActivationRequest,
    finished: Finished,
    captured: CapturedRows,
    session_id: str,
    rollout_id: str,
) -> Rollout:
    """Join what was captured to what was said.

    Args:
        model: what generated it.
        prompt: what it was given.
        asked: the request's `activations`.
        finished: what it said.
        captured: the rows of `finished`.
        session_id: where to store it.
        rollout_id: a ULID.
    """
    token_ids = prompt.token_ids + finished.token_ids
    n_prompt = len(prompt.token_ids)
    text, offsets = completion_offsets(model.tokenizer.backend_tokenizer, finished.token_ids, len(prompt.text))
    whole = prompt.text + text
    logprobs = np.array([np.nan] * n_prompt + [score.logprob for score in finished.scores], dtype=np.float32)
    pooled = captured.position < 0
    dtypes = {str(tensor.dtype) for tensor in captured.tensors.values()}
    return Rollout(
        session_id=session_id,
        rollout_id=rollout_id,
        spec=CaptureSpec(
            model=model.source.name,
            revision=model.source.revision,
            keys=tuple(captured.tensors),
            positions=asked.positions,
            dtype=", ".join(sorted(dtypes)),
        ),
        tensors=captured.tensors,
        position=captured.position,
        row_token_id=np.where(pooled, -1, np.array(token_ids)[captured.position]),
        row_logprob=np.where(pooled, np.nan, logprobs[captured.position]),
        token_ids=token_ids,
        token_offsets=prompt.token_offsets + offsets,
        n_prompt=n_prompt,
        text=whole,
        segments=[*prompt.segments, Segment("assistant", len(prompt.text), len(whole))],
        finish_reason=finished.finish_reason,
        final_logprob=float(logprobs[-1]),
        key=asked.key,
        labels=asked.labels,
    )


def describe(rollout: Rollout, receipt: Receipt, delivery: Delivery = "reference") -> dict[str, Any]:
    """Return the reply's `activations` object for a committed rollout.

    Args:
        rollout: what was committed.
        receipt: where.
        delivery: whether the reply carries values, and how many.
    """
    path = f"{receipt.uri}/{receipt.shard}"
    reply = ActivationReply(
        session_id=receipt.session_id,
        rollout_id=receipt.rollout_id,
        uri=receipt.uri,
        shard=receipt.shard,
        row_start=receipt.row_start,
        row_stop=receipt.row_stop,
        tensors={key: _tensor(values, path, delivery) for key, values in rollout.tensors.items()},
    )
    return reply.model_dump(mode="json", exclude_none=True)


def _tensor(values: Float[Tensor, "rows ..."], path: str, delivery: Delivery) -> StoredTensor:
    dtype = str(values.dtype)
    if delivery == "reference":
        return StoredTensor(shape=tuple(values.shape), dtype=dtype, stored_path=path)
    whole = values[None].float()
    if delivery == "full":
        return StoredTensor(
            format="complete_tensor", shape=tuple(whole.shape), dtype=dtype, stored_path=path, data=whole.tolist()
        )
    return StoredTensor(
        format="sampled_tensor",
        shape=tuple(whole.shape),
        dtype=dtype,
        stored_path=path,
        data=whole[..., :SAMPLED_FEATURES].tolist(),
        sample_info=f"first_{SAMPLED_FEATURES}_features",
    )
