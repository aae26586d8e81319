"""What goes wrong between the ingress and a replica, as a client hears of it, and whose leaving hurts whom."""

import asyncio
from contextvars import ContextVar
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    OutOfDiskError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from serve_app.config import ServerConfig
from serve_app.openai_api.errors import ApiError
from serve_app.replica.fleet import Replicas

current: ContextVar[str] = ContextVar("current", default="nobody's")


def raised(cause: Exception) -> Exception:
    """Return an exception of a replica's code as it arrives through a handle."""
    return RayTaskError("generate", "a traceback", cause).as_instanceof_cause()


class Handle:
    """A deployment with one replica, which answers when it is let."""

    def __init__(self) -> None:
        self.let = asyncio.Event()
        self.asked_for: list[str] = []

    def broadcast(self, method: str) -> "Handle":
        assert method == "status"
        self.asked_for.append(current.get())
        return self

    async def results_async(self, **_: Any) -> list[Any]:
        await self.let.wait()
        return [{"status": "ok", "stage": "ready"}]


def replicas(handle: Any = None) -> Replicas:
    return Replicas(handle, ServerConfig(model="m", store="s"), lambda choice: None)


@pytest.mark.parametrize(
    ("error", "status", "code", "words"),
    [
        (raised(ZeroDivisionError("by nothing")), 500, "internal_error", "ZeroDivisionError: by nothing"),
        (raised(UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed")), 500, "internal_error", "utf-8"),
        (raised(ActorDiedError()), 500, "internal_error", "ActorDiedError"),
        (OutOfDiskError(), 500, "internal_error", "OutOfDiskError"),
        (ActorDiedError(), 503, None, "replica was lost"),
        (ActorUnavailableError("away", None), 503, None, "replica was lost"),
        (WorkerCrashedError(), 503, None, "replica was lost"),
        (ObjectLostError("00", None, ""), 503, None, "replica was lost"),
        (DeploymentUnavailableError(DeploymentID("model", "roentgen")), 503, None, "replica was lost"),
        (BackPressureError(1, 1), 429, "busy", "busy"),
    ],
)
def test_only_a_lost_replica_is_one_that_was_lost(error: Exception, status: int, code: str | None, words: str) -> None:
    with pytest.raises(ApiError) as caught, replicas().api_errors():
        raise error
    assert (caught.value.status, caught.value.code, words in caught.value.message) == (status, code, True)
    assert (caught.value.retry_after_s is None) == (status == 500)


def test_a_reason_that_is_no_text_can_be_sent_all_the_same() -> None:
    with pytest.raises(ApiError) as caught, replicas().api_errors():
        raise raised(ValueError("half \ud83d"))
    caught.value.message.encode()
    assert "half \\ud83d" in caught.value.message


@pytest.mark.parametrize("error", [TaskCancelledError(), RequestCancelledError("r"), raised(TaskCancelledError())])
def test_what_was_cancelled_because_its_client_left_is_no_error(error: Exception) -> None:
    with pytest.raises(asyncio.CancelledError), replicas().api_errors():
        raise error


async def test_a_client_that_leaves_does_not_take_the_status_with_it_that_others_wait_for() -> None:
    handle = Handle()
    asked = replicas(handle)

    async def as_request(name: str) -> str:
        current.set(name)
        return str((await asked.status())["status"])

    leaving, staying = (asyncio.create_task(as_request(name)) for name in ("leaving's", "staying's"))
    await asyncio.sleep(0.01)
    leaving.cancel()
    await asyncio.wait({leaving})
    handle.let.set()
    assert await staying == "ok"
    assert leaving.cancelled()
    # By the context Serve finds what a request has asked for, and cancels it.
    assert handle.asked_for == ["nobody's", "nobody's"]
