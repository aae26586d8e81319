"""What a page must bear: texts that would be markup or turn the line around, and samples of 200,000 tokens."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from roentgen.view.export import write_page
from tests.browser.chromium import Browser
from tests.browser.looks import check_looks

HOSTILE = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">"
HOSTILE += " \u202eevil\u202c שלום\u200b"
LONG = "a" * 300
TURNING = r"""[...document.querySelectorAll('main *')].filter(e => [...e.childNodes].some(n => n.nodeType === 3
  && /[\u202a-\u202e\u2066-\u2069]/.test(n.data))).map(e => e.outerHTML.slice(0, 80))"""
N_TOKENS = 200_000
N_ROWS = 300_000
LONGEST_TASK_MS = 1_500
"""What a click or a scroll may take on a busy machine of two cores; here it is a tenth of that."""


def answers(**more: Any) -> dict[str, Any]:
    """Return what the page asks of a run with three samples; `more` replaces parts of the answers."""
    source = {
        "id": "run", "kind": "run", "name": LONG, "path": "/" + LONG, "model": HOSTILE, "problems": HOSTILE,
        "created": "2026-11-30T12:00:00+00:00", "n_samples": 3, "expected": 3, "complete": True, "bytes": 1, "live": False,
        "accuracy": {"value": 0.5, "low": 0.3, "high": 0.7, "n": 3}, "error": HOSTILE,
    }  # fmt: skip
    columns = [
        {"name": "sample_id", "type": "text"}, {"name": "question", "type": "text"},
        {"name": "verdict", "type": "category", "values": ["correct", "wrong"]},
        {"name": "completion_tokens", "type": "number"},
    ]  # fmt: skip
    failure = {"count": 1, "message": HOSTILE + LONG, "sample_id": "s0", "advice": "None."}
    detail = {
        "source": source, "config": {"prompt": HOSTILE}, "keys": [], "columns": columns, "probes": [], "reports": [],
        "directions": [], "lens": None,
        "summary": {"extractor": "answer", "failures": [failure]},
    }  # fmt: skip
    sample = {
        "sample_id": "s0", "problem": HOSTILE, "epoch": 1, "variant": None, "question": HOSTILE, "solution": HOSTILE,
        "gold": "9" * 400, "answers": {"answer": HOSTILE}, "correct_by": {"answer": False}, "verdict": "wrong",
        "values": {}, "labels": {"topic": HOSTILE}, "error": None, "finish_reason": "stop", "response": HOSTILE, "turns": [],
        "messages": [
            {"role": "user", "content": HOSTILE + LONG},
            {"role": "assistant", "content": None, "reasoning_content": HOSTILE,
             "tool_calls": [{"function": {"name": HOSTILE, "arguments": HOSTILE}}]},
            {"role": "tool", "content": HOSTILE},
            {"role": "assistant", "content": HOSTILE},
        ],
        "extracted": [{"extractor": "answer", "read": HOSTILE, "start": 3, "stop": 60, "verdict": "wrong"}],
    }  # fmt: skip
    turn = {
        "turn": 0, "rollout_id": "r", "n_prompt": 2, "n_completion": 3, "keys": [], "stored": True, "values": ["probe:x"],
    }  # fmt: skip
    texts = ["<b>", "\u202eabc", HOSTILE, "", "\ud83d\ude00\u200d", "\n"]
    tokens = {
        "total": len(texts), "start": 0, "n_prompt": 2, "ids": list(range(len(texts))), "texts": texts, "special": [0],
        "segments": [{"role": "user", "start": 0, "stop": 2}], "steps": [],
    }  # fmt: skip
    rows = [{"sample_id": "s0", "question": HOSTILE + LONG, "verdict": "wrong", "completion_tokens": 3}]
    return {
        "api/sources": {"version": "0", "sources": [source]},
        "api/sources/run": detail,
        "api/sources/run/samples": {"total": 1, "matched": 1, "offset": 0, "rows": rows},
        "api/sources/run/samples/s0": {
            "sample": sample, "rollouts": [turn], "python": HOSTILE, "previous": None, "next": None,
        },
        "api/sources/run/samples/s0/tokens?turn=0": tokens,
        "api/sources/run/samples/s0/values?turn=0&of=probe%3Ax": {
            "of": "probe:x", "start": 0, "values": [None, -1.0, 2.0, 0.5, -3.0, 1.0], "low": -3, "high": 2, "unit": "log_odds",
        },
    } | more  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_texts_stay_texts_in_every_view(browser: Browser, tmp_path: Path, scheme: str) -> None:
    page = tmp_path / "page.html"
    write_page(page, "#/", answers())
    for width in (390, 1280):
        await browser.show_as(width, scheme)
        for hash_ in (
            "#/",
            "#/run/run",
            "#/run/run/samples",
            "#/run/run/sample/s0",
            "#/run/run/sample/s0?show=tokens&token=2",
        ):
            await browser.open(f"{page.as_uri()}{hash_}")
            await browser.wait_for("document.querySelector('h1') && !document.querySelector('.wait')")
            await browser.ask(
                "document.querySelectorAll('details').forEach(d => d.open = !d.className.includes('menu'))"
            )
            await check_looks(browser)
            assert await browser.ask("document.title.includes('broken')") is False
            assert await browser.ask("document.querySelectorAll('#app script, #app img').length") == 0
            # No character that turns a line around is in the page; its code is.
            assert await browser.ask(TURNING) == [], hash_
            if "sample" in hash_:
                assert "U+202E" in await browser.ask("document.querySelector('main').innerText")
    assert browser.complaints == []


async def test_a_sample_of_200_000_tokens_does_not_freeze(browser: Browser, tmp_path: Path) -> None:
    chance = random.Random(1)
    texts = [chance.choice([" the", " sum", "1", "2", " =", ".", "\n", " therefore"]) for _ in range(N_TOKENS)]
    more = answers()
    place = "api/sources/run/samples/s0"
    more[f"{place}/tokens?turn=0"] |= {
        "total": N_TOKENS, "texts": texts, "ids": list(range(N_TOKENS)), "n_prompt": 20, "steps": list(range(50, N_TOKENS, 97)),
    }  # fmt: skip
    more[f"{place}/values?turn=0&of=probe%3Ax"]["values"] = [round(chance.gauss(0, 2), 3) for _ in range(N_TOKENS)]
    page = tmp_path / "page.html"
    write_page(page, "#/run/run/sample/s0?show=tokens", more)
    await browser.open(page)
    await browser.wait_for("document.querySelectorAll('.t').length > 100")
    await browser.ask(
        "window.longest = 0; new PerformanceObserver(list => list.getEntries().forEach(e => longest ="
        " Math.max(longest, e.duration))).observe({type: 'longtask'}); 1"
    )
    # Only what is near the window are elements, wherever one scrolls.
    for share in (0.2, 0.9, 0.5):
        await browser.ask(f"scrollTo(0, {share} * document.documentElement.scrollHeight)")
        await browser.wait_for(
            "[...document.querySelectorAll('.t')].some(t => (y => y > 300 && y < 800)(t.getBoundingClientRect().y))"
        )
        assert await browser.ask("document.querySelectorAll('.t').length") < 20_000
    # A link to a token far below goes there.
    await browser.ask(f"location.hash = '#/run/run/sample/s0?show=tokens&token={N_TOKENS - 1000}'")
    await browser.wait_for(
        "(t => t && (y => y > 100 && y < innerHeight)(t.getBoundingClientRect().y))(document.querySelector('.t.chosen'))"
    )
    assert await browser.ask("document.querySelector('.t.chosen').dataset.at") == str(N_TOKENS - 1000)
    assert await browser.ask("longest") < LONGEST_TASK_MS
    assert browser.complaints == []


async def test_a_table_scrolls_over_more_rows_than_a_browser_can_lay_out(browser: Browser, tmp_path: Path) -> None:
    rows = [{"sample_id": f"s{n}", "completion_tokens": n, "verdict": "wrong"} for n in range(N_ROWS)]
    page = tmp_path / "page.html"
    write_page(page, "#/run/run/samples", answers(
        **{"api/sources/run/samples": {"total": N_ROWS, "matched": N_ROWS, "offset": 0, "rows": rows}}
    ))  # fmt: skip
    await browser.open(page)
    shown = "[...document.querySelectorAll('.row a')].map(a => a.innerText)"
    await browser.wait_for(f"{shown}.length > 10")
    grid = "document.querySelector('.grid')"
    # To the end, to the middle, and row by row with the wheel.
    await browser.ask(f"{grid}.scrollTop = {grid}.scrollHeight")
    await browser.wait_for(f"{shown}.at(-1) === 's{N_ROWS - 1}'")
    box = f"{grid}.getBoundingClientRect()"
    last = f"[...document.querySelectorAll('.row')].at(-1).getBoundingClientRect().bottom - {box}.bottom"
    assert abs(await browser.ask(last)) < 3
    await browser.ask(f"{grid}.scrollTop = {grid}.scrollHeight / 2")
    await browser.wait_for(f"(n => Math.abs(n - {N_ROWS // 2}) < 100)(+{shown}[0]?.slice(1))")
    below = f"a.getBoundingClientRect().top > {box}.top + 32"
    at_top = f"[...document.querySelectorAll('.row a')].find(a => {below}).innerText"
    before = int((await browser.ask(at_top))[1:])
    await browser.ask(f"{grid}.dispatchEvent(new WheelEvent('wheel', {{deltaY: 300, cancelable: true}}))")
    await browser.wait_for(f"+{at_top}.slice(1) === {before + 10}")
    assert await browser.ask("document.querySelectorAll('.row').length") < 100
    await browser.ask(
        f"location.hash = '#/run/run/samples?sort=-completion_tokens&completion_tokens=' + encodeURIComponent('<{N_ROWS - 5}')"
    )
    await browser.wait_for(f"{shown}[0] === 's{N_ROWS - 6}'")
    assert browser.complaints == []


def test_the_data_of_a_page_cannot_end_its_script(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(page, "#/", {"api/sources": {"version": "</script><script>", "sources": []}})
    text = page.read_text()
    start = text.index('id="data">') + len('id="data">')
    data = json.loads(text[start : text.index("</script>", start)])
    assert data == {"view": "#/", "answers": {"api/sources": {"version": "</script><script>", "sources": []}}}
