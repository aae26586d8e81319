"""Finds the end of a tool call's JSON while it is generated, and parses a complete call.

A model's JSON may be invalid, and it arrives in pieces. So its end is found by counting brackets, and only a complete call is
parsed.
"""

import json
import re

from serve_app.engines.markers import CALL_END
from serve_app.openai_api.messages import NAME

HEADER = re.compile(r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*,\s*"arguments"\s*:\s*(?=\{)')
"""The start of a call that names its function first; its arguments can be streamed from here on."""


class Braces:
    """Finds the end of the outermost JSON object in a growing text, which may be invalid JSON.

    Brackets in strings are not counted. A control character cannot occur in a string, so it closes an unterminated one.
    `</tool_call>` outside of a string ends the object at any depth.

    Attributes:
        depth: number of open brackets.
        ended: whether the object has ended.
    """

    _TURNS = re.compile(r'["\\{}\[\]<\x00-\x1f]')

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self.ended = False
        self._in_string = False
        self._at = 0

    def read(self, text: str, start: int, *, final: bool = False) -> int:
        """Continue reading a text where the last call stopped; the first call starts at `start`.

        Returns:
            The end of the object; if it has not ended, the end of the text that certainly belongs to it.
        """
        self._at = max(self._at, start)
        while found := self._TURNS.search(text, self._at):
            sign, at = found[0], found.start()
            self._at = at + 1
            if sign == "\\" and self._in_string:
                if self._at == len(text):
                    self._at = at  # the escaped character has not arrived yet
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

    def restart(self) -> None:
        """Start at the beginning of the text again, after the caller has removed what was read."""
        self._at = 0


def parse_call(text: str) -> tuple[str, str] | None:
    """Return a call's name and arguments; None if the text is not a call."""
    try:
        call = json.loads(text)
        name, arguments = call.get("name"), call.get("arguments")
        if not (isinstance(name, str) and re.fullmatch(NAME, name) and isinstance(arguments, dict)):
            return None
        return name, json.dumps(arguments, allow_nan=False)
    except (ValueError, RecursionError):
        return None
