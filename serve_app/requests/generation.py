"""Runs the choices of one request through the engine and the store, and yields their events.

A request has one or more choices (`n`, or several prompts), each a separate job in the engine's batch. A choice that captures
activations is done only after its rows are committed. An error, the time limit or a disconnected client cancels every choice,
which frees their slots in the batch at the engine's next step.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from ulid import ULID

from roentgen.contract import STOP_LABEL, ActivationRequest
from roentgen.store import StoreError
from roentgen.tokenized_text import TokenizedText
from serve_app.capture.probe_scores import RequestProbe
from serve_app.capture.rows import CapturePlan
from serve_app.capture.steering import SteeringVector
from serve_app.engines.constraints import Grammar
from serve_app.engines.probe_stopping import Acted, Stopping
from serve_app.engines.protocol import (
    Constraint,
    ConstraintError,
    Engine,
    Event,
    Failed,
    Finished,
    GenerationJob,
    Sampling,
    TextDelta,
)
from serve_app.engines.rollout_metadata import make_metadata
from serve_app.engines.served_model import ServedModel
from serve_app.engines.storage import Done, Storage, StoredActivations
from serve_app.errors import RequestError
from serve_app.openai_api.errors import ApiError, from_store

log = logging.getLogger(__name__)

_STORE_POLL_S = 0.02


@dataclass(frozen=True)
class Runner:
    """A model and the engine that runs it."""

    model: ServedModel
    engine: Engine


@dataclass(frozen=True)
class Served(Runner):
    """A model, its engine and its storage, in a replica that is ready."""

    storage: Storage


@dataclass(frozen=True)
class Choice:
    """One generation of a request."""

    prompt: TokenizedText
    """The prompt's tokens."""
    sampling: Sampling
    """Sampling parameters."""
    role: str
    """Role of the completion."""
    asked: ActivationRequest | None = None
    """The request for activations; None to capture nothing."""
    plan: CapturePlan | None = None
    """`asked`, resolved to hook points of the model."""
    grammar: Grammar | None = None
    """Grammar that the completion must follow; None for free text."""
    score_tokens: bool = True
    """Whether the reply contains log-probabilities of the generated tokens.

    They are also computed for a stored rollout and for a generation that probes may end.
    """
    score_prompt: bool = False
    """Whether to compute log-probabilities of the prompt's tokens."""
    probes: tuple[RequestProbe, ...] = ()
    """Probes that score the tokens."""
    stopping: Stopping | None = None
    """Actions of the probes' scores; None for none."""
    stop_label: Callable[[Sequence[Acted]], str] | None = None
    """Formats the stop label of a rollout from the actions that its scores took."""
    steering: tuple[SteeringVector, ...] = ()
    """Vectors to add to the residual stream."""
    cache_salt: str | None = None
    """Key that separates its prefix cache; None for the shared cache."""

    def job(
        self, on_event: Callable[[Event], None], constraint: Constraint | None, *, stream: bool = False
    ) -> GenerationJob:
        """Return the choice as a job for the engine.

        Args:
            on_event: receives the job's events.
            constraint: `grammar`, compiled.
            stream: whether the listener receives text while it is generated.
        """
        return GenerationJob(
            prompt_ids=self.prompt.token_ids,
            sampling=self.sampling,
            on_event=on_event,
            capture=self.plan,
            stream=stream,
            constraint=constraint,
            score_tokens=self.score_tokens or self.plan is not None or self.stopping is not None,
            score_prompt=self.score_prompt,
            probes=self.probes,
            stopping=self.stopping,
            steering=self.steering,
            cache_salt=self.cache_salt,
        )


Item = tuple[int, TextDelta | Done | Failed]
Emit = Callable[[TextDelta | Done | Failed], None]


