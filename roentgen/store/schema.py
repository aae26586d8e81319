"""The contents of the store's files: the index columns, the shard tensors, and the objects that a writer takes and returns.

A shard holds rollouts of one `CaptureSpec`, so all its tensors have the same rows and reading a layer is one sequential
read. An index row locates a rollout's rows and carries everything needed to interpret them without the run: the text, the
characters of each token, the roles, and the caller's key and labels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from jaxtyping import Float, Shaped
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from roentgen.contract import LabelValue, RolloutKey, is_text, labels_to_json
from roentgen.errors import RoentgenError
from roentgen.store.quantization import QUANTIZED, SCALE, dequantize, quantize
from roentgen.tokenized_text import TokenizedText

SCHEMA_VERSION = 1
SHARD_VERSION = 2
"""The newest schema of a shard; shards without int8 rows have schema 1."""

INDEX_SCHEMA = pa.schema(
    [
        ("rollout_id", pa.string()),
        ("created", pa.timestamp("us", tz="UTC")),
        ("config_hash", pa.string()),
        ("problem_id", pa.string()),
        ("epoch", pa.int32()),
        ("turn", pa.int32()),
        ("labels", pa.string()),
        ("shard", pa.string()),
        ("row_start", pa.int64()),
        ("row_stop", pa.int64()),
        ("n_prompt", pa.int32()),
        ("n_completion", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("token_offsets", pa.list_(pa.int32())),
        ("segments", pa.list_(pa.struct([("role", pa.string()), ("start", pa.int32()), ("stop", pa.int32())]))),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("final_token", pa.int32()),
        ("final_logprob", pa.float32()),
        ("checksum", pa.string()),
        ("non_finite_rows", pa.int32()),
    ],
    metadata={"roentgen_schema": str(SCHEMA_VERSION)},
)

ADDED_COLUMNS = frozenset({"non_finite_rows"})
"""Columns that were added to schema 1; in older index files they read as null, which means not counted."""


class StoreError(RoentgenError):
    """The store cannot be read or written; the message names the file and what to do."""


class UnstorableError(StoreError):
    """A rollout does not fit the index's columns; the message names the column."""


class SessionNotFoundError(StoreError):
    """There is no session at the address."""


class NonFiniteRowsError(StoreError):
    """Rows contain NaN or infinity and the request did not allow it; the message names the first of them."""


class CaptureSpec(BaseModel):
    """What all rollouts of a shard share; stored in the shard's header metadata."""

    model_config = ConfigDict(frozen=True)

    model: str
    """The model's served name."""
    revision: str
    """Its revision or content hash."""
    keys: tuple[str, ...]
    """Stored keys, in the requested order."""
    positions: str
    """The position policy."""
    dtype: str
    """The stored dtype, e.g. "torch.bfloat16"; with "torch.int8", each key has scales beside it (`quantization`)."""
    computed_in: str | None = None
    """The dtype that the model computed in; None in shards that do not record it."""
    model_quantization: str | None = None
    """Quantization of the model's weights; None if there is none. `dtype` describes the rows."""


@dataclass(frozen=True)
class NonFinite:
    """The rows of a rollout that are not finite."""

    rows: int
    """Number of rows with NaN or infinity under any key."""
    key: str
    """The first key that has such a row."""
    position: int
    """Position of the first such row of that key; -1 for a pooled row."""


_TOKEN_BYTES = 2 * (8 + 28)
"""Bytes of a token in memory: its id and its offset, each an integer object and a list slot."""

_ROLLOUT_BYTES = 6 << 10
"""Bytes of a rollout in memory, besides its data: tensor and array objects, names, labels and the future."""


