"""The replicas as the ingress sees them: their common status, and the swap to another model.

The status is needed often, by `/health` and before every generation, and a busy replica may take a while to report it. So a
status is reused for a second, only one status call is in flight at a time, and no request waits for it longer than
`PATIENCE_S`.

A swap is a reconfiguration by Serve:

    POST /v1/models/load -> Replicas.swap -> app._redeploy        the same application, only another `user_config`
                                          -> Serve                restarts nothing; calls `reconfigure` on every replica
                                          -> ModelReplica.reconfigure -> ModelSlot.choose    returns at once, loads on a thread
                         <- Replicas._deploy                      polls `status` until all replicas have the model

Serve also calls `reconfigure` on replicas that it starts later. There are two rollbacks. A slot whose load fails loads its
former model again, so that the replica keeps working. If any replica fails, `swap` deploys the former choice to all of them.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import TYPE_CHECKING, Any

from roentgen.model_names import is_named
from serve_app.config import ModelChoice, ServerConfig
from serve_app.engines.protocol import Load
from serve_app.errors import RETRY_AFTER_S
from serve_app.openai_api.errors import ApiError, internal_error
from serve_app.replica.ray_errors import kind_of

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

log = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 5.0
GOOD_FOR_S = 1.0
GOOD_WHILE_LOADING_S = 0.1
"""Seconds for which a status is reused while a model loads. It is short, so that clients learn at once when the model is ready;
a loading replica has no other requests to answer."""
PATIENCE_S = 0.1
LOAD_TIMEOUT_S = 3600.0
"""A load may download a model."""

Status = dict[str, Any]

NO_REPLICA: Status = {"status": "loading", "stage": "starting a replica"}
NO_ANSWER: Status = {"status": "loading", "stage": "waiting for the replicas to answer"}


class Replicas:
    """All replicas of the model deployment."""

    def __init__(
        self, model: "DeploymentHandle", config: ServerConfig, redeploy: Callable[[ModelChoice], None]
    ) -> None:
        """Create the view of a deployment's replicas.

        Args:
            model: handle of the deployment.
            config: the server's configuration.
            redeploy: deploys the application with another choice of model; blocks until every replica is reconfigured.
        """
        self._model = model
        self._config = config
        self._redeploy = redeploy
        self._choice = config.choice
        self._swapping = asyncio.Lock()
        self._known, self._known_at = NO_ANSWER, -GOOD_FOR_S
        self._pending: asyncio.Task[Status] | None = None

    async def statuses(self) -> list[Status]:
        """Return the status of every running replica; an empty list if one of them does not answer in time."""
        try:
            return await self._ask()
        except TimeoutError:
            return []

    async def _ask(self) -> list[Status]:
        """Return the status of every running replica, without those that are just being lost.

        Raises:
            TimeoutError: if a running replica does not answer in time.
        """
        # When a client disconnects, Serve and Ray cancel the calls made in its request's context. This status is shared with
        # other requests, so the call is made in an empty context.
        answers = await asyncio.shield(asyncio.create_task(self._answers(), context=Context()))
        if answers is None:
            raise TimeoutError
        return [answer for answer in answers if isinstance(answer, dict)]

    async def _answers(self) -> list[Any] | None:
        """Return the replicas' statuses or exceptions; None if one does not answer in time."""
        try:
            calls = self._model.broadcast("status")
            answers: list[Any] = await calls.results_async(timeout_s=STATUS_TIMEOUT_S, return_exceptions=True)
        except TimeoutError:
            return None
        except Exception as error:
            if kind_of(error) != "absent":
                raise
            return []
        return answers

    async def status(self) -> Status:
        """Ask for the deployment's status: that of the replica that is furthest in loading."""
        try:
            statuses = await self._ask()
        except TimeoutError:
            found = NO_ANSWER
        else:
            ranks = ("ok", "loading", "failed")
            found = min(statuses, key=lambda status: ranks.index(status["status"]), default=NO_REPLICA)
        self._known, self._known_at = found, time.monotonic()
        return found

    async def known(self) -> Status:
        """Return a recent status of the deployment within `PATIENCE_S`."""
        good_for_s = GOOD_FOR_S if self._known["status"] == "ok" else GOOD_WHILE_LOADING_S
        if self._swapping.locked() or time.monotonic() - self._known_at > good_for_s:
            if self._pending is None or self._pending.done():
                self._pending = asyncio.create_task(self.status())
            await asyncio.wait({self._pending}, timeout=PATIENCE_S)
        return self._known

    @contextmanager
    def api_errors(self) -> Iterator[None]:
        """Convert Ray's errors of a call to a replica into API errors.

        This wraps each call, because Serve adds its own handlers for these errors to the application, which answer in plain
        text.

        Raises:
            ApiError: 429 if too many requests wait for the replicas; 503 if the replica was lost or there is none; 500 if the
                replica's code raised an error, which a retry would raise again.
            CancelledError: if the client has disconnected.
        """
        try:
            yield
        except Exception as error:
            match kind_of(error):
                case None:
                    raise
                case "busy":
                    raise ApiError(429, "the server is busy", code="busy", retry_after_s=RETRY_AFTER_S) from error
                case "cancelled":
                    raise asyncio.CancelledError from error
                case "absent" | "lost":
                    log.error("a replica was lost: %s", error)
                    self._known_at = -GOOD_FOR_S
                    raise ApiError(
                        503, "the model's replica was lost; try again", retry_after_s=RETRY_AFTER_S
                    ) from error
                case "failed":
                    log.error("a replica raised an error: %s", error)
                    raise internal_error(getattr(error, "cause", None) or error) from error

    async def check_started(self) -> None:
        """Refuse a request if no replica has been started yet.

        Raises:
            ApiError: 503.
        """
        status = await self.known()
        if status is NO_REPLICA:
            raise _unready(status)

    async def serving(self) -> Status:
        """Return the status of a replica that is ready.

        Raises:
            ApiError: 503, if none is ready.
        """
        status = await self.status()
        if status["status"] != "ok":
            raise _unready(status)
        return status

    async def loads(self) -> dict[str, Load]:
        """Return the load of each replica."""
        return {status["replica"]: status["load"] for status in await self.statuses()}

    def check_allowed(self, choice: ModelChoice) -> None:
        """Refuse a model that the server's configuration does not allow.

        Raises:
            ApiError: 403.
        """
        config = self._config
        if not is_named(choice.model_id, (config.model, *config.allowed_models)):
            allowed = "is not a model that this server may load; it lists them as allowed_models in its configuration"
            raise _forbidden("model_id", f"{choice.model_id!r} {allowed}", "model_not_allowed")
        if choice.trust_remote_code and not config.trust_remote_code:
            reason = "this server does not run code from a model's repository; its configuration would need trust_remote_code"
            raise _forbidden("trust_remote_code", reason, "remote_code_not_allowed")
        if choice.trust_remote_code and choice.revision not in (None, config.revision):
            reason = f"{choice.revision!r}: a client may not choose the revision whose code is run; leave revision out"
            raise _forbidden("revision", reason, "remote_code_not_allowed")

    async def swap(self, choice: ModelChoice) -> Status:
        """Replace the served model; returns the new status once every replica has loaded it.

        Raises:
            ApiError: if the model cannot be loaded; the replicas then serve the former model. 503 while another swap runs.
        """
        if self._swapping.locked():
            raise ApiError(503, "another model is being loaded", code="loading", retry_after_s=10)
        async with self._swapping:
            known = next((s["choice"] for s in await self.statuses() if s["choice"] is not None), None)
            former = known or self._choice
            error = await self._deploy(choice)
            if error is None:
                return await self.serving()
            log.warning("rolling back to %s", former.model_id)
            lost = await self._deploy(former)
            now = "no model is served now" if lost else f"{former.model_id} is still served"
            raise ApiError(error.status, f"{error.message}; {now}", param=error.param, code=error.code)

    async def _deploy(self, choice: ModelChoice) -> ApiError | None:
        """Deploy a choice of model to every replica and wait for them; returns the first replica's error, if any."""
        await asyncio.to_thread(self._redeploy, choice)
        self._choice = choice
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                while True:
                    statuses = await self.statuses()
                    for status in statuses:
                        refused = status["refused"]
                        if refused is not None and refused["choice"] == choice:
                            return ApiError.from_payload(refused["error"])
                    ready = [
                        s for s in statuses if s["status"] == "ok" and s["choice"] == choice and s.get("settled", True)
                    ]
                    if len(ready) >= self._config.num_replicas:
                        return None
                    await asyncio.sleep(0.1)
        except TimeoutError:
            return ApiError(500, f"{choice.model_id} was not ready after {LOAD_TIMEOUT_S:.0f} s", code="load_failed")


def _forbidden(param: str, reason: str, code: str) -> ApiError:
    return ApiError(403, f"{param}: {reason}", param=param, code=code)


def _unready(status: Status) -> ApiError:
    retry = 2 if status["status"] == "loading" else None
    return ApiError(503, f"the model is not ready: {status['stage']}", code=status["status"], retry_after_s=retry)
