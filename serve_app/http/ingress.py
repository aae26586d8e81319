"""The routes of the server. Each validates a request, passes it to a replica, and returns the reply.

The ingress holds no model. It validates a request's body (unknown parameters are errors), passes it to a replica through the
Serve handle, and converts the result to a JSON reply or server-sent events. For a stream it waits for the first piece before
it answers, so that an immediate failure gets an HTTP error status instead of an error inside a 200.
"""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, cast

import pandas as pd
from fastapi import APIRouter, FastAPI, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import State

from roentgen.contract import SESSION_ID_PATTERN, check_session_id
from roentgen.model_names import is_named
from roentgen.store import Session, SessionBusyError, SessionNotFoundError, SessionSummary, list_sessions
from roentgen.store.files import read_file, session_files, tar_session
from roentgen.store.sessions import delete_session, find_session, summarize_session
from roentgen.version import __version__
from serve_app.capture.structure import StructureRecord
from serve_app.config import ModelChoice, ServerConfig
from serve_app.http.event_stream import EventStream, ResponseEventStream
from serve_app.http.http_api import JsonRoute, auth_dependencies, make_api
from serve_app.http.metrics import Metrics
from serve_app.http.run_registry import RunRegistry, SharedTurnCounter, TurnCounter, TurnNumbers, with_identity
from serve_app.http.viewer import Viewer
from serve_app.openai_api import schemas
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.completions import CompletionRequest
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.labels import LabelsRequest
from serve_app.openai_api.responses import schemas as responses
from serve_app.openai_api.responses.request import ResponsesRequest
from serve_app.openai_api.run_settings import RunSettings
from serve_app.openai_api.schemas import HEALTH, complete_document, documented, raw
from serve_app.openai_api.tokenize import DetokenizeRequest, TokenizeRequest
from serve_app.replica.fleet import Replicas

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

Body = dict[str, Any]
Generation = ChatRequest | CompletionRequest | ResponsesRequest
# `_check_id` checks it, so that the error message is the same as elsewhere.
SessionInPath = Annotated[str, Path(json_schema_extra={"pattern": SESSION_ID_PATTERN})]


