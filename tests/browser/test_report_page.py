"""A run's page as a reader meets it: filters that filter, transcripts with tool calls, variants, nothing fetched."""

import json
from pathlib import Path

import pytest

from eval_jobs.outputs import Timing, write_summary
from eval_jobs.report import write_report
from roentgen.runs import Run, Sample, rewrite
from tests.browser.chromium import Browser
from tests.browser.looks import check_looks
from tests.eval_jobs.test_outputs import make_run
from tests.eval_jobs.test_summary import make

SHOWN = (
    "[...document.querySelectorAll('tr.sample')].filter(r => r.clientHeight).map(r => r.cells[0].textContent.trim())"
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path)
    call = {"id": "a", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1 < 2"}'}}
    said = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "7"},
    ]
    run = rewrite(run, lambda s: s.model_copy(update={"messages": [s.messages[0], *said, *s.messages[1:]]}), run.config)
    write_summary(run, Timing(4.0, 5, 10))
    return run


async def test_filters_show_what_they_say(browser: Browser, run: Run) -> None:
    await browser.open(write_report(run))
    every = [f"arithmetic-000{number}" for number in range(1, 6)]
    wanted = {"all": every, "correct": [every[0], every[2]], "wrong": [every[1], every[3]], "cut": [every[3]]}
    wanted |= {"failed": [every[4]], "unread": [every[3]], "disagree": [every[2]], "all ": every}
    for name, shown in wanted.items():
        await browser.ask(f"document.querySelector('#show-{name.strip()}').click()")
        assert await browser.ask(SHOWN) == shown, name
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


async def test_a_transcript_opens_with_its_tool_calls(browser: Browser, run: Run) -> None:
    await browser.open(write_report(run))
    first = "document.querySelector('tr.sample details')"
    assert not await browser.ask(f"{first}.open")
    await browser.ask(f"{first}.querySelector('summary').click()")
    text = await browser.ask(f"{first}.innerText")
    assert '→ calculator({"expression": "1 < 2"})' in text
    bars = "[...document.querySelectorAll('svg.lengths rect')].filter(r => r.getBoundingClientRect().height > 5).length"
    assert await browser.ask(bars) == 4  # answers of 1, 2, 3 and 4 tokens
    assert await browser.ask("document.documentElement.scrollWidth <= innerWidth")


