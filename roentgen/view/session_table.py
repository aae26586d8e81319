"""The rollouts of a session as a table, taken from its index files, each once: they never change.

Of an index file the light columns come along, and where in the file each row is, so that one rollout's tokens and text are read
by itself. Texts stay in the files and are searched there.
"""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from roentgen.atomic_files import atomic_write, make_folder
from roentgen.contract import labels_to_json
from roentgen.store import Session, StoreError
from roentgen.store.index import ROW_GROUP, IndexFile, read_index
from roentgen.store.labels import label_files, read_label_file
from roentgen.store.reader import LOCATION
from roentgen.store.shards import READS_AT_ONCE
from roentgen.store.storage_backends import LocalFolder
from roentgen.view.table import Field, Table

_TAKEN = (*LOCATION, "created", "labels", "finish_reason")
_TABLES = """
CREATE TABLE IF NOT EXISTS files (id INTEGER PRIMARY KEY, name VARCHAR, replaces VARCHAR[]);
CREATE TABLE IF NOT EXISTS added (name VARCHAR, rollout_id VARCHAR, labels VARCHAR);
CREATE TABLE IF NOT EXISTS samples (place INTEGER, file INTEGER, row INTEGER, sample_id VARCHAR, config_hash VARCHAR,
    problem VARCHAR, epoch INTEGER, turn INTEGER, shard VARCHAR, row_start BIGINT, row_stop BIGINT, prompt_tokens INTEGER,
    completion_tokens INTEGER, created TIMESTAMPTZ, finish_reason VARCHAR, labels JSON);
"""
_RETRIED = """
SELECT file, row FROM {table} SEMI JOIN (
    SELECT hash({key}) AS several FROM {table} GROUP BY several HAVING count(*) > 1) ON hash({key}) = several
QUALIFY row_number() OVER (PARTITION BY {key} ORDER BY {name} DESC, file DESC) > 1
"""
_NEW_RETRIED = _RETRIED.format(
    table="batch", name="rollout_id", key="coalesce(config_hash, rollout_id), problem_id, epoch, turn"
)
_OLD_RETRIED = _RETRIED.format(
    table="samples", name="sample_id", key="coalesce(config_hash, sample_id), problem, epoch, turn"
)
# What is retried is left out at once: to delete it after costs as much again as to insert all the others.
_COPIED = f"""
SELECT place, file, row, rollout_id AS sample_id, config_hash, problem_id AS problem, epoch, turn, shard, row_start, row_stop,
    n_prompt AS prompt_tokens, n_completion AS completion_tokens, created, finish_reason, CAST(labels AS JSON) AS labels
FROM batch ANTI JOIN ({_NEW_RETRIED}) USING (file, row)
"""
_CONTAINING = """
(file, row) IN (SELECT (id, file_row_number) FROM read_parquet(?, filename = true, file_row_number = true) AS texts
    JOIN files ON parse_filename(texts.filename) = files.name WHERE regexp_matches(text, regexp_escape(?), 'i'))
"""
_RENUMBERED = """
CREATE OR REPLACE TABLE samples AS
SELECT * REPLACE (CAST(row_number() OVER (ORDER BY sample_id) - 1 AS INTEGER) AS place) FROM samples
"""
_LABELED = """
UPDATE samples SET labels = json_merge_patch(samples.labels, patch) FROM (
    SELECT rollout_id, json_group_object(key, value) AS patch FROM (
        SELECT rollout_id, key, arg_max(value, name) AS value FROM (
            SELECT name, rollout_id, unnest(json_keys(labels)) AS key, unnest(json_extract(labels, '$.*')) AS value FROM added)
        GROUP BY rollout_id, key) GROUP BY rollout_id)
WHERE sample_id = rollout_id
"""


