"""The routes of the page: its bundle, and the questions that it asks, answered in JSON."""

import re
from collections.abc import AsyncIterator, Callable, Collection
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from roentgen.errors import RoentgenError
from roentgen.version import __version__
from roentgen.view.compare import compare_sources
from roentgen.view.encoding import encoded
from roentgen.view.errors import ViewError
from roentgen.view.export import answers_of, page_of
from roentgen.view.guard import Guard
from roentgen.view.lens import lens_grid, why_no_lens
from roentgen.view.library import Library
from roentgen.view.live import events
from roentgen.view.probe_reports import read_report
from roentgen.view.samples import one_sample
from roentgen.view.schemas import SourceList
from roentgen.view.tokens import tokens_of
from roentgen.view.values import grid_of, values_of

_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
_ASSET = re.compile(r'((?:src|href)=")(\./[^"?]+)(")')


class Asked(NamedTuple):
    """A question: what its path and its query say."""

    path: dict[str, str]
    """Parts of the path, by name."""
    query: dict[str, str]
    """Of the query, by name."""

    def text(self, name: str) -> str:
        """Return a parameter, empty if it is absent."""
        return self.query.get(name, "")

    def number(self, name: str, default: int) -> int:
        """Return a whole number.

        Raises:
            ViewError: if it is none.
        """
        given = self.query.get(name, self.path.get(name, ""))
        try:
            return int(given) if given else default
        except ValueError:
            raise ViewError(f"{name}: {given!r} is not a whole number") from None

    def stop(self) -> int | None:
        """Return `stop`, None if it is absent."""
        return self.number("stop", 0) if self.query.get("stop") else None

    def matching(self) -> dict[str, str]:
        """Return what says which samples are meant, and in which order."""
        return {name: self.text(name) for name in ("where", "sort", "q")}


