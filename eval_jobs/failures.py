"""Failed samples, counted by kind: which error is the commonest, and what to do about it.

Two errors are of one kind if their messages differ only in numbers, identifiers and quoted names, so that "503: 12 requests are
waiting" and "503: 14 requests are waiting" are counted together, while two different failures of status 500 are not.
"""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

_STATUS = re.compile(r"\d{3}: ")
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|\b(?=[0-9a-f]*\d)[0-9a-f]{6,}\b|\d+(?:[.,:]\d+)*", re.IGNORECASE)

ADVICE = (
    (r"--request-timeout", "Raise --request-timeout, or lower --parallel so that each request waits less."),
    (r"^the scorer ", "Mend the scorer, tell the run with `roentgen score RUN --extractor …`, and run the same again."),
    (r"non.finite|not finite", "The model's numbers overflowed: serve it in bfloat16 or float32 (--dtype)."),
    (r"replica (was lost|died)", "A replica died: the server's log says why; too little memory is the usual reason."),
    (r"^(429|503): ", "The server had more to do than it takes: lower --parallel, or start more replicas."),
    (r"^400: ", "The prompt and --max-tokens do not fit into the model's context: lower --max-tokens, or choose a model "
                "with a longer context."),
    (r"connection was lost", "The server closed the connection: its log says why; a restart and too little memory are "
                             "the usual reasons."),
    (r"reply cannot be read", "What answers does not speak OpenAI's format on this route: check --base-url."),
    (r"task died", "The process that posed the problem died: look for too little memory on its machine, or lower --parallel."),
    (r"^5\d\d: ", "The server failed: its log has the reason."),
)  # fmt: skip
"""What to do about errors that match a pattern; the first match counts."""

LONGEST_KIND = 200
"""Characters of a message that tell kinds apart; what follows is often a copy of what a model wrote."""

LONGEST_MESSAGE = 300
"""Characters of a message where it is one line of several."""

OTHERWISE = "Look into the server's log."


@dataclass(frozen=True)
class Failure:
    """A kind of failure."""

    count: int
    """Samples that failed in this way."""
    message: str
    """Of the first of them."""
    sample_id: str
    """The first of them."""
    advice: str
    """What to do."""

    def to_json(self) -> dict[str, Any]:
        """Return it as an entry of `failures` in `summary.json`."""
        return asdict(self)


class Failures:
    """Counts failures by kind as they come."""

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
        """Return the kinds, the commonest first; of equally common ones, the one that came first."""
        return sorted(self._kinds.values(), key=lambda failure: -failure.count)

    def describe_last(self) -> str:
        """Spell the last failure and, if others are commoner, the commonest."""
        commonest, total = self.commonest_first()[0], sum(failure.count for failure in self._kinds.values())
        last = f"the last one with: {self._last}"
        if kind_of(commonest.message) == kind_of(self._last):
            return last
        return f"{last}; the commonest of {total} failures ({commonest.count}): {shorten(commonest.message)}"


def kind_of(message: str) -> str:
    """Return what all messages of a kind have in common; a status in front belongs to it."""
    status = _STATUS.match(message)
    start = status.end() if status else 0
    return (message[:start] + " ".join(_VARIABLE.sub("…", message[start:]).split()))[:LONGEST_KIND]


def shorten(message: str) -> str:
    """Return a message as one line of at most `LONGEST_MESSAGE` characters."""
    line = " ".join(message.split())
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 1]}…"


def advice(message: str) -> str:
    """Return what to do about an error."""
    return next((text for pattern, text in ADVICE if re.search(pattern, message)), OTHERWISE)
