"""The page's types are the replies' types."""

import re
from pathlib import Path
from typing import Any, get_type_hints, is_typeddict

import roentgen.view.schemas as schemas

API = Path(__file__).parents[3] / "viewer" / "src" / "api.ts"
LOOSE = {"Best", "ScoresByClass", "ProbeReport", "Candidate", "Estimate"}
"""Types that the page spells inline, or with more."""


def interfaces() -> dict[str, set[str]]:
    text = re.sub(r"/\*.*?\*/", "", API.read_text(), flags=re.DOTALL)
    found = {}
    for name, body in re.findall(r"^export interface (\w+)[^{]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        found[name] = set(re.findall(r"^  (\w+)\??:", body, re.MULTILINE))
    return found


def test_each_reply_has_its_type_in_the_page_with_the_same_fields() -> None:
    replies: dict[str, Any] = {name: one for name, one in vars(schemas).items() if is_typeddict(one)}
    there = interfaces()
    assert len(replies) > 20
    different = {
        name: (sorted(set(get_type_hints(reply)) ^ there.get(name, set())))
        for name, reply in replies.items()
        if name not in LOOSE and set(get_type_hints(reply)) != there.get(name)
    }
    assert different == {}
