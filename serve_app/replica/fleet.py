"""The model's replicas, as the ingress deals with them as a whole: how they are, and which model they all serve.

How they are is asked often, by `/health` and before every generation, and a replica that computes may take a while to say. So
an answer is good for a second, one question at a time is on its way, and nobody waits for it longer than a moment.

Swapping the model is Serve's own reconfiguration: the application is deployed again with another `user_config` and everything
else unchanged, so Serve restarts nothing and calls every replica's `reconfigure`, also that of a replica it starts later. A
replica answers that at once and swaps on a thread; here it is waited for that all have. If one cannot, all go back.
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
a replica that loads has no other requests to answer."""
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
        """Know the replicas.

        Args:
            model: the deployment.
            config: the server's configuration.
            redeploy: deploys the application with another choice of model; blocks until Serve has told every replica.
        """
        self._model = model
        self._config = config
        self._redeploy = redeploy
        self._choice = config.choice
        self._swapping = asyncio.Lock()
        self._known, self._known_at = NO_ANSWER, -GOOD_FOR_S
        self._asking: asyncio.Task[Status] | None = None

    async def statuses(self) -> list[Status]:
        """Ask every replica that runs; none if one of them takes too long."""
        try:
            return await self._ask()
        except TimeoutError:
            return []

    async def _ask(self) -> list[Status]:
        """Ask every replica that runs; one that is just being lost does not answer.

        Raises:
            TimeoutError: if another does not either.
        """
        # Serve and Ray cancel what a request has asked for when its client leaves, and find it by the context. This answer is
        # kept for other requests, so it is asked for outside of any request.
        answers = await asyncio.shield(asyncio.create_task(self._answers(), context=Context()))
        if answers is None:
            raise TimeoutError
        return [answer for answer in answers if isinstance(answer, dict)]

    async def _answers(self) -> list[Any] | None:
        """Return what the replicas say, or their failures; None if one takes too long."""
        try:
            asked = self._model.broadcast("status")
            answers: list[Any] = await asked.results_async(timeout_s=STATUS_TIMEOUT_S, return_exceptions=True)
        except TimeoutError:
            return None
        except Exception as error:
            if kind_of(error) != "absent":
                raise
            return []
        return answers

    async def status(self) -> Status:
        """Ask how the deployment is: as the replica that is furthest."""
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
        """Say how the deployment is or has just been, at once or nearly so."""
        good_for_s = GOOD_FOR_S if self._known["status"] == "ok" else GOOD_WHILE_LOADING_S
        if self._swapping.locked() or time.monotonic() - self._known_at > good_for_s:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self.status())
            await asyncio.wait({self._asking}, timeout=PATIENCE_S)
        return self._known

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Spell what goes wrong between here and a replica for a client.

        It has to be done where a replica is asked: Serve puts handlers of its own for these errors into the application, which
        answer in plain text.

        Raises:
            ApiError: 429 if too many requests wait for the replicas, 503 if one has been lost or there is none, 500 if the
                replica's code has failed: that one answers, and would fail again.
            CancelledError: if the client has left.
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
                    log.error("a replica failed: %s", error)
                    self._known_at = -GOOD_FOR_S
                    raise ApiError(
                        503, "the model's replica was lost; try again", retry_after_s=RETRY_AFTER_S
                    ) from error
                case "failed":
                    log.error("a replica's code has failed: %s", error)
                    raise internal_error(getattr(error, "cause", None) or error) from error

    async def check_there(self) -> None:
        """Refuse a request that would have to wait until a replica has been started.

        Raises:
            ApiError: 503.
        """
        status = await self.known()
        if status is NO_REPLICA:
            raise _unready(status)

    async def serving(self) -> Status:
        """Return the status of a replica that serves.

        Raises:
            ApiError: 503, if none does.
        """
        status = await self.status()
        if status["status"] != "ok":
            raise _unready(status)
        return status

    async def loads(self) -> dict[str, Load]:
        """Return what each replica has to do."""
        return {status["replica"]: status["load"] for status in await self.statuses()}

    def check_allowed(self, choice: ModelChoice) -> None:
        """Refuse a model that the server's configuration does not allow.

        Raises:
            ApiError: 403.
        """
        config = self._config
        if not is_named(choice.model_id, (config.model, *config.allowed_models)):
            allowed = "is not among the models that this server may load (allowed_models in its configuration)"
            raise _forbidden("model_id", f"{choice.model_id!r} {allowed}", "model_not_allowed")
        if choice.trust_remote_code and not config.trust_remote_code:
            reason = "this server does not run code that comes with a model (trust_remote_code in its configuration)"
            raise _forbidden("trust_remote_code", reason, "remote_code_not_allowed")
        if choice.trust_remote_code and choice.revision not in (None, config.revision):
            reason = f"code is not run from {choice.revision!r}, which the client chose; leave it out"
            raise _forbidden("revision", reason, "remote_code_not_allowed")

    async def swap(self, choice: ModelChoice) -> Status:
        """Serve another model in place of the one that is served; returns the new status when every replica has it.

        Raises:
            ApiError: why it could not be loaded; the replicas then serve what they had. 503 while another swap runs.
        """
        if self._swapping.locked():
            raise ApiError(503, "another model is being loaded", code="loading", retry_after_s=10)
        async with self._swapping:
            known = next((s["choice"] for s in await self.statuses() if s["choice"] is not None), None)
            former = known or self._choice
            error = await self._deploy(choice)
            if error is None:
                return await self.serving()
            log.warning("going back to %s", former.model_id)
            lost = await self._deploy(former)
            now = "no model is served" if lost else f"{former.model_id} is served as before"
            raise ApiError(error.status, f"{error.message}; {now}", param=error.param, code=error.code)

    async def _deploy(self, choice: ModelChoice) -> ApiError | None:
        """Have every replica serve a model; returns why the first that cannot cannot."""
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
