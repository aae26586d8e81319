"""The samples of a source as a table in DuckDB: what lists, filters, sorts and histograms are answered from.

A table has a row per sample, with a number (`place`) by the order in which the source has them, and only light columns;
subclasses fill it from what is new in the files (`refresh`). It is a file in the cache folder, so that the next start finds it
filled; where another process holds that file, this one fills a table of its own in memory.

A list that was filtered or sorted is kept as the places that it has, four bytes a sample, so that scrolling through it is
looking up some rows.
"""

import json
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import duckdb
import numpy as np
from jaxtyping import Int

from roentgen.view.errors import ViewError
from roentgen.view.schemas import Column, ColumnType, Histogram, Page, Series

VERSION = 2
"""Of the tables, and in the names of their files; those of another version are made anew."""
MEMORY = "192MB"
"""What DuckDB may hold at once; beyond, it uses the disk."""
MOST_VALUES = 50
"""A column of texts with at most so many is one of categories."""
LOOKED_AT = 20_000
"""Samples from which names and kinds of labels are learned."""
MOST_ROWS = 1_000
"""Samples in a window."""
BINS = 40
"""Of a histogram, at most."""
_KEPT_LISTS = 16
_OPERATORS = {"=": "IS NOT DISTINCT FROM", "!=": "IS DISTINCT FROM", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",  # no request leaves the machine
    "autoload_known_extensions": "false",
    "memory_limit": MEMORY,
}


@dataclass(frozen=True)
class Field:
    """A column as queries have it."""

    sql: str
    """An expression over the table `samples`."""
    type: ColumnType
    """What it holds; one of categories that has too many is of texts."""


