"""The samples of a run as a table: what samples.jsonl has, taken in as it grows.

The file is read on from where the last look ended, some megabytes at a time; DuckDB takes the light columns out of the lines,
and the whole line is found again by its offset. A sample that was tried several times counts as everywhere (`runs.record`): its
first answer or, if it has none, its last error.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Int

from roentgen.runs import Run, RunError, Sample
from roentgen.view.table import Field, Table

_CHUNK = 32 << 20
_HEAD = 4096
"""Bytes at the beginning by which a record that was written anew is told from one that has grown."""

_SHAPE = {
    "sample_id": "VARCHAR", "problem_id": "VARCHAR", "epoch": "INTEGER", "variant": "VARCHAR", "config_hash": "VARCHAR",
    "question": "VARCHAR", "template": "VARCHAR", "gold": "VARCHAR", "response": "VARCHAR", "answers": "MAP(VARCHAR, VARCHAR)",
    "correct_by": "MAP(VARCHAR, BOOLEAN)", "fields": "JSON", "values": "JSON", "finish_reason": "VARCHAR",
    "prompt_tokens": "INTEGER", "cached_tokens": "INTEGER", "completion_tokens": "INTEGER", "turns": "JSON",
    "seconds": "DOUBLE", "finished": "DOUBLE", "error": "VARCHAR",
}  # fmt: skip
_TAKEN = """
SELECT line_start, line_size, s.sample_id, s.problem_id AS problem, coalesce(s.epoch, 1) AS epoch, s.variant, s.config_hash,
    s.question, s.template, s.gold, s.response, s.answers, s.correct_by,
    json_merge_patch(coalesce(s.fields, '{}'), coalesce(s.values, '{}')) AS labels, s.finish_reason, s.prompt_tokens,
    s.cached_tokens, s.completion_tokens, json_array_length(s.turns) AS turns, s.seconds, s.finished, s.error
FROM (SELECT line_start, line_size, json_transform(line, $shape) AS s FROM batch)
"""
_RANKED = """
CREATE OR REPLACE TABLE samples AS
SELECT CAST(row_number() OVER (ORDER BY regexp_replace(stem, '[0-9]+$', ''),
        TRY_CAST(regexp_extract(stem, '[0-9]+$') AS BIGINT), epoch, list_position($variants, config_hash), line_start) - 1
    AS INTEGER) AS place, line_start, line_size, sample_id, problem, epoch, variant, left(question, 200) AS question,
    gold, labels, finish_reason, prompt_tokens,
    cached_tokens, completion_tokens, turns, seconds, finished, error, config_hash,
    CASE WHEN error IS NOT NULL THEN 'failed' WHEN correct_by[$extractor] IS NULL THEN NULL
        WHEN answers[$extractor] IS NULL THEN 'no_answer' WHEN correct_by[$extractor] THEN 'correct' ELSE 'wrong' END
    AS verdict,
    answers[$extractor] AS answer, len(list_distinct(map_values(correct_by))) > 1 AS disagree
FROM (SELECT *, regexp_replace(sample_id, '(_e[0-9]+)?(_v-.*)?$', '') AS stem FROM lines)
QUALIFY row_number() OVER (PARTITION BY config_hash, problem, epoch
    ORDER BY error IS NOT NULL, CASE WHEN error IS NULL THEN line_start ELSE -line_start END) = 1
