"""Finds JSON schemas that no finite value matches, because something they require contains itself.

llguidance compiles such a schema and follows it until its parser is full. Here it is refused before anything is generated.
A schema can end if everything that it requires can. References may lead back, so those that can end are collected until no
more are found.
"""

from collections.abc import Mapping
from typing import Any


def can_end(schema: Mapping[str, Any]) -> bool:
    """Whether recursion leaves a finite value that matches a schema; a keyword that is not looked at counts as finite."""
    ending: set[str] = set()
    met: set[str] = set()
    while True:
        known = len(ending), len(met)
        if _ends(schema, ending, met):
            return True
        ending |= {reference for reference in sorted(met) if _ends(_at(schema, reference), ending, met)}
        if known == (len(ending), len(met)):
            return False


def _ends(schema: Any, ending: set[str], met: set[str]) -> bool:
    """Whether a schema can end if these references can; `met` collects all references on the way."""
    if not isinstance(schema, Mapping):
        return True
    parts = [_reference(schema["$ref"], ending, met)] if isinstance(schema.get("$ref"), str) else []
    for name in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(name), list) and options:
            found = [_ends(option, ending, met) for option in options]  # all, so that every reference is met
            parts.append(any(found))
    if isinstance(every := schema.get("allOf"), list):
        parts += [_ends(option, ending, met) for option in every]
    if not {"enum", "const"} & schema.keys() and (types := _types(schema)):
        found = [_type_ends(name, schema, ending, met) for name in types]
        parts.append(any(found))
    return all(parts)


def _type_ends(name: str, schema: Mapping[str, Any], ending: set[str], met: set[str]) -> bool:
    """Whether a value of one type can end: an object whose required properties do, an array whose least items do."""
    if name == "object" and isinstance(required := schema.get("required"), list):
        properties, others = schema.get("properties"), schema.get("additionalProperties")
        listed = properties if isinstance(properties, Mapping) else {}
        found = [_ends(listed.get(key, others), ending, met) for key in required if isinstance(key, str)]
        return all(found)
    if name == "array" and isinstance(least := schema.get("minItems"), int) and least > 0:
        first = schema.get("prefixItems")
        items = first[:least] if isinstance(first, list) else []
        more = [schema.get("items")] if least > len(items) else []
        found = [_ends(item, ending, met) for item in [*items, *more]]
        return all(found)
    return True


def _types(schema: Mapping[str, Any]) -> list[str]:
    types = schema.get("type")
    return (
        [name for name in types if isinstance(name, str)] if isinstance(types, list) else [str(types)] if types else []
    )


def _reference(reference: str, ending: set[str], met: set[str]) -> bool:
    met.add(reference)
    return reference in ending


def _at(schema: Mapping[str, Any], reference: str) -> Any:
    """Return what a reference within a schema leads to, None if that is not here."""
    if not reference.startswith("#"):
        return None
    found: Any = schema
    for step in reference[1:].split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping):
            found = found.get(name)
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found
