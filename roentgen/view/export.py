"""A view as one file that needs no server: the bundle, and the answers that it would have asked for, inlined.

The page looks for its answers in the file first, so it is the same page. What is in the file is a run's overview, its samples
(as many as `MOST_SAMPLES`), its probe reports and, of a view of one sample, tokens and numbers.
"""

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from roentgen.atomic_files import atomic_write
from roentgen.errors import RoentgenError
from roentgen.runs import Run
from roentgen.version import __version__
from roentgen.view.compare import compare_sources
from roentgen.view.encoding import encoded
from roentgen.view.errors import ViewError
from roentgen.view.lens import why_no_lens
from roentgen.view.library import Library
from roentgen.view.probe_reports import read_report
from roentgen.view.samples import one_sample
from roentgen.view.sources import OpenSource
from roentgen.view.tokens import tokens_of
from roentgen.view.values import grid_of, values_of

MOST_SAMPLES = 2_000
"""A file with more transcripts is slow to open."""
MOST_BYTES = 32 << 20
"""Of transcripts in a file; one that would not fit and those behind it are left out."""
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)

Answers = dict[str, Any]


def page_of(view: str, answers: Answers) -> bytes:
    """Return a file of a view.

    Args:
        view: the hash of its address, `#/run/ID`.
        answers: by the URLs that the page asks.

    Raises:
        ViewError: if the bundle is not there.
    """
    folder = files("roentgen.view") / "static"
    try:
        page = (folder / "index.html").read_text()
    except FileNotFoundError:
        raise ViewError("the page's bundle is not built: run `make viewer`", 409) from None
    # `<` would end the script element; the others end a line for JavaScript of old.
    data = encoded({"view": view, "answers": answers}).decode()
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")

    def styled(match: re.Match[str]) -> str:
        return f"<style>{(folder / match[1]).read_text()}</style>"

    def run(match: re.Match[str]) -> str:
        script = (folder / match[1]).read_text().replace("</script", "<\\/script").replace("<!--", "<\\!--")
        return f'<script type="application/json" id="data">{data}</script>\n<script type="module">{script}</script>'

    page = re.sub(r'<link[^>]*href="\./([\w.-]+\.css)"[^>]*>', styled, page)
    scripts = re.findall(r'<script[^>]*src="\./[\w.-]+"[^>]*></script>', page)
    if len(scripts) != 1:
        raise ViewError("the page's bundle is not as expected: it has no single script", 409)
    name = re.search(r'src="\./([\w.-]+)"', scripts[0])
    assert name is not None
    # At the end of the body: an inline module runs when the page is there, but the data has to come first.
    page = page.replace(scripts[0], "")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    page = re.sub(r"(<head[^>]*>)", lambda head: head[1] + policy, page, count=1)
    end = page.rindex("</body>")
    return (page[:end] + run(name) + page[end:]).encode(errors="replace")


def write_page(path: Path, view: str, answers: Answers) -> None:
    """Write a file of a view, whole or not at all.

    Raises:
        ViewError: if the bundle is not there.
        OSError: as the disk answers.
    """
    page = page_of(view, answers)
    with atomic_write(path) as temporary:
        temporary.write_bytes(page)


def write_run(run: Run, path: Path) -> int:
    """Write a file of a run; return how many samples the run has.

    Raises:
        RoentgenError: if the run, or a report of its probes, is damaged, or the bundle is not there.
        OSError: as the disk answers.
    """
    library = Library([str(run.path)])
    (about,) = library.describe()
    view = f"#/run/{about['id']}"
    write_page(path, view, answers_of(library, view))
    return library.get(about["id"]).table.count()


