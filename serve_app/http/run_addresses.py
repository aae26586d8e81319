"""Base URLs that identify a request: `/v1/r/<run>/<problem>/<epoch>/…`, to which a client appends its route.

Every client accepts a base URL, but few can send a field that OpenAI's API does not have. `RunAddresses` removes the identity
from the path, so that the usual routes handle the request; `run_registry` uses the identity.
"""

import re
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote_to_bytes

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from roentgen.contract import MAX_INT32, canonical_hash, check_session_id
from serve_app.openai_api.errors import ApiError, refused

PREFIX = "/v1/r/"
BY_PROMPT = "-"
"""In an address: name the problem by the hash of its prompt."""
_PROMPTS = ("messages", "prompt", "input")
MAX_PROBLEM = 200
_EPOCH = re.compile(r"[1-9][0-9]{0,9}")

SERVERS: list[dict[str, Any]] = [
    {"url": "/"},
    {
        "url": PREFIX + "{run}/{problem}/{epoch}",
        "description": "Every route of /v1, for a request of a run (POST /v1/runs).",
        "variables": {
            "run": {"default": "run", "description": "The run's id."},
            "problem": {
                "default": BY_PROMPT,
                "description": f"The problem's id; {BY_PROMPT} for a hash of the prompt.",
            },
            "epoch": {"default": "1", "description": "The attempt's number, from 1."},
        },
    },
]
"""Base URLs of the routes, as OpenAPI `servers`. A route may be appended with or without `/v1`."""


@dataclass(frozen=True)
class RunAddress:
    """The identity in an address."""

    run_id: str
    """The run, whose settings apply to the request."""
    problem_id: str
    """The problem that the request attempts."""
    epoch: int
    """Number of the attempt, from 1."""


def read_address(path: str) -> tuple[RunAddress, str]:
    """Split a percent-encoded path that begins with `PREFIX` into the identity and the path of the route.

    Raises:
        ApiError: if the path is not such an address.
    """
    parts = path.removeprefix(PREFIX).split("/", 3)
    if len(parts) < 4 or not parts[3]:
        raise ApiError(404, f"{path}: the address of a run is {PREFIX}RUN/PROBLEM/EPOCH, followed by the route")
    run_id, problem, epoch = _decoded("run", parts[0]), _decoded("problem", parts[1]), parts[2]
    route = parts[3].lstrip("/")  # a base URL may end in a slash, and some clients add another
    try:
        check_session_id(run_id)
    except ValueError as error:
        raise refused("run", str(error)) from error
    if not 0 < len(problem) <= MAX_PROBLEM:
        raise refused("problem", f"it has {len(problem)} characters; allowed are 1 to {MAX_PROBLEM}")
    if not _EPOCH.fullmatch(epoch) or int(epoch) > MAX_INT32:
        raise refused("epoch", f"{epoch[:40]!r} is not an attempt's number; allowed are 1 to {MAX_INT32}")
    # Some clients append the whole route, /v1 included.
    return RunAddress(run_id, problem, int(epoch)), "/v1/" + route.removeprefix("v1/")


def _decoded(name: str, part: str) -> str:
    try:
        return unquote_to_bytes(part).decode()
    except UnicodeDecodeError as error:
        raise refused(name, f"{part[:80]!r} is not UTF-8, percent-encoded: {error.reason}") from error


def named_by_prompt(address: RunAddress, body: Any) -> RunAddress:
    """Return the address with `BY_PROMPT` replaced by a hash of the request body's prompt."""
    if address.problem_id != BY_PROMPT or not isinstance(body, dict):
        return address
    prompt = next((body[name] for name in _PROMPTS if body.get(name) is not None), None)
    return replace(address, problem_id=canonical_hash(prompt))


class RunAddresses:
    """Stores a request's `RunAddress` in its state as `run_address`, and replaces its path by the route's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        encoded = scope.get("raw_path") or scope["path"].encode()
        try:
            address, route = read_address(encoded.decode("latin-1"))
        except ApiError as error:
            scope["state"]["error_code"] = error.code
            await JSONResponse(error.body(), error.status)(scope, receive, send)
            return
        scope["state"]["run_address"] = address
        # Change the scope in place, because `RequestObserver` reads what the routes write into it.
        scope["path"], scope["raw_path"] = unquote_to_bytes(route).decode("utf-8", "replace"), route.encode("latin-1")
        await self._app(scope, receive, send)