@dataclass(frozen=True)
class CapturedRollout:
    """A finished generation with its captured rows, ready to be stored."""

    session_id: str
    """The session to append to."""
    rollout_id: str
    """A ULID."""
    spec: CaptureSpec
    """What was captured."""
    tensors: dict[str, Shaped[Tensor, "rows ..."]]
    """Per key of the spec, `[rows, *shape]`; for int8, the values before quantization."""
    position: Shaped[np.ndarray, "rows"]
    """Sequence position per row, -1 for a pooled row, `[rows]`."""
    sequence: TokenizedText
    """Prompt and completion."""
    logprobs: Float[np.ndarray, "tokens"]
    """Log-probability of each token when it was sampled; NaN for prompt tokens, `[tokens]`."""
    finish_reason: str
    """"stop" or "length"."""
    key: RolloutKey | None = None
    """The caller's key of the rollout, if given."""
    labels: dict[str, LabelValue] = field(default_factory=dict)
    """The caller's labels."""
    require_finite: bool = False
    """True if rows with NaN or infinity fail the rollout; they are counted in any case."""

    @cached_property
    def non_finite(self) -> NonFinite | None:
        """The rows that are not finite; None if all are. Reads every value, so the writer's thread computes it first."""
        bad: np.ndarray | None = None
        first: tuple[str, int] | None = None
        for key in self.spec.keys:
            if all_finite(self.tensors[key]):
                continue
            rows = ~self.tensors[key].reshape(self.n_rows, -1).isfinite().all(dim=1).numpy()
            first = first or (key, int(self.position[int(rows.argmax())]))
            bad = rows if bad is None else bad | rows
        if bad is None or first is None:
            return None
        return NonFinite(int(bad.sum()), *first)

    @property
    def n_rows(self) -> int:
        """Number of rows stored, after the position policy."""
        return len(self.position)

    @property
    def nbytes(self) -> int:
        """Bytes of the activations as stored."""
        if self.quantized:
            return sum(tensor.numel() + 4 * self.n_rows for tensor in self.tensors.values())
        return self._bytes_given

    @property
    def quantized(self) -> bool:
        """True if the rows are stored as int8."""
        return self.spec.dtype == QUANTIZED

    @property
    def _bytes_given(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def size(self) -> int:
        """Approximate bytes of the activations, text, tokens and labels."""
        return self.nbytes + len(self.sequence.text) + 8 * len(self.sequence.token_ids) + self._label_bytes

    @property
    def in_memory(self) -> int:
        """Approximate bytes in memory while it waits to be written; for small rollouts, mostly Python objects."""
        tokens = _TOKEN_BYTES * len(self.sequence.token_ids)
        return self._bytes_given + len(self.sequence.text) + tokens + self._label_bytes + _ROLLOUT_BYTES

    @property
    def _label_bytes(self) -> int:
        return sum(len(key) + (len(value) if isinstance(value, str) else 8) for key, value in self.labels.items())

    def as_read(self, key: str) -> Shaped[Tensor, "rows ..."]:
        """Return a key's rows as a reader will read them."""
        return dequantize(*quantize(self.tensors[key])) if self.quantized else self.tensors[key]

    def all_tensors(self) -> dict[str, Tensor]:
        """Return the activations and the row columns under their names in the shard; a pooled row has no token."""
        stored = dict(self.tensors)
        if self.quantized:
            for key in self.spec.keys:
                stored[key], stored[f"{key}{SCALE}"] = quantize(self.tensors[key])
        pooled = self.position < 0
        columns = {
            "token_id": np.where(pooled, -1, np.array(self.sequence.token_ids)[self.position]).astype(np.int32),
            "position": self.position.astype(np.int32),
            "generated": (self.position >= self.sequence.n_prompt).astype(np.uint8),
            "logprob": np.where(pooled, np.nan, self.logprobs[self.position]).astype(np.float32),
        }
        return stored | {name: torch.from_numpy(column) for name, column in columns.items()}


@dataclass(frozen=True)
class Receipt:
    """The location of a committed rollout; it exists only once the rollout is durable."""

    session_id: str
    rollout_id: str
    uri: str
    shard: str
    row_start: int
    row_stop: int


def all_finite(tensor: Tensor) -> bool:
    """True if a tensor contains neither NaN nor infinity.

    A sum detects both in one pass without a copy, thirty times as fast as `isfinite`. A sum of finite values may overflow,
    which happens early in float16; then the minimum and maximum decide.
    """
    if not tensor.is_floating_point() or tensor.sum().isfinite():
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def check_finite(rollout: CapturedRollout) -> None:
    """Check that a rollout's rows are finite, if it requires that.

    Raises:
        NonFiniteRowsError: if they are not; the message names the first such row.
    """
    found = rollout.non_finite if rollout.require_finite else None
    if found is None:
        return
    where = "a pooled row" if found.position < 0 else f"position {found.position}"
    dtypes = [*rollout.spec.dtype.split(", "), rollout.spec.computed_in]
    limit = " float16 ends at 65,504:" if "torch.float16" in dtypes else ""
    raise NonFiniteRowsError(
        f"{found.rows} of {rollout.n_rows} rows contain NaN or infinity, first {found.key} at {where}; nothing was stored."
        f"{limit} run the model in bfloat16 or float32 (dtype), omit those layers, or set allow_non_finite"
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, row by row, without copying a contiguous one."""
    if not tensor.numel():  # torch cannot view an empty tensor as bytes
        return memoryview(b"")
    view: memoryview = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return view


def rows_checksum(tensors: dict[str, Tensor]) -> str:
    """Return the XXH3-128 of a rollout's rows: each tensor's bytes, in order of name."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def spec_metadata(spec: CaptureSpec) -> dict[str, str]:
    """Serialize a spec as safetensors header metadata (strings only)."""
    version = SHARD_VERSION if spec.dtype == QUANTIZED else SCHEMA_VERSION
    return {"roentgen_schema": str(version), "format": "pt", "spec": spec.model_dump_json(exclude_none=True)}


def read_spec(metadata: dict[str, str] | None, where: str) -> CaptureSpec:
    """Parse a shard's spec.

    Raises:
        StoreError: if Roentgen did not write the header, or it has a newer schema.
    """
    check_version((metadata or {}).get("roentgen_schema"), where, SHARD_VERSION)
    return CaptureSpec.model_validate_json((metadata or {})["spec"])


def check_version(version: str | None, where: str, newest: int = SCHEMA_VERSION) -> None:
    """Check that this code can read a file's schema.

    Raises:
        StoreError: if the version is missing or newer.
    """
    if version is None or not version.isdecimal():
        raise StoreError(f"{where} has no schema version: it was not written by Roentgen")
    if int(version) > newest:
        raise StoreError(f"{where} has schema {version}; this version reads up to {newest}: upgrade roentgen")


def index_row(rollout: CapturedRollout, receipt: Receipt, created: Any, checksum: str) -> dict[str, Any]:
    """Convert a committed rollout to a row of the index."""
    key, sequence = rollout.key, rollout.sequence
    return {
        "rollout_id": rollout.rollout_id,
        "created": created,
        "config_hash": key.config_hash if key else None,
        "problem_id": key.problem_id if key else None,
        "epoch": key.epoch if key else None,
        "turn": key.turn if key else None,
        "labels": _labels_json(rollout.labels),
        "shard": receipt.shard,
        "row_start": receipt.row_start,
        "row_stop": receipt.row_stop,
        "n_prompt": sequence.n_prompt,
        "n_completion": sequence.n_completion,
        "token_ids": sequence.token_ids,
        "token_offsets": sequence.token_offsets,
        "segments": [{"role": s.role, "start": s.start, "stop": s.stop} for s in sequence.segments],
        "text": sequence.text,
        "finish_reason": rollout.finish_reason,
        "final_token": sequence.token_ids[-1] if sequence.n_completion else None,
        "final_logprob": float(rollout.logprobs[-1]) if sequence.n_completion else None,
        "checksum": checksum,
        "non_finite_rows": rollout.non_finite.rows if rollout.non_finite else 0,
    }


def _labels_json(labels: dict[str, LabelValue]) -> str:
    try:
        return labels_to_json(labels)
    except (TypeError, ValueError) as error:
        raise UnstorableError(f"labels: {error}") from error


def index_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Convert rows of the index to a table.

    Raises:
        UnstorableError: if a value does not fit its column.
    """
    return pa.table([_column(field, rows) for field in INDEX_SCHEMA], schema=INDEX_SCHEMA)


def _column(field: pa.Field, rows: Sequence[dict[str, Any]]) -> pa.Array | pa.ChunkedArray:
    try:
        return pa.array([row[field.name] for row in rows], field.type)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise UnstorableError(f"{field.name}: {error}") from error


def read_labels(text: str) -> dict[str, LabelValue]:
    """Parse a rollout's labels.

    Older versions accepted unpaired surrogates, which no page, file or terminal can encode, so they are read as U+FFFD, as
    any decoder does.
    """
    labels: dict[str, LabelValue] = json.loads(text)
    if all(is_text(key) and (not isinstance(value, str) or is_text(value)) for key, value in labels.items()):
        return labels
    whole = json.dumps(labels, ensure_ascii=False).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    mended: dict[str, LabelValue] = json.loads(whole)
    return mended
