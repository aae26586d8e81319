"""Reads transcripts from a JSON Lines file: one object per line, in one of three forms.

    {"text": "…"}                              raw text, all of it prompt
    {"prompt": "…", "completion": "…"}         raw text with a separate completion
    {"messages": [{"role": "user", …}, …]}     a conversation; a final assistant message is the completion

A line may also have `id` (by default its line number), `labels` and, with a completion, `finish_reason`. Complete messages
end their turn ("stop"); raw completions do not ("length"). The first error ends the reading, with file, line, field, value
and what is allowed.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from roentgen.contract import Labels, RolloutKey, canonical_hash
from roentgen.strict_json import JsonError, read_json
from roentgen.transcripts.transcript import Transcript, TranscriptError

Words = Annotated[str, Field(min_length=1)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str


def _spell_number(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class _Line(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, Field(min_length=1, max_length=200), BeforeValidator(_spell_number)] | None = None
    labels: Labels = Field(default_factory=dict)
    text: Words | None = None
    prompt: Words | None = None
    completion: str | None = None
    messages: list[_Message] | None = Field(default=None, min_length=1)
    finish_reason: Literal["stop", "length"] | None = None

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        given = {name for name in ("text", "prompt", "completion", "messages") if getattr(self, name) is not None}
        if given not in ({"text"}, {"prompt", "completion"}, {"messages"}):
            raise ValueError(
                "a line has text, or prompt and completion, or messages; this one has "
                + (" and ".join(sorted(given)) or "none of them")
            )
        if self.finish_reason is not None and not self._completed:
            raise ValueError("finish_reason requires a completion, and this line has none")
        if self.messages is not None and len(self.messages) == 1 and self._completed:
            raise ValueError("messages: the assistant's message needs at least one before it")
        return self

    @property
    def _completed(self) -> bool:
        return self.completion is not None or (self.messages is not None and self.messages[-1].role == "assistant")

    def transcript(self, key: RolloutKey) -> Transcript:
        """Convert the line to a transcript."""
        if self.messages is None:
            prompt = self.text if self.prompt is None else self.prompt
            assert prompt is not None
            return Transcript(key, prompt, self.completion, self.finish_reason or "length", self.labels)
        messages = tuple(message.model_dump() for message in self.messages)
        if not self._completed:
            return Transcript(key, messages, labels=self.labels)
        return Transcript(key, messages[:-1], messages[-1]["content"], self.finish_reason or "stop", self.labels)


def read_file(path: Path) -> list[Transcript]:
    """Read every line of a file; blank lines are skipped.

    A transcript's key consists of a hash of the file's name and its id, so reading the file again yields the same keys.

    Raises:
        TranscriptError: if the file cannot be read, is empty, or a line is not a transcript or has the id of another.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise TranscriptError(f"{path} cannot be read: {error.strerror or error}") from error
    config_hash = canonical_hash({"texts": path.name})
    transcripts: list[Transcript] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        parsed = _parse_line(line, f"{path}, line {number}")
        name = str(number) if parsed.id is None else parsed.id
        if name in seen:
            raise TranscriptError(
                f"{path}, line {number}: id: {name!r} is already used by line {seen[name]}; ids must be unique"
            )
        seen[name] = number
        transcripts.append(parsed.transcript(RolloutKey(config_hash=config_hash, problem_id=name)))
    if not transcripts:
        raise TranscriptError(f'{path} has no lines; a JSON object per line is required, such as {{"text": "…"}}')
    return transcripts


def read_records(records: Iterable[Mapping[str, Any]], config_hash: str, start: int = 1) -> Iterator[Transcript]:
    """Read transcripts lazily from objects in one of the forms of a file's lines.

    Args:
        records: the objects.
        config_hash: the configuration hash in their keys.
        start: number of the first; it is the id of a transcript without one.

    Raises:
        TranscriptError: if an object is invalid; the message names it.
    """
    for number, record in enumerate(records, start=start):
        parsed = _parse(dict(record), f"text {number}")
        name = str(number) if parsed.id is None else parsed.id
        yield parsed.transcript(RolloutKey(config_hash=config_hash, problem_id=name))


def _parse_line(line: bytes, where: str) -> _Line:
    try:
        value = read_json(line)
    except JsonError as error:
        raise TranscriptError(f"{where}: {error}") from error
    if not isinstance(value, dict):
        raise TranscriptError(f"{where}: a line must be a JSON object, not {_short(value)}")
    return _parse(value, where)


def _parse(value: dict[str, Any], where: str) -> _Line:
    try:
        return _Line.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        # The path also contains a union's alternatives, which users do not know.
        field = ".".join(str(part) for part in first["loc"] if part not in ("str", "int", "float", "bool"))
        message = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] in ("missing", "value_error") else f" (given: {_short(first['input'])})"
        raise TranscriptError(f"{where}: {f'{field}: ' if field else ''}{message}{given}") from error


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
