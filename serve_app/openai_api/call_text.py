"""The JSON within a tool call's block: where it ends, read as it comes, and what it calls.

A model's JSON need not be valid, and it arrives in pieces; so its end is found by counting brackets, and only a call that is
there whole is parsed.
"""

import json
import re

from serve_app.engines.markers import CALL_END
from serve_app.openai_api.messages import NAME

HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*,\s*"arguments"\s*:\s*(?=\{)')
"""How a call begins that names its function first: from here on its arguments can be passed on."""


class Braces:
    """Reads JSON as far as its outermost object, without minding whether it is valid.

    Brackets in strings do not count. A control character cannot stand in a string, so it ends one that was left open; and
    `</tool_call>` outside of strings ends the object, wherever that stands.

    Attributes:
        depth: how many brackets are open.
        ended: whether the object has ended.
    """

    _TURNS = re.compile(r'["\\{}\[\]<\x00-\x1f]')

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self.ended = False
        self._in_string = False
        self._at = 0

    def read(self, text: str, start: int, *, final: bool = False) -> int:
        """Go on reading a text from where the last call stopped, the first time from `start`.

        Returns:
            Where the object ends, or, if it has not ended, up to where the text surely belongs to it.
        """
        self._at = max(self._at, start)
        while found := self._TURNS.search(text, self._at):
            sign, at = found[0], found.start()
            self._at = at + 1
            if sign == "\\" and self._in_string:
                if self._at == len(text):
                    self._at = at  # what it escapes is not there yet
                    return len(text) if final else at
                self._at += text[self._at] >= " "
            elif sign == '"':
                self._in_string = not self._in_string
            elif sign < " ":
                self._in_string = False
            elif not self._in_string and sign == "<":
                if text.startswith(CALL_END, at):
                    self.ended = True
                    return at
                if CALL_END.startswith(text[at:]) and not final:
                    self._at = at
                    return at
            elif not self._in_string and sign in "{[":
                self.depth += 1
            elif not self._in_string and sign in "}]":
                self.depth -= 1
                if self.depth <= 0:
                    self.ended = True
                    return self._at
        self._at = len(text)
        return self._at

    def go_on(self) -> None:
        """Begin a text anew: what has been read was taken off it."""
        self._at = 0


def parse_call(text: str) -> tuple[str, str] | None:
    """Return a call's name and arguments, None if it is not one."""
    try:
        call = json.loads(text)
        name, arguments = call.get("name"), call.get("arguments")
        if not (isinstance(name, str) and re.fullmatch(NAME, name) and isinstance(arguments, dict)):
            return None
        return name, json.dumps(arguments, allow_nan=False)
    except (ValueError, RecursionError):
        return None
