"""Finds JSON schemas that no finite value matches, because something they require contains itself.

llguidance compiles such a schema and follows it until its parser is full, or until the request's tokens are used up. This
module rejects it before anything is generated.

A schema has a finite value if one of its allowed types has: an object if its required properties have, an array if its minimum
items have. This is a system of implications between the schemas of a document, with one gate per schema: an "all" or an "any"
of other gates. Gates without inputs are open; an open gate opens those that it feeds. A schema whose gate stays closed has no
finite value. Parts of a schema that apply to one value (`allOf`, `$ref`, an option of `anyOf`) are read together, since one
may require a property that another describes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

Schema = Mapping[str, Any]

Parts = dict[int, tuple[Schema, tuple[int, ...]]]
"""Schemas that all apply to one value, by identity, each with the path of schemas that led to it, itself included."""

MAX_WORK = 100_000
"""Number of parts that are examined, in a fraction of a second; a schema that takes more counts as one with a finite value."""

MAX_DEPTH = 20
"""Number of consecutive references that are read together; beyond it, they are schemas of their own."""

COMPOSITE = {"object", "array"}


def has_finite_value(schema: Schema) -> bool:
    """Whether recursion leaves a finite value that matches a schema; a keyword that is not examined counts as finite."""
    try:
        return _Implications(schema).hold()
    except _TooLargeError:
        return True


class _TooLargeError(Exception):
    """The schema exceeds `MAX_WORK`."""


class _Implications:
    """The gates of a document.

    A gate opens once the required number of its inputs is open.
    """

    def __init__(self, root: Schema) -> None:
        self._needs: list[int] = []
        self._feeds: list[list[int]] = []
        self._gates: dict[int, int] = {}
        self._waiting: list[Schema] = []
        self._work = 0
        self._targets = _Targets(root)
        self._never = self._gate(1, [])
        self._root = self._schema(root)

    def hold(self) -> bool:
        """Whether the root's gate opens."""
        while self._waiting:
            schema = self._waiting.pop()
            self._feed(self._of_value(schema), self._gates[id(schema)])
        opened = [gate for gate, need in enumerate(self._needs) if need == 0]
        for gate in opened:
            for fed in self._feeds[gate]:
                self._needs[fed] -= 1
                if self._needs[fed] == 0:
                    opened.append(fed)
        return self._root in opened

    def _gate(self, need: int, fed_by: Sequence[int]) -> int:
        self._needs.append(need)
        self._feeds.append([])
        for gate in fed_by:
            self._feed(gate, len(self._needs) - 1)
        return len(self._needs) - 1

    def _feed(self, gate: int, fed: int) -> None:
        self._feeds[gate].append(fed)

    def _all(self, gates: Sequence[int]) -> int:
        return self._gate(len(gates), gates)

    def _any(self, gates: Sequence[int]) -> int:
        return self._gate(1, gates)

    def _schema(self, schema: Any) -> int:
        """Return the gate of a schema, which is built later; a schema that is true or false is open."""
        if not isinstance(schema, Mapping):
            return self._all([])
        if id(schema) not in self._gates:
            self._gates[id(schema)] = self._gate(1, [])
            self._waiting.append(schema)
        return self._gates[id(schema)]

    def _of_value(self, schema: Schema) -> int:
        parts: Parts = {}
        if (others := self._collect(schema, parts, ())) is None:
            return self._never
        return self._all([*others, *self._of_parts(parts, list(parts))])

    def _collect(self, schema: Schema, parts: Parts, path: tuple[int, ...]) -> list[int] | None:
        """Add a schema and everything that applies to the same value to `parts`.

        Returns:
            Gates of references that are too deep to be read together; None if the schema refers to itself.
        """
        self._count()
        if id(schema) in path:
            return None
        if id(schema) in parts:
            return []
        path = (*path, id(schema))
        parts[id(schema)] = schema, path
        every = schema.get("allOf")
        applied = [part for part in every if isinstance(part, Mapping)] if isinstance(every, list) else []
        if (target := self._targets.of(schema)) is not None:
            applied.append(target)
        if len(path) >= MAX_DEPTH:
            return [self._schema(part) for part in applied]
        gates = []
        for part in applied:
            found = self._collect(part, parts, path)
            if found is None:
                return None
            gates += found
        return gates

    def _of_parts(self, parts: Parts, new: list[int]) -> Iterator[int]:
        """Build the gates of what a value that matches all parts needs.

        Args:
            parts: all parts.
            new: parts whose options have not been examined.
        """
        yield self._of_types([schema for schema, _ in parts.values()])
        for part, path in [parts[key] for key in new]:
            for name in ("anyOf", "oneOf"):
                if options := _list(part, name):
                    yield self._any([self._of_option(option, parts, path) for option in options])

    def _of_option(self, option: Any, beside: Parts, path: tuple[int, ...]) -> int:
        """Build the gate of one option of several, together with the parts beside it."""
        if not isinstance(option, Mapping):
            return self._all([])
        parts = dict(beside)
        if (others := self._collect(option, parts, path)) is None:
            return self._never
        return self._all([*others, *self._of_parts(parts, list(parts)[len(beside) :])])

    def _of_types(self, parts: list[Schema]) -> int:
        """Build the gate of the types that all parts allow; numbers, strings and given values need nothing."""
        self._count(len(parts))
        given = any({"enum", "const"} & part.keys() for part in parts)
        allowed = [types for part in parts if (types := _types(part))]
        types = set.intersection(*allowed) if allowed else set()
        if given or not types or types - COMPOSITE:
            return self._all([])
        return self._any([self._of_object(parts) if name == "object" else self._of_array(parts) for name in types])

    def _of_object(self, parts: list[Schema]) -> int:
        required = {key for part in parts for key in _list(part, "required") if isinstance(key, str)}
        self._count(len(required) * len(parts))
        gates = [self._schema(_property(part, key)) for key in sorted(required) for part in parts]
        least = max((_number(part, "minProperties") for part in parts), default=0)
        closed = [part["additionalProperties"] for part in parts if part.get("additionalProperties", True) is not True]
        if least > len(required) and closed:
            more = [value for name in ("properties", "patternProperties") for p in parts for value in _values(p, name)]
            more += [other for other in closed if isinstance(other, Mapping)]
            self._count(len(more))
            if more:
                gates.append(self._any([self._schema(value) for value in more]))
        return self._all(gates)

    def _of_array(self, parts: list[Schema]) -> int:
        least = max((_number(part, "minItems") for part in parts), default=0)
        gates = []
        for part in parts:
            items: Any = part.get("items")
            first = _list(part, "prefixItems")
            if isinstance(items, list):  # as drafts before 2020-12 have it
                first, items = items, part.get("additionalItems")
            found = [*first[:least], *([items] if least > len(first) else [])]
            self._count(len(found))
            gates += [self._schema(item) for item in found]
        return self._all(gates)

    def _count(self, work: int = 1) -> None:
        self._work += work
        if self._work > MAX_WORK:
            raise _TooLargeError


