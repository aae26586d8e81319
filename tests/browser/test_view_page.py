"""The page of `roentgen view` as a reader meets it, over a real run: what it shows, how it is steered, how it looks.

With `ROENTGEN_PICTURES` set to a folder, each view that is checked for its looks is also written there as a picture.
"""

import json
import os
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest

import roentgen
from eval_jobs.rescoring import rescore
from roentgen.runs import Run, create_run, recording
from roentgen.view.serving import viewing
from tests.browser.chromium import Browser
from tests.browser.looks import check_looks

PICTURES = os.environ.get("ROENTGEN_PICTURES")
TOKENS = "[...document.querySelectorAll('.flow .t')]"

Answer = Callable[..., Any]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has activations and probes, and with the same run as another extractor reads it."""
    folder = tmp_path_factory.mktemp("view") / "results"
    capture = {"layers": [4, 16, 28], "hook_points": ["resid_post", "attn_out"]}
    roentgen.evaluate(
        "arithmetic", samples=24, parallel=24, max_tokens=40, model=roentgen.load("smollm2-135m"), capture=capture,
        output=str(folder / "first"), store=str(folder.parent / "activations"),
    )  # fmt: skip
    roentgen.probes.train(str(folder / "first"), label="correct")
    shutil.copytree(folder / "first", folder / "second")
    rescore(Run(folder / "second"), "answer_line")
    return folder


@pytest.fixture(scope="module")
def page(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL that `roentgen view` prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROENTGEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        with viewing([str(results), str(results.parent / "activations")]) as url:
            yield url


@pytest.fixture(scope="module")
def answer(page: str) -> Answer:
    """Ask the server what the page asks."""

    def ask(path: str, **query: str | int) -> Any:
        place, token = urlsplit(page), urlsplit(page).query
        with urllib.request.urlopen(f"{place.scheme}://{place.netloc}/api/{path}?{urlencode(query)}&{token}") as reply:
            return json.load(reply)

    return ask


@pytest.fixture(scope="module")
def ids(answer: Answer) -> dict[str, str]:
    """The ids of the sources, by name."""
    return {source["name"]: source["id"] for source in answer("sources")["sources"]}


@pytest.fixture(scope="module")
def first(answer: Answer, ids: dict[str, str]) -> list[dict[str, Any]]:
    """The first run's samples."""
    return answer(f"sources/{ids['first']}/samples", limit=100)["rows"]


def check_quiet(browser: Browser, page: str) -> None:
    """Check that the page complained of nothing, and asked nobody but its own server."""
    assert browser.complaints == []
    own = "{0.scheme}://{0.netloc}/".format(urlsplit(page))
    assert [url for url in browser.requests if not url.startswith((own, "data:", "blob:", "about:"))] == []


@pytest.mark.rotating
class TestEveryView:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    async def test_at_any_width_and_in_either_color_scheme(
        self, browser: Browser, page: str, ids: dict[str, str], first: list[dict[str, Any]], scheme: str
    ) -> None:
        run, sample = f"#/run/{ids['first']}", f"#/run/{ids['first']}/sample/{first[0]['sample_id']}"
        session = next(one for name, one in ids.items() if name not in ("first", "second"))
        token = "document.querySelector('.inspector .x-cell') && document.querySelector('.t.chosen')"
        views = {
            "sources": ("#/", "document.querySelectorAll('.list tbody tr').length === 3"),
            "run": (run, "document.querySelector('.x-column')"),
            "samples": (f"{run}/samples", "document.querySelectorAll('.row .verdict').length > 5"),
            "conversation": (sample, "document.querySelector('.message.assistant .text')"),
            "tokens": (f"{sample}?token=20", token),
            "compare": (f"#/compare/{ids['first']}/{ids['second']}", "document.querySelector('td.question')"),
            "probes": (f"{run}/probes", "document.querySelectorAll('.x-line').length >= 2"),
            "session": (f"#/session/{session}", "document.querySelector('.x-column')"),
        }  # fmt: skip
        for width in (390, 1280):
            await browser.show_as(width, scheme)
            for name, (hash_, there) in views.items():
                await browser.open(page + hash_)
                await browser.wait_for(f"!!({there})")
                if PICTURES:
                    Path(PICTURES, f"view_{name}_{width}_{scheme}.png").write_bytes(await browser.picture())
                await check_looks(browser)
                assert await browser.ask("document.querySelectorAll('h1').length") == 1, name
                unnamed = "[...document.querySelectorAll('button,a,input,select')].filter(e => e.checkVisibility() && "
                unnamed += "!(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"
                assert await browser.ask(unnamed) == [], name
        check_quiet(browser, page)