class Ingress:
    """The routes; `app.build` makes it a Serve deployment."""

    def __init__(
        self,
        model: "DeploymentHandle",
        config: ServerConfig,
        redeploy: Callable[[ModelChoice], None],
        numbers: "DeploymentHandle | None" = None,
    ) -> None:
        """Create the ingress of a model's replicas.

        Args:
            model: handle of the replicas.
            config: the server's configuration.
            redeploy: deploys the application with another model.
            numbers: the deployment of `TurnCounter`, if there are several ingresses.
        """
        self._model = model
        self._config = config
        self._metrics = Metrics()
        self._replicas = Replicas(model, config, redeploy)
        self._writing: Counter[str] = Counter()
        self._runs = RunRegistry(config.store)
        self._numbers: TurnNumbers = TurnCounter(config.store) if numbers is None else SharedTurnCounter(numbers)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application with all routes, which require the key except `/health`; Serve calls this once per replica."""
        api = make_api(self._config.max_body_bytes, self._metrics, self._config.cors_origins)
        api.state.runs = self._runs
        api.add_api_route("/health", self.health, methods=["GET"], **HEALTH)
        locked = APIRouter(dependencies=auth_dependencies(), route_class=JsonRoute)
        session = "/v1/activations/session/{session_id}"
        chat = documented(schemas.ChatCompletion, chunk=schemas.ChatCompletionChunk)
        completion = documented(schemas.Completion, chunk=schemas.CompletionChunk)
        routes: list[tuple[str, str, Callable[..., Any], dict[str, Any]]] = [
            ("GET", "/v1/models", self.models, documented(schemas.ModelList)),
            ("GET", "/v1/models/{model_id:path}", self.model, documented(schemas.ModelCard)),
            ("GET", "/v1/model/structure", self.structure, documented(StructureRecord)),
            ("POST", "/v1/chat/completions", self.chat, chat),
            ("POST", "/v1/completions", self.completions, completion),
            ("POST", "/v1/responses", self.responses, documented(responses.Response, events=responses.EVENTS)),
            ("POST", "/v1/runs", self.begin_run, documented(schemas.RunRecord)),
            ("GET", "/v1/runs", self.runs, documented(schemas.RunList)),
            ("GET", "/v1/runs/{run}", self.run, documented(schemas.RunRecord)),
            ("POST", "/tokenize", self.tokenize, documented(schemas.Tokens)),
            ("POST", "/detokenize", self.detokenize, documented(schemas.DetokenizedText)),
            ("GET", "/tokenizer_info", self.tokenizer_info, documented(schemas.TokenizerInfo)),
            ("GET", "/v1/activations/sessions", self.sessions, documented(schemas.SessionList)),
            ("GET", session, self.session, documented(schemas.SessionPage)),
            ("DELETE", session, self.delete_session, documented(schemas.DeletedSession)),
            ("POST", f"{session}/labels", self.add_labels, documented(schemas.AddedLabels)),
            ("GET", f"{session}/download", self.download, raw("application/x-tar", format="binary")),
            ("GET", f"{session}/files", self.files, documented(schemas.SessionFiles)),
            ("GET", f"{session}/files/{{path:path}}", self.file, raw("application/octet-stream", format="binary")),
            ("POST", "/v1/models/load", self.load_model, documented(schemas.ModelCard)),
            ("POST", "/models/load", self.load_model, {"include_in_schema": False}),
            ("GET", "/version", self.version, documented(schemas.Version)),
            ("GET", "/metrics", self.metrics, raw("text/plain")),
            ("GET", "/openapi.json", api.openapi, {"include_in_schema": False}),
        ]
        for method, path, answer, about in routes:
            locked.add_api_route(path, answer, methods=[method], **about)
        api.include_router(locked)
        api.mount("/view", Viewer([self._config.store, *self._config.view_runs]))
        complete_document(api, schemas.ChatCompletionChunk, schemas.CompletionChunk, *responses.EVENTS)
        return api

    async def health(self) -> JSONResponse:
        """Report whether the model is ready, or the stage of its start or swap; 503 until it is ready."""
        status = await self._replicas.known()
        health: schemas.Health = {"status": status["status"], "stage": status["stage"]}
        return JSONResponse(health, 200 if health["status"] == "ok" else 503)

    async def models(self) -> schemas.ModelList:
        """List the served model."""
        return {"object": "list", "data": [(await self._replicas.serving())["model"]]}

    async def model(self, model_id: str) -> schemas.ModelCard:
        """Show the served model."""
        card: schemas.ModelCard = (await self._replicas.serving())["model"]
        if not is_named(model_id, (card["id"], card["root"])):
            raise ApiError(404, f"model {model_id!r} is not served here", param="model", code="model_not_found")
        return card

    async def structure(self) -> StructureRecord:
        """Show the model's layers and hook points."""
        structure: StructureRecord = (await self._replicas.serving())["structure"]
        return structure

    async def load_model(self, body: ModelChoice) -> schemas.ModelCard:
        """Replace the served model; answers once the new model is ready, or with the reason why it cannot be loaded."""
        self._replicas.check_allowed(body)
        # A started swap runs to completion even if the client disconnects.
        status = await asyncio.shield(asyncio.create_task(self._replicas.swap(body)))
        card: schemas.ModelCard = status["model"]
        return card

    async def version(self) -> schemas.Version:
        """Show the version of Roentgen."""
        return {"version": __version__}

    async def metrics(self) -> Response:
        """Show counters, latencies and the engines' load in Prometheus format."""
        return Response(self._metrics.text(await self._replicas.loads()), media_type=CONTENT_TYPE_LATEST)

    async def chat(self, request: Request, body: ChatRequest) -> Any:
        """Generate a chat completion, whole or streamed; capture activations if requested."""
        return await self._generate(request.state, body)

    async def completions(self, request: Request, body: CompletionRequest) -> Any:
        """Complete raw prompts, whole or streamed; capture activations if requested."""
        return await self._generate(request.state, body)

    async def responses(self, request: Request, body: ResponsesRequest) -> Any:
        """Generate a response, whole or streamed; capture activations if requested."""
        return await self._generate(request.state, body)

    async def begin_run(self, body: RunSettings) -> schemas.RunRecord:
        """Create a run: named settings for requests to the run's addresses. Repeating the same request changes nothing."""
        return (await self._runs.begin(body)).record()

    def runs(self) -> schemas.RunList:
        """List the runs of the store."""
        return {"object": "list", "data": [run.record() for run in self._runs.list()]}

    async def run(
        self, run: Annotated[str, Path(json_schema_extra={"pattern": SESSION_ID_PATTERN})]
    ) -> schemas.RunRecord:
        """Show a run's settings."""
        _check_id(run, "run")
        return (await self._runs.get(run)).record()

    async def tokenize(self, body: TokenizeRequest) -> JSONResponse:
        """Count and return the tokens of a text or of a conversation."""
        await self._replicas.check_started()
        with self._replicas.api_errors():
            return _answer(await self._model.tokenize.remote(body))

    async def detokenize(self, body: DetokenizeRequest) -> JSONResponse:
        """Return the text of tokens."""
        await self._replicas.check_started()
        with self._replicas.api_errors():
            return _answer(await self._model.detokenize.remote(body))

    async def tokenizer_info(self) -> JSONResponse:
        """Describe the model's tokenizer, for clients that tokenize as the server does."""
        await self._replicas.check_started()
        with self._replicas.api_errors():
            return _answer(await self._model.tokenizer_info.remote())

    def sessions(self) -> schemas.SessionList:
        """List the sessions of the activation store."""
        return {"object": "list", "data": [_session_entry(summary) for summary in list_sessions(self._config.store)]}

    def session(
        self,
        session_id: SessionInPath,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=0, le=10_000)] = 100,
    ) -> schemas.SessionPage:
        """Show a session's summary and a page of its rollouts."""
        session = self._find(session_id)
        entry = _session_entry(summarize_session(session.folder))
        ids = session.rollouts(columns=())["rollout_id"].iloc[offset : offset + limit]
        page = session.rollouts(columns=("labels",), ids=ids).sort_values("rollout_id")
        return {**entry, "offset": offset, "items": [_entry(row) for row in page.to_dict("records")]}

    def delete_session(self, session_id: SessionInPath) -> schemas.DeletedSession:
        """Delete a session and its files; a session that is being written is refused."""
        _check_id(session_id)
        if self._writing[session_id]:
            raise ApiError(409, f"session {session_id!r} is being written", param="session_id", code="session_busy")
        try:
            freed = delete_session(self._config.store, session_id)
        except SessionNotFoundError as error:
            raise _no_session(session_id) from error
        except SessionBusyError as error:
            raise ApiError(409, str(error), param="session_id", code="session_busy") from error
        return {"id": session_id, "object": "activations.session", "deleted": True, "bytes": freed}

    def add_labels(self, session_id: SessionInPath, body: LabelsRequest) -> schemas.AddedLabels:
        """Add labels to stored rollouts, such as a harness's scores. Repeating the same request changes nothing."""
        done = self._find(session_id).add_labels(body.labels)
        return {
            "object": "activations.labels",
            "session_id": session_id,
            "changed": done.changed,
            "same": done.same,
            "unknown": list(done.unknown),
        }

    def download(self, session_id: SessionInPath) -> StreamingResponse:
        """Send a session as a tar archive of what is committed now, also while it is being written."""
        size, pieces = tar_session(self._find(session_id))
        headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{session_id}.tar"'}
        return StreamingResponse(pieces, media_type="application/x-tar", headers=headers)

    def files(self, session_id: SessionInPath) -> schemas.SessionFiles:
        """List a session's committed files, which `roentgen sessions pull` fetches one by one."""
        files = session_files(self._find(session_id))
        return {"object": "list", "data": [{"name": file.name, "size": file.size} for file in files]}

    def file(self, session_id: SessionInPath, path: str) -> StreamingResponse:
        """Send one of a session's files."""
        session = self._find(session_id)
        try:
            size, pieces = read_file(session, path)
        except FileNotFoundError as error:
            message = f"session {session_id!r} has no file {path!r}"
            raise ApiError(404, message, param="path", code="file_not_found") from error
        return StreamingResponse(
            map(bytes, pieces), media_type="application/octet-stream", headers={"Content-Length": str(size)}
        )

    def _find(self, session_id: str) -> Session:
        _check_id(session_id)
        try:
            return find_session(self._config.store, session_id)
        except SessionNotFoundError as error:
            raise _no_session(session_id) from error

    async def _generate(self, state: State, body: Generation) -> Any:
        await self._replicas.check_started()
        body = await with_identity(body, getattr(state, "run_address", None), self._numbers)
        if body.stream:
            return await self._stream(state, body)
        with self._session_in_use(body), self._replicas.api_errors():
            response = self._model.generate.remote(body, state.request_id)
            try:
                result = await response
            except asyncio.CancelledError:
                response.cancel()  # the client disconnected: free its slot in the batch
                raise
        state.stats = result.get("stats")
        if "error" in result:
            raise _named(body, result["error"])
        return JSONResponse(result["reply"])

    async def _stream(self, state: State, body: Generation) -> StreamingResponse:
        pieces = self._model.options(stream=True).generate_stream.remote(body, state.request_id)
        with self._replicas.api_errors():
            try:
                first = await anext(pieces)
            except asyncio.CancelledError:
                pieces.cancel()  # the client disconnected before the first piece
                raise
        if first and first[0].keys() == {"error"}:
            raise _named(body, first[0]["error"])
        written = ResponseEventStream(state, body) if isinstance(body, ResponsesRequest) else EventStream(state)

        async def events() -> AsyncIterator[str]:
            try:
                with self._session_in_use(body), self._replicas.api_errors():
                    yield written.write(first)
                    async for chunks in pieces:
                        yield written.write(chunks)
            except ApiError as error:  # the status is already sent, so the error goes into the stream
                yield written.fail(error)
            finally:
                pieces.cancel()
            yield written.end

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @contextmanager
    def _session_in_use(self, body: Generation) -> Iterator[None]:
        """Count a request that writes a session, so that the session is not deleted meanwhile."""
        session_id = body.capture.session_id if body.capture else None
        if session_id is None:
            yield
            return
        self._writing[session_id] += 1
        try:
            yield
        finally:
            self._writing[session_id] -= 1


