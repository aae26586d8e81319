"""Counts failed samples by kind: which error is the most common, and what to do about it.

Two errors are of one kind if their messages differ only in numbers, identifiers and quoted names. So "503: 12 requests are
waiting" and "503: 14 requests are waiting" are counted together, and two different failures of status 500 are not.
"""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

_STATUS = re.compile(r"\d{3}: ")
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|\b(?=[0-9a-f]*\d)[0-9a-f]{6,}\b|\d+(?:[.,:]\d+)*", re.IGNORECASE)

ADVICE = (
    (r"--request-timeout", "Raise --request-timeout, or lower --parallel so that each request waits less."),
    (r"^the scorer ", "Fix the scorer, apply it with `roentgen score RUN --extractor …`, and run the same command again."),
    (r"non.finite|not finite", "The model's activations overflowed: serve it in bfloat16 or float32 (--dtype)."),
    (r"replica (was lost|died)", "A replica died: see the server's log; too little memory is the usual reason."),
    (r"^(429|503): ", "The server is overloaded: lower --parallel, or start more replicas."),
    (r"^400: ", "The prompt and --max-tokens do not fit into the model's context: lower --max-tokens, or choose a model "
                "with a longer context."),
    (r"connection was lost", "The server closed the connection: see its log; a restart and too little memory are "
                             "the usual reasons."),
    (r"reply cannot be read", "The server's reply is not in OpenAI's format: check --base-url."),
    (r"task died", "The process that ran the attempt died: check the memory of its machine, or lower --parallel."),
    (r"^5\d\d: ", "The server failed: see its log for the reason."),
)  # fmt: skip
"""Advice by pattern of the error's message; the first match applies."""

LONGEST_KIND = 200
"""Characters of a message that identify its kind; the rest is often a copy of the model's output."""

LONGEST_MESSAGE = 300
"""Maximum characters of a message shown on one line."""

OTHERWISE = "See the server's log."


@dataclass(frozen=True)
class Failure:
    """A kind of failure."""

    count: int
    """Number of samples."""
    message: str
    """The first sample's error."""
    sample_id: str
    """The first sample."""
    advice: str
    """Advice."""

    def to_json(self) -> dict[str, Any]:
        """Return the entry of `failures` in `summary.json`."""
        return asdict(self)


class Failures:
    """Counts failures by kind."""

    def __init__(self) -> None:
        self._kinds: dict[str, Failure] = {}
        self._last = ""

    def add(self, sample_id: str, message: str) -> None:
        """Count a failed sample."""
        kind, self._last = kind_of(message), message
        known = self._kinds.get(kind)
        self._kinds[kind] = (
            Failure(1, message, sample_id, advice(message)) if known is None else replace(known, count=known.count + 1)
        )

    def commonest_first(self) -> list[Failure]:
        """Return the kinds, most common first; ties are in order of appearance."""
        return sorted(self._kinds.values(), key=lambda failure: -failure.count)

    def describe_last(self) -> str:
        """Describe the last failure and, if another kind is more common, that kind."""
        commonest, total = self.commonest_first()[0], sum(failure.count for failure in self._kinds.values())
        last = f"the last with: {self._last}"
        if kind_of(commonest.message) == kind_of(self._last):
            return last
        return f"{last}; most common of {total} failures ({commonest.count}): {shorten(commonest.message)}"


def kind_of(message: str) -> str:
    """Return what the messages of a kind have in common, including a leading HTTP status."""
    status = _STATUS.match(message)
    start = status.end() if status else 0
    return (message[:start] + " ".join(_VARIABLE.sub("…", message[start:]).split()))[:LONGEST_KIND]


def shorten(message: str) -> str:
    """Shorten a message to one line of at most `LONGEST_MESSAGE` characters."""
    line = " ".join(message.split())
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 1]}…"


def advice(message: str) -> str:
    """Return advice for an error."""
    return next((text for pattern, text in ADVICE if re.search(pattern, message)), OTHERWISE)