async def test_runs_are_listed_with_their_numbers_and_lead_on(
    browser: Browser, page: str, answer: Answer, ids: dict[str, str]
) -> None:
    await browser.open(page)
    await browser.wait_for("document.querySelectorAll('.list tbody tr').length === 3")
    source = next(one for one in answer("sources")["sources"] if one["name"] == "first")
    row = "[...document.querySelectorAll('.list tbody tr')].find(r => r.innerText.includes('first'))"
    assert f"{100 * source['accuracy']['value']:.1f}%" in await browser.ask(f"{row}.innerText")
    # Two that are marked are compared.
    for name in ("first", "second"):
        await browser.ask(f"document.querySelector('[aria-label=\"Mark {name} to compare\"]').click()")
    await browser.wait_for("!document.querySelector('.controls .end').disabled")
    await browser.ask("document.querySelector('.controls .end').click()")
    await browser.wait_for("location.hash.startsWith('#/compare/')")
    compared = answer("compare", a=ids["first"], b=ids["second"])
    assert compared["changed"]
    await browser.wait_for("document.querySelector('td.question')")
    shown = "[...document.querySelectorAll('.card table tbody')].at(-1).rows.length"
    assert await browser.ask(shown) == len(compared["changed"])
    points = await browser.ask("document.querySelector('.lead b').innerText")
    assert points == f"{100 * compared['difference']['value']:.1f} points".replace("-", "\u2212")
    check_quiet(browser, page)


async def test_an_overview_says_what_the_summary_does_and_leads_to_the_samples(
    browser: Browser, page: str, results: Path, ids: dict[str, str]
) -> None:
    summary = json.loads((results / "first" / "summary.json").read_text())
    await browser.open(f"{page}#/run/{ids['first']}")
    await browser.wait_for("document.querySelector('.x-column')")
    assert (
        await browser.ask("document.querySelector('.lead b').innerText") == f"{100 * summary['accuracy']['value']:.1f}%"
    )
    rows = await browser.ask(
        "[...document.querySelector('.columns table').tBodies[0].rows].map(r => [...r.cells].map(c => c.innerText))"
    )
    for cells, (name, numbers) in zip(rows, summary["extractors"].items(), strict=True):
        assert cells[0].split()[0] == name
        assert cells[1] == f"{100 * numbers['value']:.1f}%"
        assert cells[-2:] == [str(numbers["unparsable"]), str(numbers["differs_from_primary"])]
    # All samples are in the histogram.
    await browser.ask("document.querySelector('.numbers summary').click()")
    counts = "[...document.querySelectorAll('.numbers td')].filter((_, i, all) => i % (all[0].parentElement.cells.length) > 1)"
    assert sum(map(int, await browser.ask(f"{counts}.map(c => c.innerText)"))) == summary["samples"]
    await browser.click("[...document.querySelectorAll('a.stat')].find(a => a.innerText.includes('token limit'))")
    await browser.wait_for("location.hash.endsWith('/samples?finish_reason=length')")
    await browser.wait_for(f"document.querySelector('.controls').innerText.includes('{summary['truncated']} of ')")
    check_quiet(browser, page)