async def test_variants_are_side_by_side_on_a_narrow_screen_too(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text("plain: ''\ncalm: No hurry.\n")
    says: dict[tuple[int, int, str | None], str] = {(1, 1, "calm"): "Answer: GOLD", (2, 2, "calm"): "Answer: GOLD"}
    run = make(tmp_path / "run", says, variants=str(tmp_path / "v.yaml"), epochs=2)
    write_summary(run, None)
    await browser.show_as(390, "light")
    await browser.open(write_report(run))
    rows = await browser.ask("[...document.querySelectorAll('#variants tbody tr')].map(r => r.innerText)")
    assert [row.split()[0] for row in rows] == ["plain", "calm"]
    assert "+33.3 points" in rows[1]
    await check_looks(browser)
    assert browser.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_awkward_texts_at_any_width_and_in_either_color_scheme(browser: Browser, run: Run, scheme: str) -> None:
    """Long names without a space, an answer of 20,000 characters, text that runs the other way, tables wider than a phone."""
    long = "a" * 300
    texts = [
        {"role": "user", "content": "\u202eevil " + long},
        {"role": "assistant", "content": "<script>document.title = 'broken'</script>" + "12345 " * 20_000},
    ]
    changes = {"messages": texts, "problem_id": "problem-" + long[:60], "gold": "9" * 400, "question": "שלום " + long}
    config = run.config.model_copy(
        update={
            "hashed": {**run.config.hashed, "model": f"/models/{long}"},
            "problems": {**run.config.problems, "source": f"/data/{long}.jsonl"},
        }
    )
    run = rewrite(run, lambda one: one.model_copy(update=changes), config)
    lay_probe(run)
    for width in (390, 1280):
        await browser.show_as(width, scheme)
        await browser.open(write_report(run))
        await browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
        await check_looks(browser)
        assert await browser.ask("document.querySelector('tr.sample pre').clientWidth > 250")
        # On a phone a sample is a block, and there is nothing to scroll to.
        assert await browser.ask(
            "(s => s.scrollWidth <= s.clientWidth)(document.querySelector('#problems').parentElement)"
        )
        assert await browser.ask("Math.max(...[...document.querySelectorAll('pre')].map(p => p.clientHeight)) < 600")
    assert await browser.ask("document.title") != "broken"
    assert browser.complaints == []
    # What a table has beyond the edge of a phone is reached by scrolling the table.
    await browser.show_as(390, scheme)
    await browser.open(write_report(run))
    last = "document.querySelector('.probe tbody tr').lastElementChild"
    inside = f"(r => r.right <= innerWidth && r.left >= 0)({last}.getBoundingClientRect())"
    assert not await browser.ask(inside)
    await browser.ask("document.querySelector('.probe .scroll').scrollLeft = 10000")
    assert await browser.ask(inside)
    shown = "document.querySelector('img.plot').currentSrc.endsWith(btoa(scheme))".replace("scheme", repr(scheme))
    assert await browser.ask(shown)


def lay_probe(run: Run) -> None:
    """Lay results of a probe beside a run; its pictures are the names of their color schemes."""
    folder = run.path / "probes" / "correct"
    (folder / "dark").mkdir(parents=True)
    (folder / "auroc_by_layer.png").write_bytes(b"light")
    (folder / "dark" / "auroc_by_layer.png").write_bytes(b"dark")
    estimate = {"auroc": 0.7, "low": 0.6, "high": 0.8}
    keys = [
        {"hook_point": "post_attention_layernorm.output", "layer": layer, "positions": place, **estimate}
        for place in ("last_prompt", "mean_generated") for layer in (0, 8)
    ]  # fmt: skip
    (folder / "results.json").write_text(json.dumps({"keys": keys, "best": estimate, "metric": "auroc"}))


async def test_a_histogram_has_axes_and_shows_the_rarest_kind(browser: Browser, run: Run) -> None:
    samples = {"gsm8k_0001": 400}

    def often(one: Sample) -> Sample:
        return one.model_copy(update={"completion_tokens": samples.get(one.sample_id, one.completion_tokens)})

    await browser.open(write_report(rewrite(run, often, run.config)))
    titles = await browser.ask("[...document.querySelectorAll('.chart .title')].map(t => t.innerText)")
    assert titles == [
        "correct: 2 of 4 samples",
        "wrong: 1 of 4 samples",
        "wrong and cut at the token limit: 1 of 4 samples",
    ]
    heights = "[...document.querySelectorAll('svg.lengths')].map(s => Math.max(...[...s.querySelectorAll('rect')]"
    heights += ".map(r => r.getBoundingClientRect().height / s.getBoundingClientRect().height)))"
    assert min(await browser.ask(heights)) > 0.9
    ticks = await browser.ask("[...document.querySelectorAll('.chart .x span')].map(t => t.innerText)")
    assert ticks == ["0", "100", "200", "300", "400"]
    # A tick stands where its bar begins.
    place = "(e => e.getBoundingClientRect())"
    left, right, at = await browser.ask(
        f"[{place}(document.querySelector('svg.lengths')).left, {place}(document.querySelector('svg.lengths')).right,"
        f" (r => r.left + r.width / 2)({place}(document.querySelectorAll('.chart .x span')[2]))]"
    )
    assert (at - left) / (right - left) == pytest.approx(200 / 408, abs=0.01)
    assert await browser.ask("document.querySelector('.chart .name').innerText") == "tokens generated"
