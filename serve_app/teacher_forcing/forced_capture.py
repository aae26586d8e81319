"""Runs tokenized texts through an engine without generating, and stores their rows.

Texts are processed in groups, the longest first, so that texts in one forward pass have similar lengths and insufficient memory
is detected at once. A group is in this machine's memory, so its size is bounded. With `chunk_size`, a group passes through the
model once per chunk of layers, and a text's rows are joined afterwards. The device then holds the rows of only one chunk, and
the store still gets one rollout per text.

A rollout's last token is fed to the model, unlike in generation, to get its log-probability; its row is not stored.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from ulid import ULID

from roentgen.contract import ActivationRequest, Positions, captured_as, split_key
from roentgen.store import CapturedRollout, CaptureSpec, NonFiniteRowsError, Receipt, StoreError, StoreWriter
from roentgen.store.quantization import QUANTIZED
from serve_app.capture.rows import CapturedRows, CapturePlan, UncapturableError
from serve_app.capture.structure import Tap
from serve_app.engines.job_runner import run_jobs
from serve_app.engines.protocol import Engine, Event, Finished, GenerationJob, Sampling
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.teacher_forcing.tokens import TokenizedTranscript

READ_ONLY = Sampling(max_tokens=0, temperature=0)

GROUP_TEXTS = 256
GROUP_BYTES = 1 << 30
"""Maximum size of one group's rows, if all positions are captured."""


@dataclass(frozen=True)
class StoredText:
    """A text whose rollout is committed."""

    text: TokenizedTranscript
    receipt: Receipt


@dataclass(frozen=True)
class FailedText:
    """A text that could not be captured, and why."""

    text: TokenizedTranscript
    reason: str


@dataclass(frozen=True)
class _Read:
    """The results of all passes of one text."""

    rows: CapturedRows
    logprobs: list[float]


