"""The words every room agrees on: hook points, positions, keys, and the shapes of a capture request and its reply.

What flows through here: a client writes an `ActivationRequest` into the request body; the server resolves its hook points
to modules, captures rows, stores them under the keys spelled by `stored_key`, and answers with an `ActivationReply`; the
store and the probes select rows with the same `Positions`. Nothing here imports a room, torch or Ray, so every process can
afford it.

Rows. N generated tokens take N forwards (one prefill, then N - 1 steps): the last sampled token never passes through the
model. Row t is the state at sequence position t, where the token *fed* was token t. A full capture therefore has
`n_prompt + max(n_completion - 1, 0)` rows.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

LAYER_HOOK_POINTS: dict[str, str] = {
    "resid_pre": "residual stream entering the block",
    "resid_mid": "residual stream after attention's contribution is added",
    "resid_post": "residual stream leaving the block",
    "attn_out": "what attention adds to the stream (after any output norm)",
    "mlp_out": "what the MLP adds to the stream (after any output norm)",
    "ln_attn": "output of the norm before attention (post-norm, not the residual stream)",
    "ln_mlp": "output of the norm before the MLP (post-norm, not the residual stream)",
    "router": "the router's logits, one per expert (mixtures of experts)",
}
"""Canonical hook points of a decoder layer, in the order a sequential block computes them."""

MODEL_HOOK_POINTS: dict[str, str] = {
    "embed": "output of the token embedding",
    "final_norm": "output of the last norm, before the output head",
}
"""Canonical hook points that exist once per model."""

DEFAULT_LAYERS: tuple[int, ...] = (8, 12, 16)
DEFAULT_HOOK_POINTS: tuple[str, ...] = ("input_layernorm.output", "post_attention_layernorm.output")

StoredDtype = Literal["model", "float32", "float16", "bfloat16"]

_SESSION_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def check_session_id(value: str) -> str:
    """Return `value` if it is a safe session id; it becomes a folder name, so nothing else may pass.

    Raises:
        ValueError: if it is empty, too long, starts with a dot or has a character outside `[A-Za-z0-9._-]`.
    """
    if not _SESSION_ID.fullmatch(value):
        raise ValueError(
            f"{value!r} is not a session id; allowed are 1 to 64 characters of A-Z a-z 0-9 . _ - not starting with a dot"
        )
    return value


SessionId = Annotated[str, AfterValidator(check_session_id)]
LabelValue = str | int | float | bool | None


def stored_key(hook_point: str, layer: int | None = None) -> str:
    """Spell the store's key of a hook point: `layers.12.resid_post`, `embed`, `layers.3.mlp.gate_proj.output`."""
    return hook_point if layer is None else f"layers.{layer}.{hook_point}"


def split_key(key: str) -> tuple[str, int | None]:
    """Undo `stored_key`: return `(hook_point, layer)`, with layer None for a model-wide key."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
    return (match[2], int(match[1])) if match else (key, None)


@dataclass(frozen=True)
class Positions:
    """A position policy: which sequence positions of a rollout are kept.

    The grammar is `all`, `prompt`, `generated`, `last_prompt`, `last`, `stride:k` (every k-th position, from 0), and the
    pooled `mean_prompt` and `mean_generated`, which average the rows they cover into one row at position -1.

    Attributes:
        policy: the policy's name, without the stride.
        stride: k of `stride:k`, otherwise 1.
    """

    policy: str
    stride: int = 1

    @classmethod
    def parse(cls, text: str) -> "Positions":
        """Read a policy as clients write it.

        Raises:
            ValueError: if `text` is not a policy.
        """
        name, _, number = text.partition(":")
        if name == "stride" and number.isascii() and number.isdigit() and int(number) > 0:
            return cls("stride", int(number))
        if text in ("all", "prompt", "generated", "last_prompt", "last", "mean_prompt", "mean_generated"):
            return cls(text)
        raise ValueError(
            f"{text!r} is not a position policy; allowed are all, prompt, generated, last_prompt, last, stride:k, "
            "mean_prompt, mean_generated"
        )

    def __str__(self) -> str:
        return f"stride:{self.stride}" if self.policy == "stride" else self.policy

    @property
    def pooled(self) -> bool:
        """Whether the rows selected are averaged into one."""
        return self.policy.startswith("mean_")

    def select(self, n_prompt: int, n_rows: int, first: int = 0) -> range:
        """Return the positions kept (for a pooled policy: averaged), of a rollout with `n_rows` rows.

        Args:
            n_prompt: tokens in the prompt.
            n_rows: rows of a full capture, `n_prompt + max(n_completion - 1, 0)`.
            first: leave out positions before this one.
        """
        match self.policy:
            case "all":
                return range(first, n_rows)
            case "prompt" | "mean_prompt":
                return range(first, min(n_prompt, n_rows))
            case "generated" | "mean_generated":
                return range(max(n_prompt, first), n_rows)
            case "last_prompt":
                return range(max(n_prompt - 1, first), min(n_prompt, n_rows))
            case "last":
                return range(max(n_rows - 1, first), n_rows)
            case _:
                return range(first + -first % self.stride, n_rows, self.stride)


def _check_positions(value: str) -> str:
    return str(Positions.parse(value))


class RolloutKey(BaseModel):
    """What makes a rollout the same rollout when it is tried again; the store counts it once by this key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config_hash: str = Field(min_length=1, max_length=64)
    problem_id: str = Field(min_length=1, max_length=200)
    epoch: int = Field(default=1, ge=1)
    turn: int = Field(default=0, ge=0)


