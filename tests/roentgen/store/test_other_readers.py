"""docs/store.md suffices to write a reader: this one uses parquet, JSON, XXH3 and the standard library, and none of our
code.

It represents a reader in another language, written from the document alone; if it and the store differ, one of the two is
wrong.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import xxhash

from roentgen.store import CapturedRollout, Session, StoreWriter
from roentgen.store.merging import compact, remove_unused
from tests.roentgen.store.conftest import KEYS, RolloutFactory

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


class ShardReader:
    """A safetensors file: eight bytes of length, a JSON header, then the tensors' bytes."""

    def __init__(self, path: Path) -> None:
        self.bytes = path.read_bytes()
        (length,) = struct.unpack("<Q", self.bytes[:8])
        header = json.loads(self.bytes[8 : 8 + length])
        self.metadata = header.pop("__metadata__")
        if int(self.metadata["roentgen_schema"]) > 2:
            raise ValueError("a newer schema")
        self.tensors, self.begin = header, 8 + length

    def rows(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes of some rows."""
        tensor = self.tensors[name]
        size = SIZES[tensor["dtype"]] * math.prod(tensor["shape"][1:])
        first = self.begin + tensor["data_offsets"][0]
        return self.bytes[first + start * size : first + stop * size]

    def checksum(self, start: int, stop: int) -> str:
        """Return the checksum of a rollout."""
        digest = xxhash.xxh3_128()
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.rows(name, start, stop))
        return digest.hexdigest()


def read(session: Path) -> Iterator[tuple[dict[str, Any], ShardReader]]:
    """Yield the rollouts that count, each with its shard."""
    if json.loads((session / "session.json").read_text())["schema_version"] > 1:
        raise ValueError("a newer schema")
    files, replaced = {}, set()
    for path in sorted((session / "index").iterdir()):
        if path.name.startswith("."):
            continue
        metadata = pq.read_metadata(path).metadata
        if int(metadata[b"roentgen_schema"]) > 1:
            raise ValueError("a newer schema")
        replaced.update(json.loads(metadata[b"replaces"]))
        files[path.name] = path, json.loads(metadata[b"shards"])
    rollouts, counted, shards = {}, {}, {}
    for name in files.keys() - replaced:
        path, named = files[name]
        for row in pq.read_table(path).to_pylist():
            rollouts[row["rollout_id"]] = row
        for shard, said in named.items():
            shards[shard] = ShardReader(session / shard)
            assert len(shards[shard].bytes) == said["bytes"]
            assert xxhash.xxh3_128_hexdigest(shards[shard].bytes) == said["xxh3_128"]
    added = sorted(p for p in (session / "labels").iterdir()) if (session / "labels").exists() else []
    for path in added:
        for row in pq.read_table(path).to_pylist():
            if path.name[0] != "." and (labeled := rollouts.get(row["rollout_id"])):
                labeled["labels"] = json.dumps({**json.loads(labeled["labels"]), **json.loads(row["labels"])})
    for rollout_id in sorted(rollouts):
        row = rollouts[rollout_id]
        keyed = row["config_hash"] is not None
        identity = (row["config_hash"], row["problem_id"], row["epoch"], row["turn"]) if keyed else rollout_id
        counted[identity] = row
    for row in counted.values():
        yield row, shards[row["shard"]]


def same(found: list[tuple[dict[str, Any], ShardReader]], written: list[CapturedRollout]) -> None:
    """Compare what was read with what was written."""
    by_id = {rollout.rollout_id: rollout for rollout in written}
    assert sorted(row["rollout_id"] for row, _ in found) == sorted(by_id)
    for row, shard in found:
        rollout = by_id[row["rollout_id"]]
        rows = row["row_start"], row["row_stop"]
        assert shard.checksum(*rows) == row["checksum"]
        spec = json.loads(shard.metadata["spec"])
        assert (spec["model"], spec["revision"], spec["positions"]) == ("m", "r", rollout.spec.positions)
        assert tuple(spec["keys"]) == KEYS
        for key in KEYS:
            # bfloat16 is the upper half of float32.
            halves = struct.unpack(f"<{rollout.n_rows * 8}H", shard.rows(key, *rows))
            values = [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
            assert torch.equal(torch.tensor(values).view(-1, 8), rollout.tensors[key].float())
        position = struct.unpack(f"<{rollout.n_rows}i", shard.rows("position", *rows))
        assert list(position) == rollout.position.tolist()
        fed = struct.unpack(f"<{rollout.n_rows}i", shard.rows("token_id", *rows))
        assert list(fed) == [row["token_ids"][at] for at in position]
        assert list(shard.rows("generated", *rows)) == [int(at >= row["n_prompt"]) for at in position]
        logprob = struct.unpack(f"<{rollout.n_rows}f", shard.rows("logprob", *rows))
        assert [math.isnan(value) for value in logprob] == [at < row["n_prompt"] for at in position]
        assert row["token_ids"] == rollout.sequence.token_ids
        assert row["final_token"] == rollout.sequence.token_ids[-1]
        assert json.loads(row["labels"]) == rollout.labels
        assert "".join(row["text"][s["start"] : s["stop"]] for s in row["segments"]) == rollout.sequence.text


def test_a_reader_made_from_the_document_reads_everything(tmp_path: Path, rollout: RolloutFactory) -> None:
    written = [rollout(n, 3, problem=f"p{n}", positions="stride:2" if n % 3 else "all") for n in range(1, 8)]
    written += [rollout(2, 2), rollout(3, 1)]
    retried = rollout(problem="p2")
    with StoreWriter(tmp_path, max_wait_s=0, merge_shards=0) as writer:
        for one in [*written, retried]:
            writer.submit(one).result()
    counts = [one for one in written if one.labels["problem"] != "p2"] + [retried]
    same(list(read(tmp_path / "s")), counts)
    (tmp_path / "s/shards/01AAAAAAAAAAAAAAAAAAAAAAAA.safetensors").write_bytes(b"an orphan")
    (tmp_path / "s/index/.01A.parquet.1.tmp").write_bytes(b"half an index")
    # Merged, and merged again with more: what is replaced still lies there.
    assert compact(Session.open(tmp_path / "s")).replaced == 10
    same(list(read(tmp_path / "s")), counts)
    more = rollout(5, 2)
    with StoreWriter(tmp_path, max_wait_s=0) as writer:
        writer.submit(more).result()
    compact(Session.open(tmp_path / "s"))
    assert len(list((tmp_path / "s/index").glob("*.parquet"))) == 13
    same(list(read(tmp_path / "s")), [*counts, more])
    remove_unused(Session.open(tmp_path / "s"), grace_s=0)
    same(list(read(tmp_path / "s")), [*counts, more])
    Session.open(tmp_path / "s").add_labels({more.rollout_id: {"match": 0.5, "problem": "x"}})
    labeled = replace(more, labels={"problem": "x", "match": 0.5})
    same(list(read(tmp_path / "s")), [*counts, labeled])


def test_int8_rows_are_codes_times_scales(tmp_path: Path, rollout: RolloutFactory) -> None:
    written = rollout(4, 3)
    spec = written.spec.model_copy(update={"dtype": "torch.int8"})
    with StoreWriter(tmp_path) as writer:
        writer.submit(dataclasses.replace(written, spec=spec)).result()
    ((row, shard),) = read(tmp_path / "s")
    rows = row["row_start"], row["row_stop"]
    assert (shard.metadata["roentgen_schema"], shard.checksum(*rows)) == ("2", row["checksum"])
    for key in KEYS:
        codes = struct.unpack(f"<{6 * 8}b", shard.rows(key, *rows))
        scales = struct.unpack("<6f", shard.rows(f"{key}.scale", *rows))
        for number, values in enumerate(written.tensors[key].float().tolist()):
            assert scales[number] == pytest.approx(max(map(abs, values)) / 127)
            for code, value in zip(codes[8 * number :], values, strict=False):
                assert abs(code * scales[number] - value) <= scales[number] * 0.5001


def test_a_newer_schema_is_there_to_be_seen(tmp_path: Path, rollout: RolloutFactory) -> None:
    with StoreWriter(tmp_path) as writer:
        writer.submit(rollout()).result()
    identity = tmp_path / "s/session.json"
    identity.write_text(identity.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ValueError, match="newer"):
        list(read(tmp_path / "s"))