async def test_samples_are_filtered_sorted_and_kept_in_the_hash(
    browser: Browser, page: str, ids: dict[str, str], first: list[dict[str, Any]]
) -> None:
    def having(**wanted: object) -> list[str]:
        return [row["sample_id"] for row in first if all(row[name] == value for name, value in wanted.items())]

    table = f"#/run/{ids['first']}/samples"
    shown = "[...document.querySelectorAll('.row a')].map(a => a.innerText)"
    await browser.open(page + table)
    await browser.wait_for(f"{shown}.length === {len(first)}")
    await browser.click("[...document.querySelectorAll('.choice button')].find(b => b.innerText === 'wrong')")
    await browser.wait_for("location.hash.endsWith('samples?verdict=wrong')")
    await browser.wait_for(f"{shown}.length === {len(having(verdict='wrong'))}")
    assert await browser.ask(shown) == having(verdict="wrong")

    # A click on a column's name sorts upward, the next one downward.
    head = "[...document.querySelectorAll('.gridhead button')].find(b => b.innerText.startsWith('tokens'))"
    await browser.click(head)
    await browser.click(head)
    await browser.wait_for("location.hash.includes('sort=-completion_tokens')")
    most = max(row["completion_tokens"] for row in first if row["verdict"] == "wrong")
    place = "[...document.querySelectorAll('.gridhead > span')].findIndex(s => s.ariaSort === 'descending')"
    await browser.wait_for(f"document.querySelector('.row').children[{place}].innerText === '{most}'")

    # The hash is the filter: opened anew it shows the same; back takes the reader to where he was.
    hash_ = await browser.ask("location.hash")
    before = await browser.ask(shown)
    await browser.open(page + hash_)
    await browser.wait_for(f"{shown}.length === {len(before)}")
    assert await browser.ask(shown) == before
    await browser.press("j", "j", "Enter")
    await browser.wait_for(f"location.hash.includes('/sample/{before[1]}?')")
    await browser.wait_for("document.querySelector('a.step')")
    await browser.press("j")
    await browser.wait_for(f"location.hash.includes('/sample/{before[2]}?')")
    await browser.wait_for(f"document.querySelector('h1')?.innerText === '{before[2]}'")
    await browser.press("u")
    await browser.wait_for(f"{shown}.length === {len(before)}")

    # A search looks into the texts.
    one = first[0]
    await browser.open(page + table)
    await browser.wait_for(f"{shown}.length === {len(first)}")
    await browser.press("/")
    assert await browser.ask("document.activeElement.type") == "search"
    await browser.do("Input.insertText", text=one["question"])
    await browser.wait_for(f"{shown}.length === 1 && {shown}[0] === '{one['sample_id']}'")
    assert await browser.ask("new URLSearchParams(location.hash.split('?')[1]).get('q')") == one["question"]
    check_quiet(browser, page)