class TeacherForcing:
    """Captures texts with one model and one request into one session."""

    def __init__(
        self,
        model: LoadedModel,
        engine: Engine,
        writer: StoreWriter | None,
        request: ActivationRequest,
        session_id: str,
        *,
        chunk_size: int | None = None,
    ) -> None:
        """Resolve the request.

        Args:
            model: the model that the engine runs.
            engine: the engine.
            writer: the store's writer; None if rollouts are only read.
            request: layers, hook points, positions and dtype.
            session_id: session of the rollouts.
            chunk_size: number of layers per pass; None for all.

        Raises:
            CaptureRequestError: if the model lacks a requested layer or hook point.
        """
        self._model = model
        self._engine = engine
        self._writer = writer
        self._request = request
        self._session_id = session_id
        self._taps = model.structure.resolve(request)
        self._chunks = layer_chunks(self._taps, chunk_size)

    @property
    def spec(self) -> CaptureSpec:
        """The settings that all rollouts share, as far as they are known before a forward pass."""
        dtype = self._model.dtype if self._request.dtype == "model" else f"torch.{self._request.dtype}"
        source, positions = self._model.source, self._request.positions
        return CaptureSpec(
            model=source.name,
            revision=source.revision,
            keys=tuple(self._taps),
            positions=positions,
            dtype=str(dtype),
            computed_in=str(self._model.dtype),
            model_quantization=self._model.quantization,
        )

    def capture(self, texts: Sequence[TokenizedTranscript]) -> Iterator[StoredText | FailedText]:
        """Capture texts in groups; yields each once it is committed or has failed. Closing the iterator cancels the rest.

        Raises:
            UncapturableError: if a hook point has no row per token, which concerns all texts.
            EngineStoppedError: if the engine dies.
            StoreError: if rollouts cannot be written; those yielded before are committed.
        """
        pending: deque[tuple[TokenizedTranscript, Future[Receipt]]] = deque()
        assert self._writer is not None
        for text, rollout in self.read(texts):
            if isinstance(rollout, Exception):
                yield _not_stored(text, rollout)
            else:
                self._writer.wait_for_room()
                try:
                    pending.append((text, self._writer.submit(rollout)))
                except ValueError as error:
                    yield _not_stored(text, error)
            while pending and pending[0][1].done():
                yield _stored(*pending.popleft())
        for text, future in pending:
            yield _stored(text, future)

    def read(
        self, texts: Sequence[TokenizedTranscript]
    ) -> Iterator[tuple[TokenizedTranscript, CapturedRollout | Exception]]:
        """Read texts in groups, the longest first; yields each with its rollout, which is not stored, or its exception.

        Raises:
            UncapturableError: if a hook point has no row per token, which concerns all texts.
            EngineStoppedError: if the engine dies.
        """
        for group in self._groups(texts):
            for text, read in self._read(group):
                yield text, self._rollout(text, read) if isinstance(read, _Read) else read

    def _groups(self, texts: Sequence[TokenizedTranscript]) -> Iterator[list[TokenizedTranscript]]:
        row_bytes = len(self._taps) * self._model.structure.d_model * self._model.dtype.itemsize
        group: list[TokenizedTranscript] = []
        rows = 0
        for text in sorted(texts, key=lambda text: len(text.sequence.token_ids), reverse=True):
            if group and (len(group) == GROUP_TEXTS or (rows + text.sequence.n_rows) * row_bytes > GROUP_BYTES):
                yield group
                group, rows = [], 0
            group.append(text)
            rows += text.sequence.n_rows
        if group:
            yield group

    def _read(self, group: list[TokenizedTranscript]) -> Iterator[tuple[TokenizedTranscript, _Read | Exception]]:
        """Run a group through the model, once per chunk of layers; yields a text after its last pass."""
        logprobs: dict[int, list[float]] = {}
        rows: dict[int, CapturedRows] = {}
        left = dict(enumerate(group))
        for number, taps in enumerate(self._chunks):
            for i, event in self._pass(left, taps, score=number == 0):
                if isinstance(event, Exception):
                    yield left.pop(i), event
                    continue
                assert event.captured is not None
                if number == 0:
                    logprobs[i] = [score.logprob for score in event.prompt_scores or []]
                rows[i] = _joined(rows[i], event.captured) if i in rows else event.captured
                if number == len(self._chunks) - 1:
                    yield left.pop(i), _Read(rows.pop(i), logprobs.pop(i))

    def _pass(
        self, texts: dict[int, TokenizedTranscript], taps: dict[str, Tap], *, score: bool
    ) -> Iterator[tuple[int, Finished | Exception]]:
        """Let the engine read texts; yields each result in order of completion.

        Raises:
            UncapturableError: if a hook point has no row per token.
            EngineStoppedError: if the engine dies.
        """
        makers = {i: partial(self._job, text, taps, score) for i, text in texts.items()}
        for i, result in run_jobs(self._engine, makers):
            if isinstance(result, UncapturableError):
                raise result
            yield i, result

    def _job(
        self, text: TokenizedTranscript, taps: dict[str, Tap], score: bool, on_event: Callable[[Event], None]
    ) -> GenerationJob:
        positions, dtype = Positions.parse(self._request.positions), captured_as(self._request.dtype)
        return GenerationJob(
            prompt_ids=text.sequence.token_ids,
            sampling=READ_ONLY,
            on_event=on_event,
            capture=CapturePlan(taps, positions, dtype, n_prompt=text.sequence.n_prompt, stop=text.sequence.n_rows),
            score_prompt=score and text.sequence.n_completion > 0,
        )

    def _rollout(self, text: TokenizedTranscript, read: _Read) -> CapturedRollout:
        tensors = {key: read.rows.tensors[key] for key in self._taps}
        dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
        # As in generation, prompt tokens have no log-probability. The model scores all tokens but the first.
        logprobs = np.full(len(text.sequence.token_ids), np.nan, dtype=np.float32)
        if text.sequence.n_completion:
            logprobs[text.sequence.n_prompt :] = read.logprobs[text.sequence.n_prompt - 1 :]
        transcript = text.transcript
        return CapturedRollout(
            session_id=self._session_id,
            rollout_id=str(ULID()),
            spec=self.spec
            if self.spec.dtype == QUANTIZED
            else self.spec.model_copy(update={"dtype": ", ".join(dtypes)}),
            tensors=tensors,
            position=read.rows.position,
            sequence=text.sequence,
            logprobs=logprobs,
            finish_reason=transcript.finish_reason,
            key=transcript.key,
            labels=transcript.labels,
            require_finite=not self._request.allow_non_finite,
        )


def layer_chunks(taps: dict[str, Tap], size: int | None) -> list[dict[str, Tap]]:
    """Split taps into passes of at most `size` layers each; model-wide hook points are in the first pass."""
    layers = list(dict.fromkeys(layer for key in taps if (layer := split_key(key)[1]) is not None))
    size = size or max(len(layers), 1)
    number = {layer: place // size for place, layer in enumerate(sorted(layers))}
    chunks: list[dict[str, Tap]] = [{} for _ in range(max(number.values(), default=0) + 1)]
    for key, tap in taps.items():
        layer = split_key(key)[1]
        chunks[0 if layer is None else number[layer]][key] = tap
    return chunks


def _joined(rows: CapturedRows, more: CapturedRows) -> CapturedRows:
    """Join the keys of two passes, which have the same positions of the same text."""
    return replace(rows, tensors={**rows.tensors, **more.tensors})


def _stored(text: TokenizedTranscript, future: "Future[Receipt]") -> StoredText | FailedText:
    """Return the result of a commit. A full disk stops the capture; an invalid rollout fails only itself.

    Raises:
        StoreError: if the store cannot be written.
    """
    error = future.exception()
    if isinstance(error, NonFiniteRowsError):
        return FailedText(text, str(error))
    if isinstance(error, OSError):
        raise StoreError(f"the activations could not be stored: {error}") from error
    if isinstance(error, Exception):
        return _not_stored(text, error)
    return StoredText(text, future.result())


def _not_stored(text: TokenizedTranscript, error: Exception) -> FailedText:
    return FailedText(text, f"{type(error).__name__}: {error}")
