"""Runs the choices of one request through the engine and the store, and says what has happened as it happens.

A request is one or more choices (`n`, or several prompts), each a job of its own in the engine's batch. A choice that captures
is done only when its rows are durable. Leaving early, by an error, a time limit or the client going away, cancels every choice,
which frees their places at the engine's next step.
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

_ROOM_POLL_S = 0.02


@dataclass(frozen=True)
class Runner:
    """A model and the engine that runs it: what planning a request takes."""

    model: ServedModel
    engine: Engine


@dataclass(frozen=True)
class Served(Runner):
    """What a replica that can serve has."""

    storage: Storage


@dataclass(frozen=True)
class Choice:
    """One generation of a request."""

    prompt: TokenizedText
    """What the model is given."""
    sampling: Sampling
    """How to choose tokens."""
    role: str
    """Who speaks the completion."""
    asked: ActivationRequest | None = None
    """What to keep, None for nothing."""
    plan: CapturePlan | None = None
    """`asked`, resolved."""
    grammar: Grammar | None = None
    """What to follow, None for free text."""
    score_tokens: bool = True
    """Whether the reply says how likely each generated token was. A stored rollout always does; a generation that probes may
    end is scored too."""
    score_prompt: bool = False
    """Whether the prompt's own tokens are to be scored."""
    probes: tuple[RequestProbe, ...] = ()
    """What its tokens are to be scored with."""
    stopping: Stopping | None = None
    """What these scores are to do, None for nothing."""
    stop_label: Callable[[Sequence[Acted]], str] | None = None
    """Writes the label of a rollout whose scores may act, from what they have done."""
    steering: tuple[SteeringVector, ...] = ()
    """What is to be added to its stream."""
    cache_salt: str | None = None
    """Under what its prefix is cached, None for what all share."""

    def job(
        self, on_event: Callable[[Event], None], constraint: Constraint | None, *, stream: bool = False
    ) -> GenerationJob:
        """Return it as the engine takes it.

        Args:
            on_event: called with each event.
            constraint: `grammar`, compiled.
            stream: whether text is sent as it is generated.
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
Tell = Callable[[TextDelta | Done | Failed], None]


async def generate(
    served: Served, choices: list[Choice], *, stream: bool, session_id: str, timeout_s: float
) -> AsyncIterator[list[tuple[int, TextDelta | Done]]]:
    """Run choices and yield, each time, what has happened since the last time, by the choice's number.

    Args:
        served: the model, its engine and its store.
        choices: what to generate; all are submitted at once.
        stream: whether to yield text as it comes.
        session_id: where activations go that name no session.
        timeout_s: the longest that all of it may take.

    Raises:
        RequestError: if a grammar cannot be followed, the queue is full, it takes too long, or generation, capture or commit
            fails.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Item] = asyncio.Queue()

    def listener(index: int, choice: Choice) -> "_Listener":
        def tell(item: TextDelta | Done | Failed) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (index, item))

        return _Listener(served, choice, session_id, tell)

    constraints = await _compiled_aside(served, choices)
    jobs = [
        choice.job(listener(index, choice).on_event, constraint, stream=stream)
        for index, (choice, constraint) in enumerate(zip(choices, constraints, strict=True))
    ]
    open_choices = len(jobs)
    try:
        async with asyncio.timeout(timeout_s):
            # The store is slower than the model: whoever wants more stored waits outside the batch, where nothing is held.
            while any(choice.plan for choice in choices) and not served.storage.has_room:
                await asyncio.sleep(_ROOM_POLL_S)
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


async def _compiled_aside(served: Served, choices: list[Choice]) -> list[Constraint | None]:
    """Compile each choice's grammar, on a thread: a large schema takes a while, and others want answers meanwhile."""
    if all(choice.grammar is None for choice in choices):
        return [None] * len(choices)
    return await asyncio.to_thread(compile_grammars, served, choices)


def compile_grammars(runner: Runner, choices: list[Choice]) -> list[Constraint | None]:
    """Compile each choice's grammar.

    Raises:
        ApiError: if a schema cannot be followed, naming where the request has it.
    """
    try:
        return [
            None if choice.grammar is None else runner.model.constraints.compile(choice.grammar) for choice in choices
        ]
    except ConstraintError as error:
        raise ApiError(400, str(error), param=error.param, code="unsupported_schema") from error


class _Listener:
    """Hears one choice's events on the engine's thread, and stores what it captured before it is called done."""

    def __init__(self, served: Served, choice: Choice, session_id: str, tell: Tell) -> None:
        self._served = served
        self._choice = choice
        self._session_id = session_id
        self._tell = tell

    def on_event(self, event: Event) -> None:
        """Pass an event on; a finished choice that captured goes to the store first."""
        if not isinstance(event, Finished):
            self._tell(event)
        elif self._choice.asked is None:
            self._tell(Done(event, None))
        else:
            try:
                self._commit(event, self._choice.asked)
            except Exception as error:  # raised on the engine's thread, it would fail the whole batch
                log.exception("a finished generation cannot be stored")
                self._tell(Failed(error))

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
                self._tell(Done(finished, future.result()))
            else:
                self._tell(Failed(error if isinstance(error, Exception) else StoreError(str(error))))

        self._served.storage.keep(entry, finished).add_done_callback(committed)