class _Targets:
    """The targets of references: pointers, `$id`s and `$anchor`s of one document."""

    def __init__(self, root: Schema) -> None:
        self._bases: dict[int, str] = {}
        self._found: dict[int, Schema | None] = {}
        self._named: dict[str, Any] = {"": root}
        waiting: list[tuple[Any, str]] = [(root, "")]
        while waiting:
            value, base = waiting.pop()
            if isinstance(value, Mapping):
                if isinstance(name := value.get("$id"), str):
                    base = urldefrag(urljoin(base, name)).url
                    self._named.setdefault(base, value)
                if isinstance(anchor := value.get("$anchor"), str):
                    self._named.setdefault(f"{base}#{anchor}", value)
                self._bases.setdefault(id(value), base)
                waiting += [(inner, base) for inner in value.values()]
            elif isinstance(value, list):
                waiting += [(inner, base) for inner in value]

    def of(self, schema: Schema) -> Schema | None:
        """Return the schema that a schema refers to; None if it refers to none, or to one outside the document."""
        if not isinstance(reference := schema.get("$ref"), str):
            return None
        if id(schema) not in self._found:
            self._found[id(schema)] = self._find(schema, reference)
        return self._found[id(schema)]

    def _find(self, schema: Schema, reference: str) -> Schema | None:
        place, fragment = urldefrag(urljoin(self._bases.get(id(schema), ""), reference))
        if fragment and not fragment.startswith("/"):
            found = self._named.get(f"{place}#{fragment}")
        else:
            found = self._named.get(place)
            for step in unquote(fragment).split("/")[1:]:
                found = _step(found, step.replace("~1", "/").replace("~0", "~"))
        return found if isinstance(found, Mapping) else None


def _step(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value.get(name)
    if isinstance(value, list) and name.isdecimal() and int(name) < len(value):
        return value[int(name)]
    return None


def _types(schema: Schema) -> set[str]:
    types = schema.get("type")
    return {name for name in (types if isinstance(types, list) else [types]) if isinstance(name, str)}


def _property(schema: Schema, key: str) -> Any:
    """Return a part's schema of a property; None if nothing is known."""
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and key in properties:
        return properties[key]
    return None if "patternProperties" in schema else schema.get("additionalProperties")


def _list(schema: Schema, name: str) -> list[Any]:
    found = schema.get(name)
    return found if isinstance(found, list) else []


def _values(schema: Schema, name: str) -> list[Any]:
    found = schema.get(name)
    return list(found.values()) if isinstance(found, Mapping) else []


def _number(schema: Schema, name: str) -> int:
    found = schema.get(name)
    return found if type(found) is int else 0