async def test_tokens_have_the_colors_of_their_values_and_open_on_a_click(
    browser: Browser, page: str, answer: Answer, ids: dict[str, str], first: list[dict[str, Any]]
) -> None:
    sample = next(row["sample_id"] for row in first if row["verdict"] == "correct")
    place = f"sources/{ids['first']}/samples/{sample}"
    tokens = answer(f"{place}/tokens", turn=0)
    probe = "probe:correct/layers.16.resid_post@last_prompt"
    values = answer(f"{place}/values", turn=0, of=probe)["values"]
    await browser.open(f"{page}#/run/{ids['first']}/sample/{sample}?show=tokens&color={quote(probe)}")
    await browser.wait_for(f"{TOKENS}.length === {tokens['total']}")
    await browser.wait_for(f"{TOKENS}.some(t => t.style.backgroundColor)")
    # Orange below zero, blue above, nothing where there is no value.
    colors = await browser.ask(f"{TOKENS}.map(t => t.style.backgroundColor.match(/[\\d.]+/g)?.map(Number) ?? null)")
    for value, color in zip(values, colors, strict=True):
        assert (value is None) is (color is None)
        if value is not None and abs(value) > 0.01:
            assert (color[2] > color[0]) is (value > 0)

    # White space is seen, and what is shown is the text.
    texts = await browser.ask(f"{TOKENS}.map(t => t.textContent)")
    for text, shown in zip(tokens["texts"], texts, strict=True):
        assert shown.replace("·", " ").replace("↵\n", "\n") == text

    await browser.click(f"{TOKENS}[30]")
    await browser.wait_for("location.hash.includes('token=30')")
    cells = "[...document.querySelectorAll('.inspector tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    rows = await browser.wait_for(f"(r => r.length === 3 && r)({cells})")
    grid = answer(f"{place}/token/30", turn=0, of="norm")
    assert [row[0] for row in rows] == [str(layer) for layer in reversed(grid["layers"])]
    for row, norms in zip(rows, reversed(grid["values"]), strict=True):
        assert [float(cell) for cell in row[1:]] == pytest.approx(norms, rel=0.01)
    # From one token to the next by the keyboard; Escape closes.
    await browser.press("]")
    await browser.wait_for(
        "location.hash.includes('token=31') && document.querySelector('.t.chosen').dataset.at === '31'"
    )
    await browser.press("Escape")
    await browser.wait_for("!document.querySelector('.inspector')")

    # The strip has the same tokens: a click in the middle of one chooses it.
    await browser.ask(
        "(c => c.dispatchEvent(new MouseEvent('click', {bubbles: true,"
        f" clientX: c.getBoundingClientRect().left + c.getBoundingClientRect().width * 40.5 / {tokens['total']}}})))"
        "(document.querySelector('.stripcanvas'))"
    )
    await browser.wait_for("location.hash.includes('token=40')")
    for of in ("logprob", "norm:layers.28.attn_out", "none"):
        await browser.ask(
            f"(s => {{ s.value = '{of}'; s.dispatchEvent(new Event('change', {{bubbles: true}})); }})"
            "(document.querySelector('.tokenbar select'))"
        )
        await browser.wait_for(f"new URLSearchParams(location.hash.split('?')[1]).get('color') === '{of}'")
        colored = f"{TOKENS}.filter(t => t.style.backgroundColor).length"
        await browser.wait_for(f"{colored} {'=== 0' if of == 'none' else '> 0'}")
    check_quiet(browser, page)


async def test_what_the_extractors_read_is_marked(
    browser: Browser, page: str, answer: Answer, ids: dict[str, str], first: list[dict[str, Any]]
) -> None:
    sample = next(row["sample_id"] for row in first if row["verdict"] == "correct")
    one = answer(f"sources/{ids['first']}/samples/{sample}")
    placed = [reading for reading in one["sample"]["extracted"] if reading["start"] is not None]
    assert placed
    await browser.open(f"{page}#/run/{ids['first']}/sample/{sample}")
    await browser.wait_for("document.querySelector('mark')")
    marked = await browser.ask("[...document.querySelectorAll('mark')].map(m => [m.title, m.firstChild.textContent])")
    for reading in placed:
        text = one["sample"]["response"][reading["start"] : reading["stop"]]
        assert (
            "".join(
                part for title, part in marked if reading["extractor"] in title.removeprefix("read by ").split(", ")
            )
            == text
        )
    rows = await browser.ask("[...document.querySelectorAll('.beside tbody tr')].map(r => r.innerText)")
    assert len(rows) == len(one["sample"]["answers"])
    # The code that reads its rows runs.
    code = await browser.ask("document.querySelector('.beside .code').textContent")
    assert code == one["python"]
    exec(compile(code, "python", "exec"), {})
    check_quiet(browser, page)