class SessionTable(Table):
    """The rollouts of a session."""

    fields: ClassVar[dict[str, Field]] = {
        "sample_id": Field("sample_id", "text"),
        "problem": Field("problem", "category"),
        "epoch": Field("epoch", "number"),
        "turn": Field("turn", "number"),
        "finish_reason": Field("finish_reason", "category"),
        "prompt_tokens": Field("prompt_tokens", "number"),
        "completion_tokens": Field("completion_tokens", "number"),
        "rows": Field("(row_stop - row_start)", "number"),
        "created": Field("strftime(created, '%Y-%m-%dT%H:%M:%SZ')", "text"),
    }

    def __init__(self, file: Path, session: Session) -> None:
        """Open the table of a session.

        Args:
            file: in the cache folder.
            session: whose rollouts it has.
        """
        self.session = session
        super().__init__(file)

    def locate(self, rollout_id: str) -> dict[str, Any] | None:
        """Return where a rollout's rows are, the columns `LOCATION` of the index; None if there is none."""
        found = self.rows(
            "SELECT sample_id AS rollout_id, config_hash, problem AS problem_id, epoch, turn, shard, row_start, row_stop, "
            "prompt_tokens AS n_prompt, completion_tokens AS n_completion FROM samples WHERE sample_id = ?",
            [rollout_id],
        )
        return found[0] if found else None

    def index_row(self, rollout_id: str) -> dict[str, Any]:
        """Return a rollout's row of the index, text and tokens included.

        Raises:
            StoreError: if it cannot be read.
        """
        found = self.query(
            "SELECT name, row FROM samples JOIN files ON samples.file = files.id WHERE sample_id = ?", [rollout_id]
        ).fetchone()
        if found is None:
            raise StoreError(f"{self.session.uri} has no rollout {rollout_id!r} (any more)")
        name, row = found
        try:
            with self.session.folder.child("index").open_arrow(name) as opened:
                file = pq.ParquetFile(opened, page_checksum_verification=True)
                group = 0
                while row >= file.metadata.row_group(group).num_rows:
                    row -= file.metadata.row_group(group).num_rows
                    group += 1
                return dict(file.read_row_group(group).slice(row, 1).to_pylist()[0])
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"index file {name} of {self.session.uri} cannot be read: {error}") from error

    def place(self, rollout_id: str) -> int:
        """Return a rollout's place in the table, -1 if it is not there."""
        found = self.query("SELECT place FROM samples WHERE sample_id = ?", [rollout_id]).fetchone()
        return -1 if found is None else int(found[0])

    def _create(self) -> None:
        self.query(_TABLES)

    def _update(self) -> bool:
        folder = self.session.folder
        there = [entry.name for entry in folder.child("index").entries()]
        there = [name for name in there if name.endswith(".parquet") and not name.startswith(".")]
        known = {name: number for number, name in self.query("SELECT id, name FROM files").fetchall()}
        labels = set(label_files(folder)) - {
            name for (name,) in self.query("SELECT DISTINCT name FROM added").fetchall()
        }
        new, gone = [name for name in there if name not in known], sorted(set(known) - set(there))
        if not (new or gone or labels):
            return False
        cursor = self._database.cursor()
        cursor.begin()
        first = max(known.values(), default=-1) + 1
        files = sorted(self._read(new), key=lambda file: _first(file.table))
        for number, file in enumerate(files, first):
            cursor.execute("INSERT INTO files VALUES (?, ?, ?)", [number, file.name, sorted(file.replaces)])
        cursor.execute("DELETE FROM files WHERE list_contains(?, name)", [gone])
        replaced = {name for (name,) in cursor.execute("SELECT unnest(replaces) FROM files").fetchall()}
        if gone or replaced:
            cursor.execute(
                "DELETE FROM samples WHERE file NOT IN (SELECT id FROM files WHERE NOT list_contains(?, name))",
                [sorted(replaced)],
            )
        ((latest, place),) = cursor.execute("SELECT max(sample_id), max(place) FROM samples").fetchall()
        tables = [
            _numbered(file, number)
            for number, file in enumerate(files, first)
            if file.name not in replaced and len(file.table)
        ]
        in_order = latest is None or not tables or _first(tables[0]) >= latest
        if tables:
            batch = pa.concat_tables(tables).unify_dictionaries()
            places = np.arange(len(batch), dtype=np.int32) + np.int32(-1 if place is None else place) + np.int32(1)
            cursor.register("batch", batch.append_column("place", pa.array(places)))
            del files, tables, batch
            cursor.execute(f"INSERT INTO samples BY NAME {_COPIED}")
            cursor.unregister("batch")
        for name in sorted(labels):
            found = read_label_file(folder, name)
            rows = pa.table({"i": list(found), "l": [labels_to_json(dict(one)) for one in found.values()]})
            cursor.register("batch", rows)
            cursor.execute("INSERT INTO added SELECT ?, i, l FROM batch", [name])
            cursor.unregister("batch")
        if latest is not None:
            cursor.execute(f"DELETE FROM samples WHERE (file, row) IN (SELECT (file, row) FROM ({_OLD_RETRIED}))")
        if labels or (new and cursor.execute("SELECT count(*) FROM added").fetchall() != [(0,)]):
            cursor.execute(_LABELED)
        if not in_order:  # a merge has put old rollouts into a new file
            cursor.execute(_RENUMBERED)
        cursor.commit()
        return True

    def _read(self, names: Collection[str]) -> list[IndexFile]:
        folder = self.session.folder.child("index")

        def read(name: str) -> IndexFile | None:
            try:
                return read_index(folder, name, _TAKEN)
            except (
                FileNotFoundError
            ):  # merged and collected since it was listed; what replaces it is found the next time
                return None

        with ThreadPoolExecutor(READS_AT_ONCE if folder.remote else 2) as pool:
            return [file for file in pool.map(read, names) if file is not None]

    def _containing(self, text: str) -> tuple[str, list[Any]]:
        named = self.query("SELECT name FROM files WHERE id IN (SELECT file FROM samples)").fetchall()
        return _CONTAINING, [[str(self._texts(name)) for (name,) in named], text]

    def _texts(self, name: str) -> Path:
        """Return a parquet file on this machine that has an index file's texts: itself, or a copy of one in a bucket."""
        folder = self.session.folder.child("index")
        if isinstance(folder, LocalFolder):
            return folder.path / name
        copy = self._file.with_suffix("") / name
        if not copy.exists():
            make_folder(copy.parent)
            with folder.open_arrow(name) as opened, atomic_write(copy) as temporary:
                pq.write_table(pq.read_table(opened, columns=["text"]), temporary, row_group_size=ROW_GROUP)
        return copy


def _first(table: pa.Table) -> str:
    """Return the id of the first rollout of an index file, by which files are put in order of time."""
    return str(pc.min(table.column("rollout_id")).as_py() or "")


def _numbered(file: IndexFile, number: int) -> pa.Table:
    """Return the rows of a file, with its number and theirs in it."""
    rows = np.arange(len(file.table), dtype=np.int32)
    return file.table.append_column("row", pa.array(rows)).append_column("file", pa.array(np.full_like(rows, number)))
