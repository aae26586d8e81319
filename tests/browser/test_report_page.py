"""A run's page as a reader meets it: filters that filter, transcripts with tool calls, variants, nothing fetched."""

from pathlib import Path

import pytest

from eval_jobs.outputs import Timing, write_summary
from eval_jobs.report import write_report
from roentgen.runs import Run, rewrite
from tests.browser.chromium import Browser
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
    wanted |= {"failed": [every[4]], "disagree": [every[2]], "all ": every}
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
    await browser.do("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    await browser.open(write_report(run))
    rows = await browser.ask("[...document.querySelectorAll('#variants tbody tr')].map(r => r.innerText)")
    assert [row.split()[0] for row in rows] == ["plain", "calm"]
    assert "+33.3 points" in rows[1]
    assert await browser.ask("document.documentElement.scrollWidth <= innerWidth")
    assert browser.complaints == []
