"""The runs of a store: their settings, and the number of each call of a problem.

Settings are stored in `STORE/.runs/<id>.json`, so every ingress and every server of the store has them, also after a restart.
They never change, so that all rollouts of a run have the same settings.

Each call to an address of a run is a separate turn, even if it repeats another call. Numbers continue after the highest turn
in the store's index. So the application needs exactly one `TurnCounter`: a single ingress has its own, and several ingresses
share a deployment with one replica (`app`).
"""

import asyncio
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fastapi import Request
from ulid import ULID

from roentgen.contract import RolloutKey
from roentgen.store import SessionNotFoundError, StoreError
from roentgen.store.sessions import find_session
from roentgen.store.storage_backends import open_folder
from serve_app.http.run_addresses import PREFIX, RunAddress
from serve_app.openai_api import schemas
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.completions import CompletionRequest
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.responses.request import ResponsesRequest
from serve_app.openai_api.run_settings import RunSettings, count_choices, keyed

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

FOLDER = ".runs"


@dataclass(frozen=True)
class RegisteredRun:
    """A run that is registered in the store."""

    id: str
    """The run's id in addresses."""
    created: int
    """Time of creation, in seconds since 1970."""
    settings: RunSettings
    """Settings that all requests of the run share."""

    def record(self) -> schemas.RunRecord:
        """Return the run as a reply."""
        return {
            "id": self.id,
            "object": "run",
            "created": self.created,
            "path": f"{PREFIX}{self.id}/{{problem}}/{{epoch}}",
            "settings": self.settings.model_dump(mode="json", by_alias=True, exclude={"id"}),
        }


class RunRegistry:
    """The runs of a store. Runs are cached, because they never change."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._known: dict[str, RegisteredRun] = {}

    async def begin(self, settings: RunSettings) -> RegisteredRun:
        """Create a run, or return the existing one with the same settings.

        Raises:
            ApiError: 409, if the run exists with other settings.
        """
        run = RegisteredRun(settings.id or f"run-{str(ULID()).lower()}", int(time.time()), settings)
        known = await self.find(run.id)
        if known is None:
            await asyncio.to_thread(self._write, run)
            known = await asyncio.to_thread(self._read, run.id)  # another server may have written it first
        assert known is not None
        if _content(known) != _content(run):
            raise ApiError(
                409,
                f"id: run {run.id!r} already exists with other settings, and a run's settings cannot change; "
                "choose another id",
                param="id",
                code="run_exists",
            )
        return known

    async def find(self, run_id: str) -> RegisteredRun | None:
        """Return a run; None if it does not exist."""
        if run_id in self._known:
            return self._known[run_id]
        return await asyncio.to_thread(self._read, run_id)

    async def get(self, run_id: str) -> RegisteredRun:
        """Return a run.

        Raises:
            ApiError: 404, if it does not exist.
        """
        run = await self.find(run_id)
        if run is None:
            message = f"there is no run {run_id!r}; create it first: POST /v1/runs with its id and settings"
            raise ApiError(404, message, param="run", code="run_not_found")
        return run

    def list(self) -> list[RegisteredRun]:
        """Return all runs, ordered by id."""
        names = [entry.name for entry in open_folder(self._store).child(FOLDER).entries()]
        ids = [name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith(".")]
        return [run for run in map(self._read, ids) if run is not None]

    def _write(self, run: RegisteredRun) -> None:
        content = {"id": run.id, "created": run.created, "settings": _content(run)}
        try:
            open_folder(self._store).child(FOLDER).put(f"{run.id}.json", [json.dumps(content).encode()])
        except OSError as error:
            raise StoreError(f"run {run.id} cannot be written to {self._store}: {error}") from error

    def _read(self, run_id: str) -> RegisteredRun | None:
        if run_id in self._known:
            return self._known[run_id]
        try:
            content = json.loads(open_folder(self._store).child(FOLDER).read(f"{run_id}.json"))
            run = RegisteredRun(run_id, content["created"], RunSettings.model_validate(content["settings"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"run {run_id} of {self._store} cannot be read: {error}") from error
        return self._known.setdefault(run_id, run)


def _content(run: RegisteredRun) -> dict[str, object]:
    return run.settings.given("activations", "probes", "steering", "defaults")


class TurnNumbers(Protocol):
    """A source of turn numbers."""

    async def take(self, run_id: str, session_id: str, problem_id: str, epoch: int, count: int) -> int:
        """Reserve `count` consecutive turn numbers of a run's problem, and return the first."""


class TurnCounter:
    """Numbers the calls of every problem of every run, from 0."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._next: dict[str, dict[tuple[str, int], int]] = {}
        self._reading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def take(self, run_id: str, session_id: str, problem_id: str, epoch: int, count: int) -> int:
        """Reserve `count` consecutive turn numbers of a run's problem, and return the first."""
        async with self._reading[run_id]:
            if run_id not in self._next:
                self._next[run_id] = await asyncio.to_thread(self._stored, run_id, session_id)
        following = self._next[run_id]
        first = following.get((problem_id, epoch), 0)
        following[problem_id, epoch] = first + count
        return first

    def _stored(self, run_id: str, session_id: str) -> dict[tuple[str, int], int]:
        try:
            frame = find_session(self._store, session_id).rollouts(unique=False, columns=())
        except SessionNotFoundError:
            return {}
        frame = frame[frame["config_hash"] == run_id]
        following: dict[tuple[str, int], int] = {}
        for problem, epoch, turn in zip(frame["problem_id"], frame["epoch"], frame["turn"], strict=True):
            key = problem, int(epoch)
            following[key] = max(following.get(key, 0), int(turn) + 1)
        return following


class SharedTurnCounter:
    """Takes turn numbers from a deployment of `TurnCounter`."""

    def __init__(self, handle: "DeploymentHandle") -> None:
        self._handle = handle

    async def take(self, run_id: str, session_id: str, problem_id: str, epoch: int, count: int) -> int:
        """Reserve `count` consecutive turn numbers of a run's problem, and return the first."""
        first: int = await self._handle.take.remote(run_id, session_id, problem_id, epoch, count)
        return first


async def run_of(request: Request) -> RegisteredRun | None:
    """Return the run of a request's address; None if the address has no run.

    Raises:
        ApiError: 404, if the run does not exist.
    """
    address: RunAddress | None = getattr(request.state, "run_address", None)
    if address is None:
        return None
    book: RunRegistry = request.app.state.runs
    return await book.get(address.run_id)


async def with_identity(
    request: ChatRequest | CompletionRequest | ResponsesRequest, address: RunAddress | None, numbers: TurnNumbers
) -> ChatRequest | CompletionRequest | ResponsesRequest:
    """Return a request with the rollout key of its address and turn number, if it captures activations."""
    capture = request.capture
    if address is None or capture is None or capture.session_id is None:
        return request
    run_id, problem, epoch = address.run_id, address.problem_id, address.epoch
    turn = await numbers.take(run_id, capture.session_id, problem, epoch, count_choices(request))
    return keyed(request, RolloutKey(config_hash=run_id, problem_id=problem, epoch=epoch, turn=turn))