class Answers:
    """Answers the page's questions; each method is a route."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def sources(self, asked: Asked) -> Any:
        """List the runs and sessions."""
        found: SourceList = {"version": __version__, "sources": self.library.describe()}
        return found

    def overview(self, asked: Asked) -> Any:
        """Describe one of them."""
        source = self.library.get(asked.path["source"])
        return source.overview(why_no_lens(source))

    def samples(self, asked: Asked) -> Any:
        """Return a window of its samples."""
        table = self.library.get(asked.path["source"]).table
        return table.page(asked.number("offset", 0), asked.number("limit", 100), **asked.matching())

    def histogram(self, asked: Asked) -> Any:
        """Count its samples over a column."""
        table = self.library.get(asked.path["source"]).table
        return table.histogram(asked.text("column"), asked.text("by"), asked.text("where"), asked.text("q"))

    def sample(self, asked: Asked) -> Any:
        """Return one sample."""
        return one_sample(self.library.get(asked.path["source"]), asked.path["sample"], **asked.matching())

    def tokens(self, asked: Asked) -> Any:
        """Return the tokens of a turn."""
        rollout = self.library.get(asked.path["source"]).rollout(asked.path["sample"], asked.number("turn", 0))
        return tokens_of(rollout.row, asked.number("start", 0), asked.stop())

    def values(self, asked: Asked) -> Any:
        """Return a number per token of a turn."""
        source = self.library.get(asked.path["source"])
        rollout = source.rollout(asked.path["sample"], asked.number("turn", 0))
        return values_of(source, rollout, asked.text("of"), asked.number("start", 0), asked.stop())

    def token(self, asked: Asked) -> Any:
        """Return a number per layer and hook point at a token."""
        source = self.library.get(asked.path["source"])
        rollout = source.rollout(asked.path["sample"], asked.number("turn", 0))
        position, of = asked.number("position", 0), asked.text("of") or "norm"
        return lens_grid(source, rollout, position) if of == "lens" else grid_of(source, rollout, position, of)

    def probes(self, asked: Asked) -> Any:
        """Return what a training of probes found."""
        for folder in self.library.get(asked.path["source"]).probe_folders():
            if folder.name == asked.path["report"]:
                return read_report(folder)
        raise ViewError(f"there is no report {asked.path['report']!r} of probes", 404)

    def compare(self, asked: Asked) -> Any:
        """Compare two runs."""
        return compare_sources(self.library.get(asked.text("a")), self.library.get(asked.text("b")))


def make_app(library: Library, tokens: Callable[[], Collection[str]], *, loopback: bool = True) -> Starlette:
    """Return the application.

    Args:
        library: what is shown.
        tokens: tokens that authorize a request; without any, every request is authorized.
        loopback: whether it is reached under a name of this machine only.
    """
    answers = Answers(library)
    one = "/api/sources/{source}"
    sample = one + "/samples/{sample}"
    routes = [
        ("/api/sources", answers.sources),
        (one, answers.overview),
        (one + "/samples", answers.samples),
        (one + "/histogram", answers.histogram),
        (sample, answers.sample),
        (sample + "/tokens", answers.tokens),
        (sample + "/values", answers.values),
        (sample + "/token/{position}", answers.token),
        (one + "/probes/{report}", answers.probes),
        ("/api/compare", answers.compare),
    ]

    async def follow(request: Request) -> Response:
        stream = events(library, request.query_params.get("source", ""), request.query_params.get("monitor", ""))
        first = await anext(stream)

        async def whole() -> AsyncIterator[bytes]:
            yield first
            async for event in stream:
                yield event

        return StreamingResponse(whole(), media_type="text/event-stream")

    async def export(request: Request) -> Response:
        view = request.query_params.get("view", "")
        if request.query_params.get("format", "html") != "html":
            raise ViewError("format: html is the only one here; the page itself draws PNG and SVG")
        page = await run_in_threadpool(lambda: page_of(view, answers_of(library, view)))
        name = re.sub("[^A-Za-z0-9]+", "-", view).strip("-") or "runs"
        headers = {"Content-Disposition": f'attachment; filename="{name}.html"'}
        return Response(page, media_type="text/html", headers=headers)

    return Starlette(
        routes=[
            *(Route(path, _answering(answer)) for path, answer in routes),
            Route("/api/events", follow),
            Route("/api/export", export),
            Route("/{path:path}", _asset),
        ],
        exception_handlers={Exception: _on_error, **dict.fromkeys((ViewError, RoentgenError, OSError), _on_error)},
        middleware=[Middleware(Guard, tokens=tokens, loopback=loopback)],
    )


def _answering(answer: Callable[[Asked], Any]) -> Callable[[Request], Any]:
    async def route(request: Request) -> Response:
        asked = Asked(request.path_params, dict(request.query_params))
        return Response(await run_in_threadpool(lambda: encoded(answer(asked))), media_type="application/json")

    return route


async def _on_error(request: Request, error: Exception) -> Response:
    match error:
        case ViewError():
            status, why = error.status, str(error)
        case RoentgenError() | OSError():
            status, why = 409, str(error)
        case _:
            status, why = 500, f"a bug, {type(error).__name__}: the terminal has its traceback"
    return Response(encoded({"error": why}), status, media_type="application/json")


async def _asset(request: Request) -> Response:
    """Send a file of the bundle; the files that the page names get the token that the page came with."""
    name = request.path_params["path"] or "index.html"
    folder = files("roentgen.view") / "static"
    file = folder / name
    # One folder without folders: no path leads out of it.
    if "/" in name or "\\" in name or name.startswith(".") or not file.is_file():
        return Response(encoded({"error": f"there is no {name!r}"}), 404, media_type="application/json")
    content = file.read_bytes()
    if name.endswith(".html") and (token := request.query_params.get("token")):
        suffix = f"?token={re.sub('[^A-Za-z0-9_.~-]', '', token)}"
        content = _ASSET.sub(rf"\1\2{suffix}\3", content.decode()).encode()
    return Response(content, media_type=_TYPES.get(PurePosixPath(name).suffix, "application/octet-stream"))
