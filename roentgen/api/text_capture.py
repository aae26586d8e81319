"""`Model.capture`: teacher-forced capture of existing texts, into memory or into a store.

Into memory, texts are read one group at a time and returned in order, so a list of any length needs the memory of one group.
Into a store, this does the same as the command `roentgen capture`: texts that the session already has are skipped.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

from rich.console import Console
from tqdm import tqdm

from roentgen import store
from roentgen.api.request_building import in_python
from roentgen.api.rollout import Rollout
from roentgen.contract import canonical_hash, check_session_id
from roentgen.extensions import preview
from roentgen.store.schema import check_finite
from roentgen.store.storage_backends import check_writable, open_folder
from roentgen.transcripts import Transcript
from roentgen.transcripts.from_file import read_records
from roentgen.workflows.capture_texts import CaptureReport, Reader, capture_into, session_name
from serve_app.errors import RequestError
from serve_app.openai_api.errors import ApiError
from serve_app.teacher_forcing.forced_capture import TeacherForcing
from serve_app.teacher_forcing.tokens import transcript_tokenizer

Readable = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A text, a list of messages, or an object in the format of `roentgen capture` (docs/capture.md)."""

AT_ONCE = 64
"""Number of texts per group for capture into memory, whose rows are all in memory."""

STORED_AT_ONCE = 4096
"""Number of texts per group for capture into a store, whose tokens are all in memory."""


def transcripts_of(texts: Iterable[Readable]) -> Iterator[Transcript]:
    """Convert texts to transcripts; the id is a hash of the content unless it is given.

    Raises:
        TranscriptError: if an item is not a text; the message names the first one.
    """
    return read_records(map(_record, texts), canonical_hash({"texts": "python"}))


def _record(text: Readable) -> Mapping[str, Any]:
    record: dict[str, Any]
    if isinstance(text, str):
        record = {"text": text}
    elif isinstance(text, Mapping):
        record = dict(text)
    elif isinstance(text, Sequence) and all(isinstance(message, Mapping) for message in text):
        record = {"messages": [dict(message) for message in cast(Sequence[Mapping[str, Any]], text)]}
    else:
        raise TypeError(
            f"texts: {preview(text)} is not a text; allowed are a text, a list of messages, and an object as in docs/capture.md"
        )
    return {"id": canonical_hash(record), **record}


def read(texts: Iterable[Readable], reader: Reader, *, progress: bool) -> Iterator[Rollout]:
    """Capture texts into memory; yields a rollout for each, in order.

    Raises:
        RequestError: if the model lacks a requested layer or hook point.
        TranscriptError: if an item is not a text; the message names the first one.
        UnreadableTextError: if the model cannot read a text.
        StoreError: if rows contain NaN or infinity and that is not allowed.
    """
    try:
        forcing = TeacherForcing(reader.model, reader.engine, None, reader.request, "", chunk_size=reader.chunk_size)
    except RequestError as error:
        raise in_python(error) from error
    return _groups(texts, reader, forcing, progress)


def _groups(texts: Iterable[Readable], reader: Reader, forcing: TeacherForcing, progress: bool) -> Iterator[Rollout]:
    tokenize = transcript_tokenizer(reader.model)
    transcripts = transcripts_of(texts)
    total = len(texts) if isinstance(texts, Sequence) else None
    with _bar(progress, total) as bar:
        while group := list(islice(transcripts, AT_ONCE)):
            tokenized = [tokenize(transcript) for transcript in group]
            found: dict[int, store.CapturedRollout] = {}
            places = {id(text): place for place, text in enumerate(tokenized)}
            for text, rollout in forcing.read(tokenized):
                if isinstance(rollout, RequestError):
                    raise in_python(rollout) from rollout
                if isinstance(rollout, Exception):
                    raise rollout
                check_finite(rollout)
                found[places[id(text)]] = rollout
                bar.update()
            for place, transcript in enumerate(group):
                yield _rollout(transcript, found.pop(place))


def _rollout(transcript: Transcript, rollout: store.CapturedRollout) -> Rollout:
    sequence = rollout.sequence
    end = len(sequence.text) if not sequence.n_completion else sequence.token_offsets[sequence.n_prompt]
    return Rollout(
        prompt=transcript.prompt if isinstance(transcript.prompt, str) else list(transcript.prompt),
        text=sequence.text[end:],
        finish_reason=rollout.finish_reason,
        logprobs=rollout.logprobs[sequence.n_prompt :].tolist(),
        sequence=sequence,
        activations={key: rollout.as_read(key) for key in rollout.tensors},
        positions=rollout.position.tolist(),
        labels=transcript.labels,
    )


def read_into(
    folder: str, session: str | None, texts: Iterable[Readable], reader: Reader, *, progress: bool
) -> CaptureReport:
    """Capture texts into a session of a store, except those that it already has.

    Raises:
        RequestError: if the model lacks a requested layer or hook point, or the session's name is not valid.
        TranscriptError: if an item is not a text; the message names the first one.
        OtherCaptureError: if the session has one of the texts, captured with other settings.
        StoreError: if the store cannot be read or written.
    """
    try:
        check_session_id(session if session is not None else "any")
    except ValueError as error:
        raise ApiError(400, f"session: {error}", param="session") from error
    place = open_folder(folder)
    check_writable(place)
    name = session or session_name("python", "texts", reader.request, reader.model)
    whole = CaptureReport(place.child(name).uri, None)
    transcripts = transcripts_of(texts)
    console = Console(stderr=True, quiet=not progress)
    try:
        while group := list(islice(transcripts, STORED_AT_ONCE)):
            part = capture_into(place, name, reader, group, console, lambda text: None)
            whole.held += part.held
            whole.stored += part.stored
            whole.tokens += part.tokens
            whole.seconds += part.seconds
            whole.failures += part.failures
    except RequestError as error:
        raise in_python(error) from error
    return whole


def _bar(shown: bool, total: int | None) -> "tqdm[Any]":
    """Return a progress bar for terminals and notebooks; tqdm's text bar needs no widgets."""
    console = Console(stderr=True)
    seen = shown and (console.is_terminal or console.is_jupyter)
    return tqdm(total=total, desc="reading", unit=" texts", disable=not seen)
