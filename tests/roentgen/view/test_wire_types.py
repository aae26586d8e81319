"""The page's types in viewer/src/api.ts are those of the replies: the same names, fields, optional and nullable ones."""

import re
from pathlib import Path
from types import NoneType
from typing import NotRequired, get_args, get_origin, get_type_hints, is_typeddict

import pytest

from roentgen.view import schemas

API = (Path(__file__).parents[3] / "viewer" / "src" / "api.ts").read_text()
REPLIES = [one for one in vars(schemas).values() if is_typeddict(one)]


def interface(name: str) -> dict[str, str]:
    """Return the types of an interface's fields as TypeScript spells them, a `?` behind the names of optional ones."""
    found = re.search(rf"export interface {name}(?: extends (\w+))? \{{\n(.*?)^\}}", API, re.DOTALL | re.MULTILINE)
    assert found is not None, f"api.ts has no interface {name}"
    own = re.findall(r"^  (\w+\??): (.*);$", found[2], re.MULTILINE)
    return {**(interface(found[1]) if found[1] else {}), **dict(own)}


def is_nullable(hint: object) -> bool:
    return NoneType in get_args(hint)


@pytest.mark.parametrize("reply", REPLIES, ids=lambda reply: reply.__name__)
def test_a_reply_is_what_the_page_takes_it_for(reply: type) -> None:
    fields = interface(reply.__name__)
    hints = get_type_hints(reply, include_extras=True)
    assert set(fields) == {f"{name}?" if get_origin(hint) is NotRequired else name for name, hint in hints.items()}
    for name, hint in hints.items():
        if get_origin(hint) is not NotRequired:
            assert fields[name].endswith("| null") is is_nullable(hint), name
