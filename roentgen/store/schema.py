"""What the store's files hold: the index's columns, the shard's tensors, and the objects a writer takes and gives.

A shard holds rollouts of one `CaptureSpec`, so every tensor in it has the same rows and a layer is one sequential read. An
index row says where a rollout's rows are and carries everything needed to read them without the run: the text, which
characters each token covers, who said what, and the caller's key and labels.
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
"""The newest schema of a shard; those without int8 rows have 1, as before."""

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
"""Columns that schema 1 did not have at first: in an index file without them they are null, which means not counted."""


class StoreError(RoentgenError):
    """The store could not be read or written; the message names the file and what to do."""


class UnstorableError(StoreError):
    """A rollout has something that the index's columns do not hold; the message names the column."""


class SessionNotFoundError(StoreError):
    """There is no session at an address."""


class NonFiniteRowsError(StoreError):
    """Rows hold NaN or infinity, and whoever captured them did not allow it; the message names the first of them."""


class CaptureSpec(BaseModel):
    """What all rollouts of one shard have in common; it is the shard's header metadata."""

    model_config = ConfigDict(frozen=True)

    model: str
    """The model's served name."""
    revision: str
    """Its revision or content hash."""
    keys: tuple[str, ...]
    """Stored keys, in the order asked for."""
    positions: str
    """The position policy."""
    dtype: str
    """The stored dtype, e.g. "torch.bfloat16"; with "torch.int8", each key has scales beside it (`quantization`)."""
    computed_in: str | None = None
    """The dtype that the model computed in; None in shards that do not say."""
    model_quantization: str | None = None
    """How the model's weights were quantized; None if they were not. Of rows, `dtype` says it."""


@dataclass(frozen=True)
class NonFinite:
    """What of a rollout's rows is not finite."""

    rows: int
    """How many rows hold NaN or infinity under any key."""
    key: str
    """The first key that has such a row."""
    position: int
    """Of the first such row of that key; -1 for a pooled row."""


_TOKEN_BYTES = 2 * (8 + 28)
"""Of a token in memory: its id and its offset, each a number and its place in a list."""

_ROLLOUT_BYTES = 6 << 10
"""Of a rollout in memory: its tensors' and arrays' objects, its names and labels, and the future that waits for it."""