"""


_SCORE = "(SELECT any_value(score) FROM scores WHERE label = '{}' AND scores.sample_id = samples.sample_id)"


class RunTable(Table):
    """The samples of a run."""

    fields: ClassVar[dict[str, Field]] = {
        "sample_id": Field("sample_id", "text"),
        "problem": Field("problem", "category"),
        "epoch": Field("epoch", "number"),
        "variant": Field("variant", "category"),
        "verdict": Field("verdict", "category"),
        "question": Field("question", "text"),
        "gold": Field("gold", "text"),
        "answer": Field("answer", "text"),
        "disagree": Field("disagree", "bool"),
        "finish_reason": Field("finish_reason", "category"),
        "prompt_tokens": Field("prompt_tokens", "number"),
        "cached_tokens": Field("cached_tokens", "number"),
        "completion_tokens": Field("completion_tokens", "number"),
        "turns": Field("turns", "number"),
        "seconds": Field("seconds", "number"),
        "error": Field("error", "text"),
    }

    def __init__(self, file: Path, run: Run) -> None:
        """Open the table of a run.

        Args:
            file: in the cache folder.
            run: whose samples it has.
        """
        self.run = run
        super().__init__(file)

    def sample(self, sample_id: str) -> tuple[int, Sample] | None:
        """Return a sample and its place, read from the record; None if there is none of that name."""
        found = self.query(
            "SELECT place, line_start, line_size FROM samples WHERE sample_id = ?", [sample_id]
        ).fetchone()
        if found is None:
            return None
        with open(self.run.record_path, "rb") as file:
            file.seek(found[1])
            return int(found[0]), Sample.model_validate_json(_readable(file.read(found[2])))

    def _create(self) -> None:
        self.query(
            "CREATE TABLE IF NOT EXISTS state (key VARCHAR PRIMARY KEY, value VARCHAR);"
            "CREATE TABLE IF NOT EXISTS scores (label VARCHAR, sample_id VARCHAR, score DOUBLE)"
        )
        cursor = self._database.cursor()
        cursor.register("batch", _batch([], np.array([], np.int64), np.array([], np.int64)))
        cursor.execute(f"CREATE TABLE IF NOT EXISTS lines AS {_TAKEN}", {"shape": json.dumps(_SHAPE)})

    def _more_fields(self) -> dict[str, Field]:
        labels = [label for (label,) in self.query("SELECT DISTINCT label FROM scores ORDER BY label").fetchall()]
        return {f"score.{label}": Field(_SCORE.format(label.replace("'", "''")), "number") for label in labels}

    def _update(self) -> bool:
        return self._update_samples() | self._update_scores()

    def _update_scores(self) -> bool:
        """Take in the scores, out of fold, that trainings of probes have left."""
        known = dict(self.query("SELECT key, value FROM state WHERE key = 'scores'").fetchall()).get("scores", "[]")
        there = {file: file.stat().st_mtime_ns for file in sorted((self.run.path / "probes").glob("*/curves.json"))}
        stamp = json.dumps([[file.parent.name, at] for file, at in there.items()])
        if stamp == known:
            return False
        cursor = self._database.cursor()
        cursor.begin()
        cursor.execute("DELETE FROM scores")
        for file in there:
            scores = json.loads(file.read_text()).get("samples", {})
            cursor.register("batch", pa.table({"i": list(scores), "s": pa.array(list(scores.values()), pa.float64())}))
            cursor.execute("INSERT INTO scores SELECT ?, i, s FROM batch", [file.parent.name])
            cursor.unregister("batch")
        cursor.execute("INSERT OR REPLACE INTO state VALUES ('scores', ?)", [stamp])
        cursor.commit()
        return True

    def _update_samples(self) -> bool:
        known = dict(self.query("SELECT key, value FROM state").fetchall())
        record = self.run.record_path
        try:
            with open(record, "rb") as file:
                head, size = file.read(_HEAD), record.stat().st_size
        except FileNotFoundError:
            head, size = b"", 0
        begin = int(known.get("read", 0))
        before = bytes.fromhex(known.get("head", ""))
        same = "read" in known and head.startswith(before) and size >= begin
        judged = json.dumps([self.run.config.extractor, self.run.config.config_hashes])
        if same and begin == size and known.get("judged") == judged:
            return False
        cursor = self._database.cursor()
        cursor.begin()
        if not same:
            cursor.execute("DELETE FROM lines")
            begin = 0
        end = begin
        for batch, read in _batches(record, begin):
            self._take(cursor, batch)
            end = read
        if same and end == begin and known.get("judged") == judged:  # half a line more
            cursor.rollback()
            return False
        parameters = {"extractor": self.run.config.extractor, "variants": self.run.config.config_hashes}
        cursor.execute(_RANKED, parameters)
        state = {"read": str(end), "head": head[: min(len(head), end)].hex(), "judged": judged}
        cursor.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", list(state.items()))
        cursor.commit()
        return True

    def _take(self, cursor: duckdb.DuckDBPyConnection, batch: pa.Table) -> None:
        cursor.register("batch", batch)
        try:
            cursor.execute(f"INSERT INTO lines {_TAKEN}", {"shape": json.dumps(_SHAPE)})
        except duckdb.Error as error:
            raise RunError(f"{self.run.record_path} has a line that is not a sample: {error}") from error
        finally:
            cursor.unregister("batch")

    def _containing(self, text: str) -> tuple[str, list[Any]]:
        there = "regexp_matches(question, regexp_escape(?), 'i') OR regexp_matches(response, regexp_escape(?), 'i')"
        return f"line_start IN (SELECT line_start FROM lines WHERE {there})", [text, text]


_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half of a surrogate pair, or a whole pair; DuckDB refuses halves."""


def _batches(record: Path, begin: int) -> Iterator[tuple[pa.Table, int]]:
    """Yield the whole lines of a record from an offset on, some megabytes at a time, and where each part ends."""
    if not record.exists():
        return
    with open(record, "rb") as file:
        file.seek(begin)
        rest = b""
        while block := file.read(_CHUNK):
            text, newline, more = (rest + block).rpartition(b"\n")
            if not newline:
                rest = more
                continue
            rest = more
            lines = text.split(b"\n")
            ends = begin + np.cumsum([len(line) + 1 for line in lines])
            sizes = np.diff(ends, prepend=begin)
            begin = int(ends[-1])
            yield _batch([_readable(line) for line in lines], ends - sizes, sizes), begin


def _batch(lines: list[str], starts: Int[np.ndarray, "lines"], sizes: Int[np.ndarray, "lines"]) -> pa.Table:
    return pa.table({"line": pa.array(lines, pa.string()), "line_start": starts, "line_size": sizes})


def _readable(line: bytes) -> str:
    """Return a line as JSON that every parser takes."""
    if not _HALF.search(line):
        return line.decode(errors="replace")
    try:
        whole = json.dumps(json.loads(line), ensure_ascii=False)
    except ValueError:  # for DuckDB to refuse, with its reason
        return line.decode(errors="replace")
    return whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