def _check_id(value: str, param: str = "session_id") -> None:
    try:
        check_session_id(value)
    except ValueError as error:
        raise ApiError(400, str(error), param=param) from error


def _no_session(session_id: str) -> ApiError:
    return ApiError(404, f"there is no session {session_id!r}", param="session_id", code="session_not_found")


def _session_entry(summary: SessionSummary) -> schemas.SessionEntry:
    return cast(schemas.SessionEntry, asdict(summary))


_ENTRY = ("rollout_id", "problem_id", "epoch", "turn", "shard", "row_start", "row_stop")


def _entry(row: dict[Any, Any]) -> schemas.RolloutEntry:
    """Format a rollout of a session's page; labels keep the numbers that were sent, which pandas would round."""
    entry = {name: None if pd.isna(row[name]) else row[name] for name in _ENTRY}
    # pandas has no integers in a column with gaps.
    numbers = {name: int(row[name]) for name in ("epoch", "turn") if entry[name] is not None}
    # An older store may hold NaN and Infinity, which JSON does not have.
    labels = {key: None if _is_odd(value) else value for key, value in row["labels"].items()}
    return cast(schemas.RolloutEntry, {**entry, **numbers, "labels": labels})


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _answer(result: Body) -> JSONResponse:
    if "error" in result:
        raise ApiError.from_payload(result["error"])
    return JSONResponse(result["reply"])


def _named(body: Generation, payload: Body) -> ApiError:
    """Return an error whose parameter has the name of the request's route."""
    error = ApiError.from_payload(payload)
    return body.renamed(error) if isinstance(body, ResponsesRequest) else error
