"""Computes a local model's revision from its content, so that two models with one name never share a revision.

`folder_revision` hashes every file that decides what the model computes or how it reads text: configurations, tokenizer files,
chat templates, custom code, adapters and weights. It ignores READMEs, training state and formats that are never loaded, so
changes to them do not change the revision. It also ignores modification times: a copy of a folder is the same model.

Small weights are hashed whole. Of weights beyond `WHOLE_BYTES`, which would take minutes to read, the hash covers each file's
header and evenly spaced blocks of each tensor. So it notices training, merging or quantizing wherever it happens, but perhaps
not an edit of a few rows of one tensor. Other large files are sampled at evenly spaced blocks and at both ends (a PyTorch file
ends with the checksums of its tensors).

Reading the headers also finds truncated files and missing shards, before anything slow starts.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from roentgen.errors import RoentgenError

WHOLE_BYTES = 1 << 30
"""Weights of a folder up to this size are hashed whole, which takes a tenth of a second at the speed of memory."""
BLOCK = 4 << 10
SAMPLED_BLOCKS = 16
"""Number of blocks that are read of each tensor in sampled weights."""
STRIDE = 256 << 10
"""Distance between the blocks of a large file without known tensors."""
ENDS = 1 << 20
"""Number of bytes read at both ends of such a file."""
_CHUNK = 1 << 20

BASE_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The weight files that transformers looks for, in this order."""
WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_TEXT_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".bpe", ".spm", ".yaml"})
_NOT_THE_MODEL = (
    "training_args",
    "trainer_",
    "optimizer",
    "scheduler",
    "rng_state",
    "scaler",
    "readme",
    "license",
    "requirements",
    "all_results",
    "train_results",
    "eval_results",
)
"""Prefixes of the names of files that training leaves beside a model, or that are for readers."""
MAX_HEADER = 100_000_000
"""The largest header that safetensors allows."""


class DamagedWeightsError(RoentgenError, ValueError):
    """A weight file is truncated or has another format, or an index names a missing file."""


def folder_revision(folder: Path, beside: str = "") -> str:
    """Return a local model's revision: `local-` and 16 hex digits over the content of its files.

    Args:
        folder: the model's folder.
        beside: additional content to hash, such as the revision of an adapter's base model.

    Raises:
        DamagedWeightsError: if a weight file is truncated or an index names a missing file.
    """
    check_shards(folder)
    files = list(deciding_files(folder))
    size = sum(path.stat().st_size for path in files if path.suffix in WEIGHT_SUFFIXES)
    digest = hashlib.sha256(beside.encode())
    for path in files:
        content = content_hash(path, whole=path.suffix not in WEIGHT_SUFFIXES or size <= WHOLE_BYTES)
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return f"local-{digest.hexdigest()[:16]}"


def file_revision(path: Path) -> str:
    """Return 12 hex digits over a weight file's content."""
    return content_hash(path, whole=path.stat().st_size <= WHOLE_BYTES)[:12]


def deciding_files(folder: Path) -> Iterator[Path]:
    """Yield a model folder's files that decide what it computes, sorted by name."""
    nested = [*folder.glob("*/*.py"), *folder.glob("*/*.jinja")]
    for path in sorted([*folder.iterdir(), *nested]):
        name = path.name.lower()
        if name.startswith((".", *_NOT_THE_MODEL)) or path.suffix not in WEIGHT_SUFFIXES | _TEXT_SUFFIXES:
            continue
        if path.is_file():
            yield path


def content_hash(path: Path, *, whole: bool) -> str:
    """Return the XXH3-128 of a file's content, or of a sample of it.

    Raises:
        DamagedWeightsError: if it is a safetensors file and truncated.
    """
    import xxhash  # imported here, because an engine with random weights does not need it

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        number, size = file.fileno(), path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        header = read_header(path) if path.suffix == ".safetensors" else None
        if whole:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        else:
            for start, length in _sample(size, header):
                digest.update(os.pread(number, length, start))
    return digest.hexdigest()


def _sample(size: int, header: "SafetensorsHeader | None") -> Iterator[tuple[int, int]]:
    """Yield the pieces of a large file to read: `(start, length)`."""
    if header is None:
        yield 0, min(ENDS, size)
        yield from ((start, BLOCK) for start in range(ENDS, max(size - ENDS, ENDS), STRIDE))
        yield max(size - ENDS, 0), min(ENDS, size)
        return
    yield 0, header.begin
    for name in sorted(header.tensors):
        first, stop = header.tensors[name]["data_offsets"]
        length = stop - first
        if length <= SAMPLED_BLOCKS * BLOCK:
            yield header.begin + first, length
            continue
        for number in range(SAMPLED_BLOCKS):
            yield header.begin + first + (length - BLOCK) * number // (SAMPLED_BLOCKS - 1), BLOCK


class SafetensorsHeader:
    """A safetensors file's header.

    Attributes:
        begin: offset of the tensors' bytes.
        tensors: per name, `dtype`, `shape` and `data_offsets` (from `begin`).
    """

    def __init__(self, begin: int, tensors: dict[str, Any]) -> None:
        self.begin = begin
        self.tensors = tensors


def read_header(path: Path) -> SafetensorsHeader:
    """Read a safetensors file's header and compare it with the file's size.

    Raises:
        DamagedWeightsError: if it is not a complete safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise DamagedWeightsError(
                f"{path} is not a complete safetensors file: it has {size:,} bytes and no complete header"
            )
        try:
            tensors = json.loads(file.read(length))
            tensors.pop("__metadata__", None)
            end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DamagedWeightsError(f"{path} is not a safetensors file: its header cannot be read") from error
    if size != 8 + length + end:
        raise DamagedWeightsError(
            f"{path} is damaged: its tensors need {8 + length + end:,} bytes and the file has {size:,}; download it again"
        )
    return SafetensorsHeader(8 + length, tensors)


def check_shards(folder: Path) -> None:
    """Reject a folder whose index names missing weight files.

    Raises:
        DamagedWeightsError: naming them.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / "model.safetensors").exists():  # transformers reads it instead of any index
            return
        if index.exists():
            absent = [shard for shard in shard_names(index) if not (folder / shard).exists()]
            if absent:
                raise DamagedWeightsError(
                    f"{index} names {len(absent)} missing files: {', '.join(absent[:5])}"
                    f"{', …' if len(absent) > 5 else ''}; download them, or the whole model"
                )
            return
        if (folder / name).exists():
            return


def shard_names(index: Path) -> list[str]:
    """Return the files that a sharded model's index names.

    Raises:
        DamagedWeightsError: if it cannot be read.
    """
    try:
        return sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedWeightsError(f"{index} is not an index of weight files") from error