@dataclass(frozen=True)
class CapturedRollout:
    """One finished generation with its captured rows, ready to be stored."""

    session_id: str
    """The session to append to."""
    rollout_id: str
    """A ULID."""
    spec: CaptureSpec
    """What was captured."""
    tensors: dict[str, Shaped[Tensor, "rows ..."]]
    """Per key of the spec, `[rows, *shape]`; of int8 rows, what they are to be made of."""
    position: Shaped[np.ndarray, "rows"]
    """Sequence position per row, -1 for a pooled row, `[rows]`."""
    sequence: TokenizedText
    """Prompt and completion."""
    logprobs: Float[np.ndarray, "tokens"]
    """Log-probability of each of its tokens when it was sampled; NaN for those of the prompt, `[tokens]`."""
    finish_reason: str
    """"stop" or "length"."""
    key: RolloutKey | None = None
    """The caller's identity for the rollout, if it gave one."""
    labels: dict[str, LabelValue] = field(default_factory=dict)
    """The caller's labels."""
    require_finite: bool = False
    """Whether rows that hold NaN or infinity fail the rollout; they are counted in any case."""

    @cached_property
    def non_finite(self) -> NonFinite | None:
        """The rows that are not finite, None if all are; it reads every value, so the writer's thread asks first."""
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
        """Rows stored, after the position policy."""
        return len(self.position)

    @property
    def nbytes(self) -> int:
        """Bytes of the activations, as they are stored."""
        if self.quantized:
            return sum(tensor.numel() + 4 * self.n_rows for tensor in self.tensors.values())
        return self._bytes_given

    @property
    def quantized(self) -> bool:
        """Whether the rows are stored as int8."""
        return self.spec.dtype == QUANTIZED

    @property
    def _bytes_given(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def size(self) -> int:
        """Bytes of the activations and, about, of the text, the tokens and the labels."""
        return self.nbytes + len(self.sequence.text) + 8 * len(self.sequence.token_ids) + self._label_bytes

    @property
    def in_memory(self) -> int:
        """Bytes that it takes while it waits to be written, about: of a small one they are mostly Python's objects."""
        tokens = _TOKEN_BYTES * len(self.sequence.token_ids)
        return self._bytes_given + len(self.sequence.text) + tokens + self._label_bytes + _ROLLOUT_BYTES

    @property
    def _label_bytes(self) -> int:
        return sum(len(key) + (len(value) if isinstance(value, str) else 8) for key, value in self.labels.items())

    def as_read(self, key: str) -> Shaped[Tensor, "rows ..."]:
        """Return a key's rows as a reader will get them."""
        return dequantize(*quantize(self.tensors[key])) if self.quantized else self.tensors[key]

    def all_tensors(self) -> dict[str, Tensor]:
        """Return the activations and the row columns, as the shard names them; a pooled row has no token."""
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
    """Where a committed rollout is; it exists only once the rollout is durable."""

    session_id: str
    rollout_id: str
    uri: str
    shard: str
    row_start: int
    row_stop: int


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    A sum shows both, in one pass without a copy, thirty times as fast as `isfinite`. A sum of finite values may overflow, in
    float16 soon; the least and the greatest value then tell.
    """
    if not tensor.is_floating_point() or tensor.sum().isfinite():
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def check_finite(rollout: CapturedRollout) -> None:
    """Refuse a rollout with rows that are not finite, if it requires them to be.

    Raises:
        NonFiniteRowsError: naming the first of them.
    """
    found = rollout.non_finite if rollout.require_finite else None
    if found is None:
        return
    where = "a pooled row" if found.position < 0 else f"position {found.position}"
    dtypes = [*rollout.spec.dtype.split(", "), rollout.spec.computed_in]
    limit = " float16 ends at 65,504:" if "torch.float16" in dtypes else ""
    raise NonFiniteRowsError(
        f"{found.rows} of {rollout.n_rows} rows hold NaN or infinity, first {found.key} at {where}, so nothing was stored."
        f"{limit} run the model in bfloat16 or float32 (dtype), leave those layers out, or set allow_non_finite to keep them"
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, row after row, without copying one that lies so already."""
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
    """Spell a spec as safetensors header metadata (strings only)."""
    version = SHARD_VERSION if spec.dtype == QUANTIZED else SCHEMA_VERSION
    return {"roentgen_schema": str(version), "format": "pt", "spec": spec.model_dump_json(exclude_none=True)}


def read_spec(metadata: dict[str, str] | None, where: str) -> CaptureSpec:
    """Read a shard's spec back.

    Raises:
        StoreError: if the header is not one of ours, or of a newer schema.
    """
    check_version((metadata or {}).get("roentgen_schema"), where, SHARD_VERSION)
    return CaptureSpec.model_validate_json((metadata or {})["spec"])


def check_version(version: str | None, where: str, newest: int = SCHEMA_VERSION) -> None:
    """Refuse a file of a newer schema than this code reads.

    Raises:
        StoreError: if the version is missing or newer.
    """
    if version is None or not version.isdecimal():
        raise StoreError(f"{where} has no schema version: it was not written by Roentgen")
    if int(version) > newest:
        raise StoreError(f"{where} has schema {version}; this version reads up to {newest}: upgrade roentgen")


def index_row(rollout: CapturedRollout, receipt: Receipt, created: Any, checksum: str) -> dict[str, Any]:
    """Spell a committed rollout as a row of the index."""
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
    """Put rows of the index into its columns.

    Raises:
        UnstorableError: if a column does not hold one of its values.
    """
    return pa.table([_column(field, rows) for field in INDEX_SCHEMA], schema=INDEX_SCHEMA)


def _column(field: pa.Field, rows: Sequence[dict[str, Any]]) -> pa.Array | pa.ChunkedArray:
    try:
        return pa.array([row[field.name] for row in rows], field.type)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise UnstorableError(f"{field.name}: {error}") from error


def read_labels(text: str) -> dict[str, LabelValue]:
    """Read a rollout's labels back.

    Older versions let half a surrogate pair in. Nothing that the labels are then put into (a page, a file, a terminal) can
    spell one, so it is read as U+FFFD, as any decoder reads it.
    """
    labels: dict[str, LabelValue] = json.loads(text)
    if all(is_text(key) and (not isinstance(value, str) or is_text(value)) for key, value in labels.items()):
        return labels
    whole = json.dumps(labels, ensure_ascii=False).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    mended: dict[str, LabelValue] = json.loads(whole)
    return mended
