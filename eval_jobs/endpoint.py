"""The evaluation's view of the server, as an OpenAI client: its addresses, whether it answers, and what it serves.

`find_model` queries the server once before anything runs, so that a wrong address, key or model name fails within seconds
instead of failing every sample. It waits for a server that is busy or still loading its model. The SDK retries requests
(429, 5xx, lost connections) and honors `Retry-After`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from httpx2 import AsyncClient, Response
from openai import (
    APIConnectionError,
    APIStatusError,
    AsyncOpenAI,
    InternalServerError,
    OpenAI,
    OpenAIError,
    RateLimitError,
    Timeout,
)

from eval_jobs import EvalError
from eval_jobs.addresses import Addresses, split
from eval_jobs.hashed_config import ServedModelInfo
from roentgen.model_names import is_named, suggest

CONNECT_TIMEOUT_S = 5.0
LIST_TIMEOUT = Timeout(30.0, connect=CONNECT_TIMEOUT_S)

MAX_RETRIES = 10
"""About a minute of backoff: a Ray cluster takes up to 54 s to notice a lost node."""


BUSY = frozenset({429, 503})


class FatalRequestError(EvalError):
    """A request failed for a reason that all problems share: the run stops, and finished work is kept."""


class UnreachableError(FatalRequestError):
    """No server answers at the address."""


@dataclass(frozen=True)
class Endpoint:
    """The server's addresses and the client's options."""

    base_url: str
    """`http://HOST:PORT/v1`; several addresses of one server are comma-separated."""
    timeout: float = 600.0
    """Timeout of a request in seconds."""
    max_retries: int = MAX_RETRIES
    """Maximum number of retries."""
    api_key: str = field(default="none", repr=False)
    """API key; never shown or written into a run."""

    @property
    def urls(self) -> tuple[str, ...]:
        """The server's addresses."""
        return split(self.base_url)

    def client(self, on_busy: Callable[[], None] | None = None) -> AsyncOpenAI:
        """Return a client for many requests; close it after use.

        Args:
            on_busy: called after each busy response, before the retry.
        """

        async def watch(response: Response) -> None:
            if on_busy is not None and response.status_code in BUSY:
                on_busy()

        timeout = Timeout(self.timeout, connect=CONNECT_TIMEOUT_S)
        return AsyncOpenAI(
            base_url=self.urls[0],
            api_key=self.api_key,
            max_retries=self.max_retries,
            timeout=timeout,
            http_client=AsyncClient(transport=Addresses(self.urls), timeout=timeout, event_hooks={"response": [watch]}),
        )


def resolve_endpoint(endpoint: Endpoint) -> Endpoint:
    """Resolve an endpoint to the path that answers: OpenAI's routes are under /v1, which users often omit.

    Raises:
        FatalRequestError: if no server answers, or it is not OpenAI-compatible.
    """
    try:
        _list_models(endpoint)
    except UnreachableError:
        raise
    except FatalRequestError as error:
        if all(url.endswith("/v1") for url in endpoint.urls):
            raise
        inside = replace(endpoint, base_url=",".join(f"{url}/v1" for url in endpoint.urls))
        try:
            _list_models(inside)
        except FatalRequestError:
            raise error from None
        return inside
    return endpoint


def find_model(endpoint: Endpoint, wanted: str | None) -> ServedModelInfo:
    """List the served models and choose one.

    Args:
        endpoint: the server.
        wanted: the model's name; None chooses the server's only model.

    Raises:
        FatalRequestError: if no server answers, it is not OpenAI-compatible, or it does not serve that model.
    """
    found = {model["id"]: model for model in _list_models(endpoint)}
    if wanted is None and len(found) != 1:
        raise FatalRequestError(f"{endpoint.base_url} serves {_names(found)}: choose one with --model")
    # Match by id, or by where the model was loaded from.
    name = next((id for id, model in found.items() if wanted is None or is_named(wanted, _called(model))), None)
    if name is None:
        raise FatalRequestError(
            f"--model: {wanted!r} is not served at {endpoint.base_url}; it serves {_names(found)}"
            f"{suggest(str(wanted), found)}"
        )
    told = ("revision", "dtype", "quantization", "num_layers", "d_model", "root")
    details = {key: found[name].get(key) for key in told}
    return ServedModelInfo(name, **details)


def server_message(error: APIStatusError) -> str:
    """Return an error's status and message, taken from OpenAI's error envelope if there is one."""
    said = error.body.get("message") if isinstance(error.body, dict) else None
    return f"{error.status_code}: {said or error.message}"


def _list_models(endpoint: Endpoint) -> list[dict[str, Any]]:
    *others, last = endpoint.urls
    for url in others:
        try:
            return _list_models_at(url, endpoint.api_key)
        except UnreachableError:
            continue
    return _list_models_at(last, endpoint.api_key)


def _list_models_at(url: str, key: str) -> list[dict[str, Any]]:
    try:
        with OpenAI(base_url=url, api_key=key, max_retries=2, timeout=LIST_TIMEOUT) as client:
            try:
                listed = client.models.list()
            except (InternalServerError, RateLimitError):  # the server is up: retry as a request of the run would
                listed = client.with_options(max_retries=MAX_RETRIES).models.list()
            models = [model.model_dump() for model in listed]
    except APIConnectionError as error:
        raise UnreachableError(
            f"no server answers at {url}: start one with 'roentgen serve' or pass --base-url"
        ) from error
    except APIStatusError as error:
        raise FatalRequestError(f"the server at {url} answers GET /models with {server_message(error)}") from error
    except (OpenAIError, ValueError, TypeError, AttributeError) as error:  # a web page or other JSON
        raise FatalRequestError(
            f"the server at {url} is not OpenAI-compatible; does the address end in /v1?"
        ) from error
    if not models or not all(isinstance(model.get("id"), str) for model in models):
        raise FatalRequestError(f"the server at {url} lists no models")
    return models


def _called(model: dict[str, Any]) -> list[str]:
    """Return a listed model's id and, if known, where it was loaded from."""
    return [model["id"], *([model["root"]] if isinstance(model.get("root"), str) else [])]


def _names(found: dict[str, Any]) -> str:
    return ", ".join(sorted(found))
