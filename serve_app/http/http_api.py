"""The FastAPI application that all routes share: error envelope, API key, strict JSON bodies, and `middleware`.

FastAPI's own errors (an unknown route, an invalid body) get OpenAI's envelope too. Invalid bodies get 400 instead of 422,
because OpenAI's clients expect 400. Browser pages may call the server only from the configured origins; none by default.
"""

import hmac
import logging
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, Request, Response, Security, params
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match
from starlette.types import Scope

from roentgen.api_keys import api_keys
from roentgen.store import StoreError
from roentgen.strict_json import JsonError, read_json
from roentgen.version import __version__
from serve_app.http.metrics import Metrics
from serve_app.http.middleware import BodyLimit, HeadAsGet, LoopbackOnly, RequestObserver
from serve_app.http.run_addresses import SERVERS, RunAddresses, named_by_prompt
from serve_app.http.run_registry import run_of
from serve_app.openai_api.errors import ApiError, from_json, from_validation
from serve_app.openai_api.run_settings import with_settings

log = logging.getLogger(__name__)


def check_key(request: Request) -> None:
    """Refuse a request without a valid key.

    Raises:
        ApiError: 401.
    """
    keys = api_keys()
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Compare every key in constant time, so that timing reveals nothing; as bytes, because a header need not be UTF-8.
    matches = [hmac.compare_digest(given.strip().encode("latin-1"), key.encode()) for key in keys]
    if keys and not (scheme.lower() == "bearer" and any(matches)):
        raise ApiError(401, "no valid API key; send it as 'Authorization: Bearer KEY'", code="invalid_api_key")


def auth_dependencies() -> list[params.Depends]:
    """Return the dependencies of every route but `/health`: checks of the API key and of the run, and the key's description."""
    described = [Security(HTTPBearer(auto_error=False, scheme_name="key"))] if api_keys() else []
    return [Depends(check_key), Depends(_known_run), *described]


def _methods(api: FastAPI, scope: Scope) -> list[str]:
    """Return the methods of a path, over all routes; a single route knows only its own."""
    candidates = [{**scope, "method": method} for method in ("DELETE", "GET", "PATCH", "POST", "PUT")]
    found = [one["method"] for one in candidates if any(route.matches(one)[0] is Match.FULL for route in api.routes)]
    return sorted([*found, *(["HEAD"] if "GET" in found else [])])


class _JsonRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = read_json(await self.body())
            if (address := getattr(self.state, "run_address", None)) is not None:
                check_key(self)  # before the run is looked up, so that only clients with a key learn which runs exist
                run = await run_of(self)
                self.state.run_address = named_by_prompt(address, body)
                body = body if run is None else with_settings(body, run.id, run.settings)
            self._json = body
        return self._json


async def _known_run(request: Request) -> None:
    """Refuse a request to the address of an unknown run, also on routes that do not use the run."""
    await run_of(request)


class JsonRoute(APIRoute):
    """A route that parses its body strictly (`roentgen.strict_json`)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler whose request parses JSON strictly."""
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return checked


def make_api(max_body_bytes: int, metrics: Metrics, cors_origins: Sequence[str] = ()) -> FastAPI:
    """Return an application without routes, which formats every error in OpenAI's envelope.

    Args:
        max_body_bytes: maximum size of a request body; larger ones get 413.
        metrics: counts every request.
        cors_origins: origins whose pages may call the server from a browser; `*` for all.
    """
    # `Ingress` adds /openapi.json as a route that requires the key.
    api = FastAPI(title="Roentgen", version=__version__, openapi_url=None, servers=SERVERS)
    api.router.route_class = JsonRoute
    api.add_middleware(RunAddresses)
    api.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    if not api_keys():
        api.add_middleware(LoopbackOnly)
    api.add_middleware(HeadAsGet)
    if cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],  # Authorization, and the headers of OpenAI's SDK
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    api.add_middleware(RequestObserver, metrics=metrics)

    @api.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        request.state.error_code = error.code
        return JSONResponse(error.body(), error.status, error.headers())

    @api.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await on_api_error(request, from_validation(list(error.errors())))

    @api.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        match error.__cause__:  # FastAPI wraps exceptions raised while it reads a body
            case JsonError() as cause:
                return await on_api_error(request, from_json(cause))
            case ApiError() as cause:
                return await on_api_error(request, cause)
            case StoreError() as cause:
                return await on_store(request, cause)
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(_methods(api, request.scope))
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, headers)

    @api.exception_handler(StoreError)
    async def on_store(request: Request, error: StoreError) -> JSONResponse:
        log.error("%s", error)  # it contains paths, which clients must not see
        return await on_api_error(request, ApiError(500, "the session cannot be read", code="store_failed"))

    @api.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        return await on_api_error(
            request, ApiError(500, f"internal error: {type(error).__name__}", code="internal_error")
        )

    return api