async def generate(
    served: Served, choices: list[Choice], *, stream: bool, session_id: str, timeout_s: float
) -> AsyncIterator[list[tuple[int, TextDelta | Done]]]:
    """Run choices and yield lists of new events, each with the number of its choice.

    Args:
        served: the model, its engine and its store.
        choices: the generations; all are submitted at once.
        stream: whether to yield text while it is generated.
        session_id: default session of the activations.
        timeout_s: time limit of all choices together.

    Raises:
        RequestError: if a grammar is not supported, the queue is full, the time limit is exceeded, or generation, capture or
            commit fails.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Item] = asyncio.Queue()

    def listener(index: int, choice: Choice) -> "_Listener":
        def emit(item: TextDelta | Done | Failed) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (index, item))

        return _Listener(served, choice, session_id, emit)

    constraints = await _compile_on_thread(served, choices)
    jobs = [
        choice.job(listener(index, choice).on_event, constraint, stream=stream)
        for index, (choice, constraint) in enumerate(zip(choices, constraints, strict=True))
    ]
    open_choices = len(jobs)
    try:
        async with asyncio.timeout(timeout_s):
            # Backpressure: capture requests wait before admission while the store is behind.
            while any(choice.plan for choice in choices) and not served.storage.has_room:
                await asyncio.sleep(_STORE_POLL_S)
            for job in jobs:
                served.engine.submit(job)
            while open_choices:
                arrived = [await queue.get()]
                while not queue.empty():
                    arrived.append(queue.get_nowait())
                events = []
                for index, item in arrived:
                    if isinstance(item, Failed):
                        raise item.error
                    open_choices -= isinstance(item, Done)
                    events.append((index, item))
                yield events
    except TimeoutError as error:
        raise ApiError(408, f"not finished within {timeout_s:g} s", code="timeout") from error
    except RequestError:
        raise
    except StoreError as error:
        raise from_store(error, "activations_not_stored") from error
    except Exception as error:
        raise ApiError(
            500, f"the generation failed: {type(error).__name__}: {error}", code="generation_failed"
        ) from error
    finally:
        for job in jobs:
            job.cancelled.set()


async def _compile_on_thread(served: Served, choices: list[Choice]) -> list[Constraint | None]:
    """Compile each choice's grammar on a thread, because a large schema would block other requests."""
    if all(choice.grammar is None for choice in choices):
        return [None] * len(choices)
    return await asyncio.to_thread(compile_grammars, served, choices)


def compile_grammars(runner: Runner, choices: list[Choice]) -> list[Constraint | None]:
    """Compile each choice's grammar.

    Raises:
        ApiError: if a schema is not supported; it names the request's parameter.
    """
    try:
        return [
            None if choice.grammar is None else runner.model.constraints.compile(choice.grammar) for choice in choices
        ]
    except ConstraintError as error:
        raise ApiError(400, str(error), param=error.param, code="unsupported_schema") from error


class _Listener:
    """Receives one choice's events on the engine's thread, and stores its activations before it reports `Done`."""

    def __init__(self, served: Served, choice: Choice, session_id: str, emit: Emit) -> None:
        self._served = served
        self._choice = choice
        self._session_id = session_id
        self._emit = emit

    def on_event(self, event: Event) -> None:
        """Emit an event; the activations of a finished choice are stored first."""
        if not isinstance(event, Finished):
            self._emit(event)
        elif self._choice.asked is None:
            self._emit(Done(event, None))
        else:
            try:
                self._commit(event, self._choice.asked)
            except Exception as error:  # an exception on the engine's thread would fail the whole batch
                log.exception("a finished generation could not be stored")
                self._emit(Failed(error))

    def _commit(self, finished: Finished, asked: ActivationRequest) -> None:
        session_id = asked.session_id or self._session_id
        if self._choice.stop_label is not None:
            labels = {**asked.labels, STOP_LABEL: self._choice.stop_label(finished.acted)}
            asked = asked.model_copy(update={"labels": labels})
        entry = make_metadata(
            self._served.model, self._choice.prompt, self._choice.role, asked, finished, session_id, str(ULID())
        )

        def committed(future: "Future[StoredActivations]") -> None:  # on the storage's thread
            error = future.exception()
            if error is None:
                self._emit(Done(finished, future.result()))
            else:
                self._emit(Failed(error if isinstance(error, Exception) else StoreError(str(error))))

        self._served.storage.keep(entry, finished).add_done_callback(committed)
