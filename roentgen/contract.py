"""The vocabulary that all packages share: hook points, positions, keys, and the formats of a capture request and its reply.

A client puts an `ActivationRequest` into the request body. The server resolves its hook points to modules, captures rows,
stores them under the keys of `stored_key`, and answers with an `ActivationReply`. The store and the probes select rows with
the same `Positions`. This module imports no other package, torch or Ray, so it is cheap to import in any process.

Rows. N generated tokens take N forward passes (one prefill, then N - 1 decode steps): the last sampled token is never fed
to the model. Row t is the state at sequence position t, where token t was *fed*. A full capture therefore has
`count_rows(n_prompt, n_completion)` rows.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, overload

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)

from roentgen.defaults import EMBEDDED_MODEL

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

_IN_BLOCK = {
    name: place
    for place, name in enumerate(
        ("resid_pre", "ln_attn", "attn_out", "resid_mid", "ln_mlp", "router", "mlp_out", "resid_post")
    )
}

MODEL_HOOK_POINTS: dict[str, str] = {
    "embed": "output of the token embedding",
    "final_norm": "output of the last norm, before the output head",
}
"""Canonical hook points that exist once per model."""

DEFAULT_LAYERS: tuple[int, ...] = (8, 12, 16)
DEFAULT_HOOK_POINTS: tuple[str, ...] = ("input_layernorm.output", "post_attention_layernorm.output")

DEFAULT_TAPS = ("resid_post", "ln_attn", "ln_mlp", *DEFAULT_HOOK_POINTS)
"""Hook points that a vLLM server taps by default, as far as the model has them: the residual stream, and the defaults of
requests."""
DEFAULT_TAPS_NAME = "default"
"""Name that stands for these among a server's tapped hook points."""

CapturedDtype = Literal["model", "float32", "float16", "bfloat16"]
"""Dtype of captured rows; "model" keeps the model's own dtype."""
StoredDtype = Literal["model", "float32", "float16", "bfloat16", "int8"]
"""Dtype of stored rows; "int8" is quantized from the model's own dtype when rows are written, with one scale per row."""

_SESSION_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def check_session_id(value: str) -> str:
    """Return `value` if it is a safe session id, which becomes a folder name.

    Raises:
        ValueError: if it is empty, too long, starts with a dot or has a character outside `[A-Za-z0-9._-]`.
    """
    if not _SESSION_ID.fullmatch(value):
        raise ValueError(
            f"{value!r} is not a session id; allowed are 1 to 64 characters of A-Z a-z 0-9 . _ - not starting with a dot"
        )
    return value


SESSION_ID_PATTERN = f"^{_SESSION_ID.pattern}$"
"""The pattern of `check_session_id`, for JSON schemas."""

SessionId = Annotated[str, AfterValidator(check_session_id), Field(json_schema_extra={"pattern": SESSION_ID_PATTERN})]

MAX_INT32 = 2**31 - 1
"""Maximum of the index's 32-bit columns."""

MAX_LABEL_BYTES = 1 << 20
"""Maximum bytes of a rollout's labels as JSON."""


def is_text(value: str) -> bool:
    """True if a string can be encoded: Python strings may contain unpaired surrogates, which cannot."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_text(value: str) -> str:
    """Return `value` if it can be encoded.

    Raises:
        ValueError: if it contains an unpaired surrogate.
    """
    if not is_text(value):
        raise ValueError(f"{value!r} contains an unpaired surrogate, which cannot be encoded")
    return value


def no_booleans(value: Any) -> Any:
    """Return `value`, a number or a list of numbers, if it contains no boolean.

    In Python true is the integer 1, but a client that sends it means something else.

    Raises:
        ValueError: if it contains one.
    """
    found = value if isinstance(value, bool) else None
    if isinstance(value, list):
        found = next((one for one in value if isinstance(one, bool)), None)
    if found is not None:
        raise ValueError(f"a number is needed, not {str(found).lower()}")
    return value


Text = Annotated[str, AfterValidator(check_text)]
Int = Annotated[int, BeforeValidator(no_booleans)]
Float = Annotated[float, BeforeValidator(no_booleans)]


def _check_label(value: Any) -> Any:
    if value is not None and not isinstance(value, str | int | float | bool):
        raise ValueError(f"a label is a text, a number, true, false or null, and this is a {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no label: JSON, which labels are stored as, has only finite numbers")
    return check_text(value) if isinstance(value, str) else value


LabelValue = Annotated[str | int | float | bool | None, BeforeValidator(_check_label)]


def _check_labels(labels: dict[str, Any]) -> dict[str, Any]:
    for name in labels:
        check_text(name)
    size = len(labels_to_json(labels))
    if size > MAX_LABEL_BYTES:
        raise ValueError(f"they are {size:,} bytes as JSON; allowed are {MAX_LABEL_BYTES:,}")
    return labels


def labels_to_json(labels: dict[str, Any]) -> str:
    """Serialize labels for the store as JSON, in which integers and finite floats are exact.

    Raises:
        ValueError: if a value is not finite.
        TypeError: if a value is not a JSON value.
    """
    return json.dumps(labels, sort_keys=True, allow_nan=False)


Labels = Annotated[dict[str, LabelValue], AfterValidator(_check_labels)]

STEERING_LABEL = "steering"
"""Label of the rollouts of steered requests."""
STOP_LABEL = "stop_when"
"""Label of the rollouts of requests with probes that may act."""
SERVER_LABELS = {STEERING_LABEL: "steering", STOP_LABEL: "probes"}
"""Labels that only the server sets, with the part of the request that each comes from."""

LONGEST_LABEL = 1_000
"""Maximum characters of a problem's field that becomes a label; longer fields, such as a passage, stay with the sample."""