def answers_of(library: Library, view: str) -> Answers:
    """Return what a view asks for.

    Args:
        library: what is shown.
        view: the hash of its address.

    Raises:
        ViewError: if it names what is not there.
        RoentgenError: if it cannot be read.
    """
    address = urlsplit(view.removeprefix("#"))
    parts = [part for part in address.path.split("/") if part]
    match parts:
        case [] | ["runs"]:
            return {"api/sources": {"version": __version__, "sources": library.describe()}}
        case ["compare", first, second]:
            one, two = library.get(first), library.get(second)
            answers: Answers = {"api/sources": _listed(one, two)}
            answers[url("compare", a=first, b=second)] = compare_sources(one, two)
            return answers
        case ["run" | "session", name, "sample", sample, *_]:
            source = library.get(name)
            return _overview(source) | dict(_one(source, sample, parse_qs(address.query)))
        case ["run" | "session", name, *_]:
            source = library.get(name)
            return _overview(source) | dict(_samples(source)) | dict(_reports(source))
    raise ViewError(f"view {view!r} is none of this page")


def url(*parts: str, **query: str | int) -> str:
    """Return the URL that the page asks, spelled as a browser does."""
    path = "/".join(["api", *(quote(part, safe="!'()*~") for part in parts)])
    return f"{path}?{urlencode(query, safe='*').replace('~', '%7E')}" if query else path


def _overview(source: OpenSource) -> Answers:
    return {"api/sources": _listed(source), url("sources", source.found.id): source.overview(why_no_lens(source))}


def _listed(*sources: OpenSource) -> Any:
    return {"version": __version__, "sources": [source.describe() for source in sources]}


def _samples(source: OpenSource) -> Iterator[tuple[str, Any]]:
    table, name = source.table, source.found.id
    rows = [row for start in range(0, MOST_SAMPLES, 500) for row in table.page(start, 500)["rows"]]
    yield url("sources", name, "samples"), {"total": table.count(), "matched": table.count(), "offset": 0, "rows": rows}
    size = 0
    for row in rows:
        answer = one_sample(source, row["sample_id"])
        size += len(encoded(answer))
        if size > MOST_BYTES:
            return
        yield url("sources", name, "samples", row["sample_id"]), answer


def _reports(source: OpenSource) -> Iterator[tuple[str, Any]]:
    for folder in source.probe_folders():
        if (folder / "results.json").exists():
            report = read_report(folder)
            yield url("sources", source.found.id, "probes", folder.name), report
            # The transcripts of those that it gets wrong, with its colors, as far as rows are there.
            chosen = [one["name"] for one in report["by_candidate"] if one["chosen"]][:1]
            for error in report["errors"][:12] if chosen else []:
                yield from _colored(source, error["sample_id"], 0, [f"probe:{folder.name}/{chosen[0]}"])


def _one(source: OpenSource, sample: str, query: dict[str, list[str]]) -> Iterator[tuple[str, Any]]:
    name = source.found.id
    answer = one_sample(source, sample)
    yield url("sources", name, "samples", sample), {**answer, "previous": None, "next": None}
    color = query.get("color", [])
    for turn in answer["rollouts"]:
        if turn["stored"]:
            yield from _colored(source, sample, turn["turn"], list(dict.fromkeys(["logprob", *color, *turn["values"]])))
            if turn["turn"] == int(query.get("turn", ["0"])[0]) and "token" in query:
                rollout = source.rollout(sample, turn["turn"])
                for of in ("norm", "probe"):
                    grid = grid_of(source, rollout, int(query["token"][0]), of)
                    yield (
                        url("sources", name, "samples", sample, "token", query["token"][0], turn=turn["turn"], of=of),
                        grid,
                    )


def _colored(source: OpenSource, sample: str, turn: int, colors: list[str]) -> Iterator[tuple[str, Any]]:
    at = ("sources", source.found.id, "samples", sample)
    try:
        rollout = source.rollout(sample, turn)
        yield url(*at, "tokens", turn=turn), tokens_of(rollout.row)
        for of in colors:
            yield url(*at, "values", turn=turn, of=of), values_of(source, rollout, of)
    except RoentgenError:  # rows that are not here: the transcript is shown without
        return
