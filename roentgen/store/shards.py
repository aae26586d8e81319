"""Shards: the rows of many rollouts, one tensor after the other, in a safetensors file.

A shard is written as a stream: the header first, since all sizes are known, then each tensor's rows directly from the
rollouts, so that a shard is never in memory a second time. It is read in ranges: the header locates each tensor and its
rows have equal size, so a range of rows of one layer is one range of the file, which a disk maps and a bucket sends.

The format: https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from roentgen.store.quantization import SCALE, dequantize
from roentgen.store.schema import CaptureSpec, StoreError, read_spec, spec_metadata, tensor_bytes
from roentgen.store.storage_backends import Bytes, StorageFolder

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_GUESS = 64 << 10
"""Bytes of the first read, which covers the header of all but enormous shards."""
READS_AT_ONCE = 16
"""Number of concurrent network requests."""
_REQUEST = 8 << 20
"""Approximate bytes of one request."""


def shard_bytes(parts: Sequence[dict[str, Tensor]], spec: CaptureSpec) -> Iterator[Bytes]:
    """Serialize a shard.

    Args:
        parts: per rollout, every tensor of the shard, `[rows, *shape]`.
        spec: the capture spec that the rollouts share.
    """
    # Wide types first, so that every tensor begins at a multiple of its element's size.
    names = sorted(parts[0], key=lambda name: (-parts[0][name].element_size(), name))
    header: dict[str, object] = {"__metadata__": spec_metadata(spec)}
    offset = 0
    for name in names:
        first = parts[0][name]
        rows = sum(len(part[name]) for part in parts)
        end = offset + rows * math.prod(first.shape[1:]) * first.element_size()
        header[name] = {
            "dtype": _NAMES[first.dtype], "shape": [rows, *first.shape[1:]], "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        for part in parts:
            yield tensor_bytes(part[name])


@dataclass(frozen=True)
class _Stored:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Shard:
    """An open shard with a validated header.

    Attributes:
        spec: the capture spec that its rollouts share.
        names: its tensors.
        remote: True if reads wait for a network.
        layout: what shards must share to be merged: each tensor's name, dtype and shape of a row.
        row_bytes: bytes of a row of all tensors together.
    """

    def __init__(self, folder: StorageFolder, name: str) -> None:
        """Open `name` (such as "shards/….safetensors") of a session.

        Raises:
            StoreError: if it is missing, damaged or has a newer schema.
        """
        self._where = f"shard {folder.uri}/{name}"
        self.remote = folder.remote
        try:
            self._file = folder.open(name)
            header, begin = self._header()
            metadata: Any = header.pop("__metadata__", None)
            self._tensors = {name: _stored(entry, begin) for name, entry in header.items()}
        except FileNotFoundError:
            raise StoreError(f"{self._where} is missing") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{self._where} is damaged: {error}") from error
        end = max((s.start + s.shape[0] * s.row_bytes for s in self._tensors.values()), default=begin)
        if end != self._file.size:
            raise StoreError(f"{self._where} is damaged: it has {self._file.size:,} bytes instead of {end:,}")
        self.spec = read_spec(metadata, f"{folder.uri}/{name}")
        self.names = tuple(self._tensors)
        self.layout = tuple((name, s.dtype, s.shape[1:]) for name, s in sorted(self._tensors.items()))
        self.row_bytes = sum(s.row_bytes for s in self._tensors.values())
        self.column = lru_cache(maxsize=None)(self._column)

    def rows(self, name: str, start: int, stop: int) -> Shaped[Tensor, "rows ..."]:
        """Read rows `[start, stop)` of a tensor.

        Raises:
            StoreError: if they cannot be read.
        """
        stored = self._tensors[name]
        self.check(name, start, stop)
        size = (stop - start) * stored.row_bytes
        if not size:
            return torch.empty((stop - start, *stored.shape[1:]), dtype=stored.dtype)
        try:
            data = self._file.read(stored.start + start * stored.row_bytes, size)
        except OSError as error:
            raise StoreError(f"{self._where} cannot be read: {error}") from error
        return torch.frombuffer(data, dtype=stored.dtype).view(stop - start, *stored.shape[1:])

    def check(self, name: str, start: int, stop: int) -> None:
        """Check that a tensor has rows `[start, stop)`.

        Raises:
            StoreError: if it has not.
        """
        rows = self._tensors[name].shape[0]
        if not 0 <= start <= stop <= rows:
            raise StoreError(f"{self._where} is damaged: it has {rows} rows, and its index names {start}:{stop}")

    def expect(self, name: str, start: int, stop: int) -> None:
        """Prefetch rows `[start, stop)` of a tensor, without those around them."""
        stored = self._tensors[name]
        self._file.expect(stored.start + start * stored.row_bytes, (stop - start) * stored.row_bytes)

    def take(self, name: str, rows: Int[np.ndarray, "n"]) -> Shaped[Tensor, "n ..."]:
        """Read the given rows, in any order; rows that are close together are read together.

        Consecutive rows on a disk are not copied: they stay memory-mapped.

        Raises:
            StoreError: if they cannot be read.
        """
        if len(rows) == 0:
            return self.rows(name, 0, 0)
        if not self.remote and (np.diff(rows) == 1).all():
            return self.rows(name, int(rows[0]), int(rows[-1]) + 1)
        ordered, back = np.unique(rows, return_inverse=True)
        spans = _spans(ordered, self._tensors[name].row_bytes, self._file.gap)
        if not self.remote:
            for span in spans:
                self.expect(name, int(span[0]), int(span[-1]) + 1)
            spans = [ordered]

        def read(span: Int[np.ndarray, "m"]) -> Shaped[Tensor, "m ..."]:
            values = self.rows(name, int(span[0]), int(span[-1]) + 1)
            return values if len(values) == len(span) else values[torch.from_numpy(span - span[0])]

        if len(spans) == 1:
            found = read(spans[0])
        else:
            with ThreadPoolExecutor(READS_AT_ONCE) as pool:
                found = torch.cat(list(pool.map(read, spans)))
        return found if len(rows) == len(ordered) and (back[1:] > back[:-1]).all() else found[torch.from_numpy(back)]

    def values(self, key: str, rows: Int[np.ndarray, "n"]) -> Shaped[Tensor, "n ..."]:
        """Read a key's rows as numbers: as stored or, for int8 rows, in float32.

        Raises:
            StoreError: if they cannot be read.
        """
        taken, scale = self.take(key, rows), f"{key}{SCALE}"
        return dequantize(taken, self.take(scale, rows)) if scale in self._tensors else taken

    def _column(self, name: str) -> Shaped[np.ndarray, "rows"]:
        """Read a whole metadata tensor once for all rollouts."""
        values: np.ndarray = self.rows(name, 0, self._tensors[name].shape[0]).numpy()
        return values

    def _header(self) -> tuple[dict[str, dict[str, object]], int]:
        begin = bytes(self._file.read(0, min(self._file.size, _HEADER_GUESS)))
        length = int.from_bytes(begin[:8], "little")
        if len(begin) < 8 or 8 + length > self._file.size:
            raise ValueError(f"its header does not end within its {self._file.size:,} bytes")
        text = begin[8 : 8 + length] if 8 + length <= len(begin) else bytes(self._file.read(8, length))
        return json.loads(text), 8 + length


def _spans(rows: Int[np.ndarray, "n"], row_bytes: int, gap: int) -> list[Int[np.ndarray, "m"]]:
    """Split ascending rows where the gap exceeds `gap` bytes, and so that no span is much larger than a request."""
    wide = np.diff(rows) * row_bytes > gap
    request = rows * row_bytes // _REQUEST
    return np.split(rows, np.flatnonzero(wide | (np.diff(request) > 0)) + 1)


def _stored(entry: dict[str, object], begin: int) -> _Stored:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        raise ValueError("its header is not a safetensors header")
    stored = _Stored(_DTYPES[dtype], tuple(int(size) for size in shape), begin + int(offsets[0]))
    if int(offsets[1]) - int(offsets[0]) != stored.shape[0] * stored.row_bytes:
        raise ValueError("a tensor's offsets and its shape do not agree")
    return stored