async def test_probes_are_drawn_and_their_errors_lead_to_samples(
    browser: Browser, page: str, answer: Answer, ids: dict[str, str]
) -> None:
    report = answer(f"sources/{ids['first']}/probes/correct")
    await browser.open(f"{page}#/run/{ids['first']}/probes")
    await browser.wait_for("document.querySelectorAll('.figure').length > 2")
    titles = await browser.ask("[...document.querySelectorAll('.figure h3')].map(h => h.innerText)")
    assert titles[0] == "AUROC by layer"
    assert {"Scores by class", "Reliability", "Risk and coverage", "Along the trace"} <= set(titles)
    assert await browser.ask("document.querySelectorAll('.figure svg .x-line').length") >= 4
    # Each candidate is a row of the first chart's numbers, and of the table.
    await browser.ask("document.querySelector('.numbers summary').click()")
    rows = await browser.ask("document.querySelector('.numbers table').tBodies[0].rows.length")
    assert rows == len(report["by_candidate"]) == 6
    # Pointing shows the values there.
    await browser.point_at("document.querySelector('.figure .x-line')")
    tip = await browser.wait_for("document.querySelector('.tip')?.innerText")
    assert "layer" in tip
    assert "resid_post" in tip
    if report["errors"]:
        link = "document.querySelector('a[href*=\"/sample/\"]')"
        assert await browser.ask(f"{link}.innerText") == report["errors"][0]["sample_id"]
        await browser.ask(f"{link}.click()")
        await browser.wait_for("document.querySelector('.flow .t')")
    check_quiet(browser, page)


async def test_a_chart_becomes_a_picture_of_its_own(browser: Browser, page: str, ids: dict[str, str]) -> None:
    await browser.open(f"{page}#/run/{ids['first']}")
    await browser.wait_for("document.querySelector('.x-column')")
    await browser.ask("""
        window.saved = [];
        URL.createObjectURL = blob => { saved.push(blob); return 'about:blank'; };
        HTMLAnchorElement.prototype.click = function () { saved.push(this.download); };
        document.querySelectorAll('.files button').forEach(button => button.click()); 1
    """)
    await browser.wait_for("window.saved.length === 4")
    names = await browser.ask("saved.filter(one => typeof one === 'string')")
    assert sorted(names) == ["lengths-of-the-answers.png", "lengths-of-the-answers.svg"]
    svg = await browser.ask("saved.find(one => one.type === 'image/svg+xml').text()")
    assert svg.startswith("<svg")
    assert "rgb(" in svg
    assert "var(" not in svg
    assert await browser.ask("saved.find(one => one.type === 'image/png').size") > 5000
    check_quiet(browser, page)


async def test_keys_theme_and_help(browser: Browser, page: str, ids: dict[str, str]) -> None:
    await browser.show_as(1280, "light")
    await browser.open(f"{page}#/run/{ids['first']}")
    await browser.wait_for("document.querySelector('h1')")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = await browser.ask(ground)
    await browser.press("d")
    assert await browser.wait_for(f"{ground} !== '{light}'")
    # The choice is kept.
    await browser.open(f"{page}#/run/{ids['first']}")
    await browser.wait_for("document.querySelector('h1')")
    assert await browser.ask(ground) != light
    for keys, view in (("gs", "samples"), ("gp", "probes"), ("go", "")):
        await browser.press(*keys)
        await browser.wait_for(f"location.hash === '#/run/{ids['first']}{'/' + view if view else ''}'")
        await browser.wait_for("document.querySelector('.tabs [aria-current]')")
    await browser.press("?")
    await browser.wait_for("document.querySelector('dialog[open]')")
    await browser.press("Escape")
    await browser.wait_for("!document.querySelector('dialog')")
    await browser.press("g", "r")
    await browser.wait_for("location.hash === '#/'")
    check_quiet(browser, page)


async def test_what_is_not_there_is_said(browser: Browser, page: str, ids: dict[str, str]) -> None:
    for hash_ in (
        "#/run/nowhere",
        f"#/run/{ids['first']}/sample/nobody",
        f"#/run/{ids['first']}/nothing",
        "#/%E0%A4%A",
    ):
        await browser.open(page + hash_)
        assert await browser.wait_for("document.querySelector('[role=alert]')?.innerText")
    # Without its token the page is told so, and shows nothing.
    await browser.open(page.partition("?")[0])
    assert "token" in await browser.ask("document.body.innerText")


