"""The rollouts of a session as a table, taken from its index files, each once: they never change.

Of an index file the light columns come along, and where in the file each row is, so that one rollout's tokens and text are read
by themselves. Texts are copied when they are searched for the first time.
"""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roentgen.contract import labels_to_json
from roentgen.store import Session, StoreError
from roentgen.store.index import ROW_GROUP, IndexFile, read_index
from roentgen.store.labels import label_files, read_label_file
from roentgen.store.reader import LOCATION
from roentgen.store.shards import READS_AT_ONCE
from roentgen.view.table import Field, Table

_TAKEN = (*LOCATION, "created", "labels", "finish_reason")
_TABLES = """
CREATE TABLE IF NOT EXISTS files (id INTEGER PRIMARY KEY, name VARCHAR, replaces VARCHAR[]);
CREATE TABLE IF NOT EXISTS added (name VARCHAR, rollout_id VARCHAR, labels VARCHAR);
CREATE TABLE IF NOT EXISTS texts (file INTEGER, row INTEGER, text VARCHAR);
CREATE TABLE IF NOT EXISTS samples (place INTEGER, file INTEGER, row INTEGER, sample_id VARCHAR, config_hash VARCHAR,
    problem VARCHAR, epoch INTEGER, turn INTEGER, shard VARCHAR, row_start BIGINT, row_stop BIGINT, prompt_tokens INTEGER,
    completion_tokens INTEGER, created TIMESTAMPTZ, finish_reason VARCHAR, labels JSON);
"""
_COPIED = """
SELECT file, row, rollout_id AS sample_id, config_hash, problem_id AS problem, epoch, turn, shard, row_start, row_stop,
    n_prompt AS prompt_tokens, n_completion AS completion_tokens, created, finish_reason,
    CAST(labels AS JSON) AS labels FROM batch
"""
_RETRIED = """
DELETE FROM samples WHERE (file, row) IN (SELECT (file, row) FROM samples QUALIFY
    row_number() OVER (PARTITION BY sample_id ORDER BY file DESC) > 1 OR (config_hash IS NOT NULL AND
    row_number() OVER (PARTITION BY config_hash, problem, epoch, turn ORDER BY sample_id DESC, file DESC) > 1))
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
        place = self.session.folder
        there = [entry.name for entry in place.child("index").entries()]
        there = [name for name in there if name.endswith(".parquet") and not name.startswith(".")]
        known = {name: number for number, name in self.query("SELECT id, name FROM files").fetchall()}
        labels = set(label_files(place)) - {
            name for (name,) in self.query("SELECT DISTINCT name FROM added").fetchall()
        }
        new = [name for name in there if name not in known]
        gone = set(known) - set(there)
        if not (new or gone or labels):
            return False
        cursor = self._database.cursor()
        cursor.begin()
        first = max(known.values(), default=-1) + 1
        numbers = {name: first + number for number, name in enumerate(new)}
        files = list(self._read(new))
        for file in files:
            cursor.execute("INSERT INTO files VALUES (?, ?, ?)", [numbers[file.name], file.name, sorted(file.replaces)])
        cursor.execute("DELETE FROM files WHERE list_contains(?, name)", [sorted(gone)])
        cursor.execute("DELETE FROM samples WHERE file NOT IN (SELECT id FROM files)")
        cursor.execute("DELETE FROM texts WHERE file NOT IN (SELECT id FROM files)")
        replaced = {name for (name,) in cursor.execute("SELECT unnest(replaces) FROM files").fetchall()}
        cursor.execute(
            "DELETE FROM samples WHERE file IN (SELECT id FROM files WHERE list_contains(?, name))", [sorted(replaced)]
        )
        tables = [_numbered(file, numbers[file.name]) for file in files if file.name not in replaced]
        if tables:
            cursor.register("batch", pa.concat_tables(tables).unify_dictionaries())
            cursor.execute(f"INSERT INTO samples BY NAME {_COPIED}")
            cursor.unregister("batch")
        for name in sorted(labels):
            found = read_label_file(place, name)
            rows = pa.table({"i": list(found), "l": [labels_to_json(dict(one)) for one in found.values()]})
            cursor.register("batch", rows)
            cursor.execute("INSERT INTO added SELECT ?, i, l FROM batch", [name])
            cursor.unregister("batch")
        if cursor.execute(
            "SELECT count(*) > count(DISTINCT sample_id) OR count(config_hash) > "
            "count(DISTINCT (config_hash, problem, epoch, turn)) FILTER (config_hash IS NOT NULL) FROM samples"
        ).fetchone() == (True,):
            cursor.execute(_RETRIED)
        if cursor.execute("SELECT count(*) FROM added").fetchone() != (0,):
            cursor.execute(_LABELED)
        cursor.execute(
            "CREATE OR REPLACE TABLE samples AS SELECT * REPLACE "
            "(CAST(row_number() OVER (ORDER BY sample_id) - 1 AS INTEGER) AS place) FROM samples"
        )
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
        self._copy_texts()
        return "(file, row) IN (SELECT (file, row) FROM texts WHERE contains(lower(text), lower(?)))", [text]

    def _copy_texts(self) -> None:
        lacking = self.query(
            "SELECT id, name FROM files WHERE id IN (SELECT file FROM samples) AND id NOT IN (SELECT file FROM texts)"
        ).fetchall()
        folder = self.session.folder.child("index")
        for number, name in lacking:
            cursor = self._database.cursor()
            with folder.open_arrow(name) as opened:
                row = 0
                for batch in pq.ParquetFile(opened).iter_batches(ROW_GROUP, columns=["text"]):
                    rows = np.arange(row, row + len(batch), dtype=np.int32)
                    cursor.register("batch", pa.table({"row": rows, "text": batch.column(0)}))
                    cursor.execute("INSERT INTO texts SELECT ?, row, text FROM batch", [number])
                    cursor.unregister("batch")
                    row += len(batch)


def _numbered(file: IndexFile, number: int) -> pa.Table:
    table = file.table
    rows = np.arange(len(table), dtype=np.int32)
    return table.append_column("row", pa.array(rows)).append_column("file", pa.array(np.full_like(rows, number)))