class Table(ABC):
    """The samples of one source."""

    fields: ClassVar[dict[str, Field]]
    """The columns that every source of the kind has."""

    def __init__(self, file: Path) -> None:
        """Open a table, filled as it was left.

        Args:
            file: in the cache folder.
        """
        self._file = file
        self._database = _open(file)
        self._lock = threading.RLock()
        self._lists: OrderedDict[tuple[str, str, str], Int[np.ndarray, "matches"]] = OrderedDict()
        self._labels: dict[str, Field] | None = None
        self._columns: list[Column] | None = None
        self._create()

    @abstractmethod
    def _create(self) -> None:
        """Create the tables, unless they are there."""

    @abstractmethod
    def _update(self) -> bool:
        """Take in what is new in the files; returns whether anything was."""

    @abstractmethod
    def _containing(self, text: str) -> tuple[str, list[Any]]:
        """Return a condition for samples whose texts contain a text, whatever its case, and its parameters."""

    def _more_fields(self) -> dict[str, Field]:
        """Return columns that this source has, and others of its kind may not."""
        return {}

    def refresh(self) -> None:
        """Bring the table up to date with the files."""
        with self._lock:
            if self._update():
                self._lists.clear()
                self._labels = self._columns = None

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> duckdb.DuckDBPyConnection:
        """Run a query; any thread may."""
        return self._database.cursor().execute(sql, parameters)

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Return the rows of a query, by the names of its columns."""
        found = self.query(sql, parameters)
        names = [about[0] for about in found.description or []]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

    def count(self) -> int:
        """Return how many samples there are."""
        (number,) = self.query("SELECT count(*) FROM samples").fetchone() or (0,)
        return int(number)

    def names(self) -> dict[str, Field]:
        """Return every column: those of the kind, and a column per label."""
        if self._labels is None:
            self._labels = {f"labels.{name}": field for name, field in self._find_labels().items()}
        return self.fields | self._more_fields() | self._labels

    def columns(self) -> list[Column]:
        """Describe the columns that samples can be filtered and sorted by."""
        if self._columns is None:
            self._columns = [self._described(name, field) for name, field in self.names().items()]
        return self._columns

    def matches(self, where: str = "", sort: str = "", q: str = "") -> Int[np.ndarray, "matches"]:
        """Return the places of the samples that match, in order.

        Args:
            where: JSON, `[[column, operator, value], …]`, all of which must hold.
            sort: a column, with `-` before it for the greatest first; the source's own order if empty.
            q: a text that the samples' texts contain.

        Raises:
            ViewError: naming what is not understood.
        """
        with self._lock:
            if (where, sort, q) not in self._lists:
                self._lists[where, sort, q] = self._find(where, sort, q)
                while len(self._lists) > _KEPT_LISTS:
                    self._lists.popitem(last=False)
            self._lists.move_to_end((where, sort, q))
            return self._lists[where, sort, q]

    def page(self, offset: int, limit: int, where: str = "", sort: str = "", q: str = "") -> Page:
        """Return a window of the samples that match.

        Raises:
            ViewError: naming what is not understood.
        """
        with self._lock:
            found = self.matches(where, sort, q)
            window = found[max(0, offset) :][: min(max(0, limit), MOST_ROWS)]
            rows = {row.pop("place"): row for row in self._look_up(window)}
            return {
                "total": self.count(),
                "matched": len(found),
                "offset": max(0, offset),
                "rows": [rows[place] for place in window.tolist()],
            }

    def neighbors(self, place: int, where: str = "", sort: str = "", q: str = "") -> tuple[str | None, str | None]:
        """Return the samples before and after one, among those that match."""
        with self._lock:
            found = self.matches(where, sort, q)
            (at,) = np.nonzero(found == place)
            around = [int(at[0]) - 1, int(at[0]) + 1] if len(at) else []
            near = [int(found[number]) if 0 <= number < len(found) else -1 for number in around] or [-1, -1]
            known = dict(self.query("SELECT place, sample_id FROM samples WHERE place IN (?, ?)", near).fetchall())
            return known.get(near[0]), known.get(near[1])

    def histogram(self, column: str, by: str = "", where: str = "", q: str = "") -> Histogram:
        """Count the samples that match, over a column's values.

        Args:
            column: a column of numbers, or one with few different values.
            by: a column whose values are counted apart; none if empty.
            where: as for `matches`.
            q: likewise.

        Raises:
            ViewError: naming what is not understood.
        """
        field = self._field(column)
        group = f"CAST({self._field(by).sql} AS VARCHAR)" if by else "NULL"
        condition, parameters = self._condition(where, q)
        with self._lock:
            if field.type != "number":
                return self._counted(f"CAST({field.sql} AS VARCHAR)", group, condition, parameters)
            value = f"CAST({field.sql} AS DOUBLE)"
            (low, high) = self.query(
                f"SELECT min(v), max(v) FROM (SELECT {value} AS v FROM samples WHERE {condition}) WHERE isfinite(v)",
                parameters,
            ).fetchone() or (None, None)
            if low is None:
                return {"edges": [], "series": []}
            edges = _edges(low, high)
            width = edges[1] - edges[0]
            counted = self.query(
                "SELECT g, CAST(least(floor((v - ?) / ?), ?) AS INTEGER) AS bin, count(*) FROM "
                f"(SELECT {group} AS g, {value} AS v FROM samples WHERE {condition}) WHERE isfinite(v) GROUP BY ALL",
                [edges[0], width, len(edges) - 2, *parameters],
            ).fetchall()
        return {"edges": edges, "series": _series(counted, len(edges) - 1)}

    def _counted(self, value: str, group: str, condition: str, parameters: list[Any]) -> Histogram:
        found = self.query(
            f"SELECT {group} AS g, {value} AS v, count(*) FROM samples WHERE {condition} GROUP BY ALL", parameters
        ).fetchall()
        totals: dict[str, int] = {}
        for _, name, number in found:
            totals["" if name is None else name] = totals.get("" if name is None else name, 0) + number
        values = sorted(totals, key=lambda name: (-totals[name], name))[:MOST_VALUES]
        numbered = [(g, values.index(name or ""), n) for g, name, n in found if (name or "") in values]
        return {"edges": [], "values": values, "series": _series(numbered, len(values))}

    def _look_up(self, window: Int[np.ndarray, "rows"]) -> list[dict[str, Any]]:
        if not len(window):
            return []
        wanted = ", ".join(f'{field.sql} AS "{_quoted(name)}"' for name, field in self.names().items())
        places = ",".join(map(str, window.tolist()))
        return self.rows(f"SELECT place, {wanted} FROM samples WHERE place IN ({places})")

    def _find(self, where: str, sort: str, q: str) -> Int[np.ndarray, "matches"]:
        condition, parameters = self._condition(where, q)
        order = "place"
        if sort:
            sql = self._field(sort.removeprefix("-")).sql
            order = f"{sql} {'DESC' if sort.startswith('-') else 'ASC'} NULLS LAST, place"
        found = self.query(f"SELECT place FROM samples WHERE {condition} ORDER BY {order}", parameters).fetchnumpy()
        return np.asarray(found["place"], dtype=np.int32)

    def _condition(self, where: str, q: str) -> tuple[str, list[Any]]:
        parts, parameters = ["true"], []
        for name, operator, value in _clauses(where):
            field = self._field(name)
            if operator in _OPERATORS:
                parts.append(f"{field.sql} {_OPERATORS[operator]} ?")
                parameters.append(value)
            elif operator == "in" and isinstance(value, list):
                parts.append(f"list_contains(?, {field.sql})")
                parameters.append(value)
            elif operator == "contains" and isinstance(value, str):
                parts.append(f"contains(lower(CAST({field.sql} AS VARCHAR)), lower(?))")
                parameters.append(value)
            else:
                raise ViewError(
                    f"where: {operator!r} with {value!r} is none of =, !=, <, <=, >, >=, in [list], contains text"
                )
        if q:
            condition, more = self._containing(q)
            parts.append(condition)
            parameters += more
        return " AND ".join(parts), parameters

    def _field(self, name: str) -> Field:
        names = self.names()
        if name not in names:
            raise ViewError(f"column {name!r} is not there; there are {', '.join(names)}")
        return names[name]

    def _find_labels(self) -> dict[str, Field]:
        found = self.query(
            "SELECT name, list(DISTINCT kind) FROM (SELECT unnest(json_keys(labels)) AS name, json_type(labels, "
            "'/' || replace(replace(name, '~', '~0'), '/', '~1')) AS kind "
            f"FROM (SELECT labels FROM samples WHERE labels IS NOT NULL LIMIT {LOOKED_AT})) GROUP BY name ORDER BY name"
        ).fetchall()
        return {name: _label(name, set(kinds) - {"NULL"}) for name, kinds in found}

    def _described(self, name: str, field: Field) -> Column:
        if field.type != "category":
            return {"name": name, "type": field.type}
        for some in (
            f"(SELECT {field.sql} AS v FROM samples LIMIT {LOOKED_AT})",
            f"(SELECT {field.sql} AS v FROM samples)",
        ):
            found = self.query(f"SELECT DISTINCT v FROM {some} WHERE v IS NOT NULL LIMIT {MOST_VALUES + 1}").fetchall()
            if len(found) > MOST_VALUES:
                return {"name": name, "type": "text"}
        return {"name": name, "type": "category", "values": sorted(str(value) for (value,) in found)}


def _open(file: Path) -> duckdb.DuckDBPyConnection:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return duckdb.connect(file, config=_SETTINGS)
    except duckdb.IOException:  # another process has it
        return duckdb.connect(":memory:", config=_SETTINGS)


def _clauses(where: str) -> list[tuple[str, str, Any]]:
    try:
        given = json.loads(where) if where else []
        return [(str(name), str(operator), value) for name, operator, value in given]
    except (ValueError, TypeError) as error:
        raise ViewError(f'where: {where!r} is not JSON like [["verdict", "=", "wrong"]]: {error}') from error


def _quoted(name: str) -> str:
    return name.replace('"', '""')


def pointer(column: str, name: str) -> str:
    """Return SQL for a value of a column of JSON objects, as text."""
    path = "/" + name.replace("~", "~0").replace("/", "~1")
    return f"({column} ->> '{path.replace(chr(39), chr(39) * 2)}')"


def _label(name: str, kinds: set[str]) -> Field:
    text = pointer("labels", name)
    if kinds and kinds <= {"UBIGINT", "BIGINT", "DOUBLE"}:
        return Field(f"TRY_CAST({text} AS DOUBLE)", "number")
    if kinds == {"BOOLEAN"}:
        return Field(f"({text} = 'true')", "bool")
    return Field(text, "category")


def _edges(low: float, high: float) -> list[float]:
    """Return equal bins of a round width that hold a range."""
    span = (high - low) / BINS or 1.0
    unit = 10.0 ** np.floor(np.log10(span))
    width = float(next(step * unit for step in (1, 2, 5, 10) if step * unit >= span * 0.999))
    whole = float(low).is_integer() and float(high).is_integer()
    width = max(1.0, width) if whole else width
    first = np.floor(low / width) * width
    bins = int(np.floor((high - first) / width)) + 1
    return [float(first + number * width) for number in range(bins + 1)]


def _series(counted: Sequence[tuple[Any, int, int]], bins: int) -> list[Series]:
    counts: dict[str, list[int]] = {}
    for group, place, number in counted:
        counts.setdefault("" if group is None else str(group), [0] * bins)[place] += number
    return [{"name": name, "counts": counts[name]} for name in sorted(counts)]