async def test_a_run_that_grows_is_followed(browser: Browser, results: Path, tmp_path: Path) -> None:
    finished = Run(results / "first")
    samples = list(finished.read_samples())
    run = create_run(tmp_path / "growing", finished.config)
    with recording(run) as record, viewing([str(run.path), str(finished.path)]) as url:
        for sample in samples[:4]:
            record.append(sample)
        await browser.open(url)
        await browser.wait_for("document.querySelector('.list .badge.live')")
        await browser.ask("document.querySelector('.list .badge.live').closest('tr').querySelector('a').click()")
        done = "document.querySelector('.headline')?.innerText.replaceAll('\\n', ' ')"
        await browser.wait_for(f"{done}?.includes('samples 4 ')")
        for number, sample in enumerate(samples[4:8], 5):
            record.append(sample)
            await browser.wait_for(f"{done}.includes('samples {number} ')")
        right = sum(bool(sample.correct) for sample in samples[:8])
        assert await browser.ask("document.querySelector('.lead b').innerText") == f"{100 * right / 8:.1f}%"
        assert await browser.ask("document.querySelectorAll('.card .x-mark').length") >= 4
        # A probe of another run is read on what arrives.
        choice = "document.querySelector('[aria-label=Live] select')"
        await browser.ask(f"{choice}.dispatchEvent(new PointerEvent('pointerdown'))")
        await browser.wait_for(f"{choice}.options.length > 1")
        await browser.ask(
            f"(s => {{ s.value = s.options[1].value; s.dispatchEvent(new Event('change', {{bubbles: true}})); }})({choice})"
        )
        await browser.wait_for(
            "document.querySelector('[aria-label=Live] .stats')?.innerText.includes('of the last 8 above zero')"
        )
        check_quiet(browser, url)


async def test_a_view_is_exported_to_a_file_that_needs_no_server(
    browser: Browser, page: str, answer: Answer, ids: dict[str, str], first: list[dict[str, Any]], tmp_path: Path
) -> None:
    # What the page saves is what the server makes.
    await browser.open(f"{page}#/run/{ids['first']}")
    await browser.wait_for("document.querySelector('.x-column')")
    await browser.ask("""
        window.saved = [];
        URL.createObjectURL = blob => { saved.push(blob); return 'about:blank'; };
        HTMLAnchorElement.prototype.click = function () { saved.push(this.download); };
        document.querySelector('button.wide').click(); 1
    """)
    await browser.wait_for("window.saved.length === 2")
    assert await browser.ask("saved[1]") == "first-overview.html"
    assert "</html>" in await browser.ask("saved[0].text()")
    browser.requests.clear()
    place = urlsplit(page)
    view = quote(f"#/run/{ids['first']}")
    url = f"{place.scheme}://{place.netloc}/api/export?view={view}&format=html&{place.query}"
    with urllib.request.urlopen(url) as reply:
        (tmp_path / "run.html").write_bytes(reply.read())
    assert place.query.partition("=")[2] not in (tmp_path / "run.html").read_text()
    await browser.open(tmp_path / "run.html")
    await browser.wait_for("document.querySelector('.x-column')")
    assert await browser.ask("document.querySelector('h1').innerText") == "first"
    await browser.press("g", "s")
    shown = "[...document.querySelectorAll('.row a')].map(a => a.innerText)"
    await browser.wait_for(f"{shown}.length === {len(first)}")
    wrong = [row["sample_id"] for row in first if row["verdict"] == "wrong"]
    await browser.ask("[...document.querySelectorAll('.choice button')].find(b => b.innerText === 'wrong').click()")
    await browser.wait_for(f"{shown}.length === {len(wrong)}")
    assert await browser.ask(shown) == wrong
    await browser.ask("document.querySelector('.row a').click()")
    await browser.wait_for("document.querySelector('.message')")
    assert await browser.ask("document.querySelector('h1').innerText") == wrong[0]
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:", "about:"))] == []