class ActivationRequest(BaseModel):
    """`extra_body={"activations": {...}}`: what to keep of one request.

    Attributes:
        session_id: where to keep it; the server's default session if absent.
        key: the rollout's identity, for clients that retry.
        layers: layer indices (negative ones count from the end), or "all".
        hook_points: canonical names, or module paths ending in `.input` or `.output`.
        positions: a policy of `Positions`.
        since: "turn" keeps only what is new in this turn of a conversation: rows from the last token of the last assistant
            message on (that token was sampled in the turn before, but never fed). Without such a message, all rows.
        dtype: what to store; "model" keeps the model's own dtype.
        allow_non_finite: keep rows that hold NaN or infinity, which otherwise fail the request (500, `non_finite_rows`).
        delivery: how the reply carries values (`return` on the wire).
        labels: a flat JSON object stored with the rollout.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    session_id: SessionId | None = None
    key: RolloutKey | None = None
    layers: tuple[int, ...] | Literal["all"] = DEFAULT_LAYERS
    hook_points: tuple[str, ...] = Field(default=DEFAULT_HOOK_POINTS, min_length=1)
    positions: Annotated[str, AfterValidator(_check_positions)] = "all"
    since: Literal["turn"] | None = None
    dtype: StoredDtype = "model"
    allow_non_finite: bool = False
    delivery: Literal["reference", "sample", "full"] = Field(default="reference", alias="return")
    labels: dict[str, LabelValue] = Field(default_factory=dict)


SAMPLED_FEATURES = 50
"""How many of a row's values a sampled tensor carries."""


class StoredTensor(BaseModel):
    """One key of a reply: where its rows are and, if the request asked for them, their values.

    Attributes:
        format: "stored_tensor" is a reference, "sampled_tensor" carries the first features of each row, "complete_tensor" all.
        shape: of the whole: `[rows, *shape]` for a reference, `[1, rows, *shape]` where values are sent.
        dtype: of the stored values ("torch.float32").
        stored_path: the shard that holds them.
        data: the values, nested as `shape` says; null for NaN and infinity, which JSON does not have.
        sample_info: which of them a sample is.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal["stored_tensor", "sampled_tensor", "complete_tensor"] = "stored_tensor"
    shape: tuple[int, ...]
    dtype: str
    stored_path: str
    data: list[Any] | None = None
    sample_info: str | None = None

    @model_serializer(mode="wrap")
    def _said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A reference has no values, and says nothing of them.
        return {key: value for key, value in handler(self).items() if value is not None}


class ActivationReply(BaseModel):
    """The reply's `activations` object; it is sent only after the rollout is durable.

    Attributes:
        session_id: the session that holds the rollout.
        rollout_id: its id, also in the index.
        uri: the session's address, for `Session.open`.
        shard: the shard's path inside the session.
        row_start: first row of this rollout in every tensor of the shard.
        row_stop: one past its last row.
        tensors: per stored key, where and what.
        non_finite_rows: how many rows hold NaN or infinity; absent if none do.
    """

    model_config = ConfigDict(frozen=True)

    session_id: str
    rollout_id: str
    uri: str
    shard: str
    row_start: int
    row_stop: int
    tensors: dict[str, StoredTensor]
    non_finite_rows: int | None = None


def canonical_hash(value: Any) -> str:
    """Hash a JSON value: 16 hex digits of SHA-256 over its canonical spelling (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
