"""Addresses that say whose request it is: `/v1/r/<run>/<problem>/<epoch>/…`, to which a client appends its route.

Every client can be given a base URL, few can be made to send a field that OpenAI's API does not have. `RunAddresses` takes the
identity off the path, so that the routes behind it are the usual ones; what they do with it is the business of `run_registry`.
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
"""Stands for a problem whose name is the hash of its prompt."""
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
                "description": f"Whose attempt it is; {BY_PROMPT} for a hash of the prompt.",
            },
            "epoch": {"default": "1", "description": "Which attempt."},
        },
    },
]
"""Under which addresses the routes are, as OpenAPI describes it: a route may be appended whole, `/v1` included."""


@dataclass(frozen=True)
class RunAddress:
    """What an address says beside the route."""

    run_id: str
    """The run, which says what to keep."""
    problem_id: str
    """What the request is an attempt at."""
    epoch: int
    """Which attempt."""


def read_address(path: str) -> tuple[RunAddress, str]:
    """Return what a percent-encoded path that begins with `PREFIX` says, and the path of the route.

    Raises:
        ApiError: if it is no such address.
    """
    parts = path.removeprefix(PREFIX).split("/", 3)
    if len(parts) < 4 or not parts[3]:
        raise ApiError(404, f"{path}: an address of a run is {PREFIX}RUN/PROBLEM/EPOCH, then the route")
    run_id, problem, epoch = _decoded("run", parts[0]), _decoded("problem", parts[1]), parts[2]
    route = parts[3].lstrip("/")  # a base URL may end in a slash, to which some clients add another
    try:
        check_session_id(run_id)
    except ValueError as error:
        raise refused("run", str(error)) from error
    if not 0 < len(problem) <= MAX_PROBLEM:
        raise refused("problem", f"it has {len(problem)} characters; allowed are 1 to {MAX_PROBLEM}")
    if not _EPOCH.fullmatch(epoch) or int(epoch) > MAX_INT32:
        raise refused("epoch", f"{epoch[:40]!r} is not an attempt's number; allowed are 1 to {MAX_INT32}")
    # Some clients are given a server's root and append all of it.
    return RunAddress(run_id, problem, int(epoch)), "/v1/" + route.removeprefix("v1/")


def _decoded(name: str, part: str) -> str:
    try:
        return unquote_to_bytes(part).decode()
    except UnicodeDecodeError as error:
        raise refused(name, f"{part[:80]!r} is not UTF-8, percent-encoded: {error.reason}") from error


def named_by_prompt(address: RunAddress, body: Any) -> RunAddress:
    """Return an address with the name that a problem has by what a request's body asks, as it was sent."""
    if address.problem_id != BY_PROMPT or not isinstance(body, dict):
        return address
    prompt = next((body[name] for name in _PROMPTS if body.get(name) is not None), None)
    return replace(address, problem_id=canonical_hash(prompt))


class RunAddresses:
    """Leaves a request's `RunAddress` in its state, as `run_address`, and gives it the path of its route."""

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
        # In place: what the routes write into the scope is for `Observed`, too.
        scope["path"], scope["raw_path"] = unquote_to_bytes(route).decode("utf-8", "replace"), route.encode("latin-1")
        await self._app(scope, receive, send)