def plain_labels(fields: Mapping[str, Any]) -> dict[str, LabelValue]:
    """Return the fields of a problem's record that become labels of its rollouts: numbers, booleans and short texts."""
    return {
        name: value
        for name, value in fields.items()
        if not isinstance(value, dict | list | tuple) and not (isinstance(value, str) and len(value) > LONGEST_LABEL)
    }


def stored_key(hook_point: str, layer: int | None = None) -> str:
    """Return the stored key of a hook point: `layers.12.resid_post`, `embed`, `layers.3.mlp.gate_proj.output`."""
    return hook_point if layer is None else f"layers.{layer}.{hook_point}"


def split_key(key: str) -> tuple[str, int | None]:
    """Split a stored key into `(hook_point, layer)`; layer is None for a model-wide key."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
    return (match[2], int(match[1])) if match else (key, None)


def execution_order(key: str) -> tuple[int, int, int, str]:
    """Return a sort key for stored keys in the model's order of execution: embedding, layers, then what follows them.

    Inside a layer, canonical hook points are in the order of a sequential block, then module paths by name. A model-wide
    module path follows the layers, unless it is the embedding's.
    """
    hook_point, layer = split_key(key)
    if layer is None:
        before = re.search(r"(?<!un)embed(?!_out)|\bwte\b|\bwpe\b", hook_point) is not None
        return (0 if before else 2), 0, 0 if hook_point in MODEL_HOOK_POINTS else 1, hook_point
    return 1, layer, _IN_BLOCK.get(hook_point, len(_IN_BLOCK)), hook_point


@overload
def count_rows(n_prompt: int, n_completion: int) -> int: ...


@overload
def count_rows(n_prompt: Any, n_completion: Any) -> Any: ...


def count_rows(n_prompt: Any, n_completion: Any) -> Any:
    """Return the number of rows of a full capture: one per token except the last of a completion. Accepts numbers, arrays
    or columns."""
    return n_prompt + n_completion - (n_completion > 0)


@dataclass(frozen=True)
class Positions:
    """A position policy: which sequence positions of a rollout are kept.

    The grammar is `all`, `prompt`, `generated`, `last_prompt`, `last`, `stride:k` (every k-th position, from 0), and the
    pooled policies `mean_prompt` and `mean_generated`, which average their rows into one row at position -1.
    """

    policy: str
    """The policy's name, without the stride."""
    stride: int = 1
    """K of `stride:k`, otherwise 1."""

    @classmethod
    def parse(cls, text: str) -> "Positions":
        """Parse a policy as clients write it.

        Raises:
            ValueError: if `text` is not a policy.
        """
        name, _, number = text.partition(":")
        if name == "stride" and number.isascii() and number.isdigit() and len(number) <= 10:
            stride = int(number)
            if 0 < stride <= MAX_INT32:
                return cls("stride", stride)
        if text in ("all", "prompt", "generated", "last_prompt", "last", "mean_prompt", "mean_generated"):
            return cls(text)
        raise ValueError(
            f"{text[:100]!r} is not a position policy; allowed are all, prompt, generated, last_prompt, last, stride:k (k from "
            f"1 to {MAX_INT32}), mean_prompt, mean_generated"
        )

    def __str__(self) -> str:
        return f"stride:{self.stride}" if self.policy == "stride" else self.policy

    @property
    def pooled(self) -> bool:
        """True if the selected rows are averaged into one."""
        return self.policy.startswith("mean_")

    def select(self, n_prompt: int, n_rows: int, first: int = 0) -> range:
        """Return the positions kept (or, for a pooled policy, averaged) of a rollout with `n_rows` rows.

        Args:
            n_prompt: tokens in the prompt.
            n_rows: rows of a full capture (`count_rows`).
            first: skip positions before this one.
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


def read_layers(value: Any) -> Any:
    """Parse layers written as `0,12,-1` or `all`; values that are not strings are returned unchanged.

    Raises:
        ValueError: if the string is not a list of layers.
    """
    if not isinstance(value, str) or value == "all":
        return value
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise ValueError(f"{value!r} is not a list of layers; allowed are 8,12,16 and the like, or all") from None


def read_names(value: Any) -> Any:
    """Parse comma-separated names; values that are not strings are returned unchanged.

    Raises:
        ValueError: if one is empty.
    """
    if not isinstance(value, str):
        return value
    names = tuple(name.strip() for name in value.split(","))
    if "" in names:
        raise ValueError(f"{value!r} contains an empty name")
    return names


def read_numbers(value: Any) -> Any:
    """Parse comma-separated numbers without duplicates; values that are not strings are returned unchanged.

    Raises:
        ValueError: if the string is not a list of finite numbers.
    """
    if not isinstance(value, str):
        return value
    try:
        numbers = tuple(dict.fromkeys(float(part) for part in value.split(",")))
    except ValueError:
        numbers = ()
    if not (numbers and all(map(math.isfinite, numbers))):
        raise ValueError(f"{value!r} is not a comma-separated list of numbers")
    return numbers


Layers = Annotated[
    tuple[Int, ...] | Literal["all"],
    Field(description='Layers to capture, such as 8,12,16 (negative ones count from the end), or "all".'),
]
HookPoints = Annotated[
    tuple[Text, ...],
    Field(
        min_length=1,
        description="Hook points to capture: canonical names, or module paths ending in .input or .output.",
    ),
]
WrittenLayers = Annotated[Layers, BeforeValidator(read_layers)]
"""Layers that may also be text, as in command-line options. HTTP accepts only JSON lists."""

WrittenHookPoints = Annotated[HookPoints, BeforeValidator(read_names)]

PositionPolicy = Annotated[
    str,
    AfterValidator(_check_positions),
    Field(
        description="Positions to capture: all, prompt, generated, last_prompt, last, stride:k, mean_prompt, mean_generated.",
        json_schema_extra={
            "pattern": "^(all|prompt|generated|last_prompt|last|mean_prompt|mean_generated|stride:[0-9]{1,10})$"
        },
    ),
]
STEERABLE = ("all", "prompt", "generated", "last_prompt", "stride:k")


def _check_steered(value: str) -> str:
    """Check that a policy selects rows while they are computed, not only when all are known."""
    positions = Positions.parse(value)
    if positions.pooled or positions.policy == "last":
        raise ValueError(f"{value!r} is not known while tokens are generated; allowed are {', '.join(STEERABLE)}")
    return str(positions)


SteeredPositions = Annotated[
    str,
    AfterValidator(_check_steered),
    Field(
        description=f"Positions to steer: {', '.join(STEERABLE)}.",
        json_schema_extra={"pattern": "^(all|prompt|generated|last_prompt|stride:[0-9]{1,10})$"},
    ),
]
AllowNonFinite = Annotated[
    bool, Field(description="Store rows with NaN or infinity, which otherwise fail their request.")
]

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
Quantize = Annotated[
    Literal["int8"] | None,
    Field(description="int8 stores each weight of linear layers in one byte, with one scale per output; CPU only."),
]
ModelName = Annotated[
    str, Field(min_length=1, max_length=1024, description=f"{EMBEDDED_MODEL} (embedded), a folder, or a hub id.")
]
Revision = Annotated[Annotated[str, Field(max_length=256)] | None, Field(description="Revision of a hub model.")]

# The limits precede the validator: only then does the JSON Schema contain them as `minimum` and `maximum`.
_NO_BOOLEANS = BeforeValidator(no_booleans)
MaxTokens = Annotated[int, Field(ge=1, description="Maximum number of tokens to generate per request."), _NO_BOOLEANS]
Temperature = Annotated[float, Field(ge=0, le=2, description="Sampling temperature; 0 is greedy."), _NO_BOOLEANS]
TopP = Annotated[
    float, Field(gt=0, le=1, description="Nucleus sampling: the cumulative probability to sample from."), _NO_BOOLEANS
]


STORED_DTYPE = (
    'Stored dtype; "model" keeps the model\'s own dtype, "int8" stores one byte per value and one scale per row.'
)


class RolloutKey(BaseModel):
    """The identity of a rollout across retries; the store counts it once by this key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config_hash: Text = Field(min_length=1, max_length=64)
    problem_id: Text = Field(min_length=1, max_length=200)
    epoch: Int = Field(default=1, ge=1, le=MAX_INT32)
    turn: Int = Field(default=0, ge=0, le=MAX_INT32)


class ActivationRequest(BaseModel):
    """`extra_body={"activations": {...}}`: the capture parameters of a request."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    session_id: SessionId | None = Field(
        default=None, description="Session to store the rollout in; the server's default session if absent."
    )
    key: RolloutKey | None = Field(default=None, description="The rollout's identity, for clients that retry.")
    layers: Layers = DEFAULT_LAYERS
    hook_points: HookPoints = DEFAULT_HOOK_POINTS
    positions: PositionPolicy = "all"
    since: Literal["turn"] | None = Field(
        default=None,
        description='"turn" captures only the new rows of this turn of a conversation: from the last token of the last '
        "assistant message on (it was sampled in the previous turn, but never fed). Without such a message, all rows.",
    )
    dtype: StoredDtype = Field(default="model", description=STORED_DTYPE)
    allow_non_finite: AllowNonFinite = False
    delivery: Literal["reference", "sample", "full"] = Field(
        default="reference", alias="return", description="How the reply carries values."
    )
    labels: Labels = Field(
        default_factory=dict,
        description="A flat JSON object stored with the rollout; numbers are stored exactly.",
    )


SAMPLED_FEATURES = 50
"""Number of values per row in a sampled tensor."""


class StoredTensor(BaseModel):
    """One key of a reply: the location of its rows and, if requested, their values."""

    model_config = ConfigDict(frozen=True)

    format: Literal["stored_tensor", "sampled_tensor", "complete_tensor"] = "stored_tensor"
    """"stored_tensor" is a reference, "sampled_tensor" has the first features of each row, "complete_tensor" has all."""
    shape: tuple[int, ...]
    """Shape of the whole tensor: `[rows, *shape]` for a reference, `[1, rows, *shape]` if values are included."""
    dtype: str
    """Dtype of the stored values ("torch.float32")."""
    stored_path: str
    """The shard with the rows."""
    # Omitted in a reference.
    data: list[Any] | None = Field(default=None, exclude_if=lambda data: data is None)
    """The values, nested according to `shape`; null for NaN and infinity, which JSON lacks."""
    sample_info: str | None = Field(default=None, exclude_if=lambda info: info is None)
    """Describes which values a sample contains."""


ProbeEffect = Literal["stop", "close_reasoning"]
"""The effect of a probe's scores: end the generation, or close the model's reasoning."""


class ProbeAction(BaseModel):
    """An action that a probe's scores have taken on a generation."""

    model_config = ConfigDict(frozen=True)

    probe: str
    """The probe's name in the request."""
    then: ProbeEffect
    """The effect."""
    position: int
    """Position of the token whose score triggered it."""
    score: float
    """That score."""


class ActivationReply(BaseModel):
    """The reply's `activations` object; it is sent only after the rollout is durable."""

    model_config = ConfigDict(frozen=True)

    session_id: str
    """The session that holds the rollout."""
    rollout_id: str
    """Its id, also in the index."""
    uri: str
    """The session's address, for `Session.open`."""
    shard: str
    """The shard's path inside the session."""
    row_start: int
    """First row of this rollout in every tensor of the shard."""
    row_stop: int
    """One past its last row."""
    tensors: dict[str, StoredTensor]
    """The tensors by stored key."""
    non_finite_rows: int | None = None
    """Number of rows with NaN or infinity; absent if there are none."""
    acted: tuple[ProbeAction, ...] | None = None
    """Actions of probes; absent if there are none."""


def captured_as(stored: StoredDtype) -> CapturedDtype:
    """Return the dtype in which rows are captured for a stored dtype."""
    return "model" if stored == "int8" else stored


def quantize_again(recorded: str | None) -> Quantize:
    """Return the `quantize` option that reproduces a model as served: a checkpoint that is already quantized needs none."""
    return "int8" if recorded == "int8" else None


def canonical_hash(value: Any) -> str:
    """Hash a JSON value: 16 hex digits of the SHA-256 of its canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
