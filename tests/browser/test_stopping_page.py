"""The page of `roentgen probe stop` as it looks: its picture drawn, its tables whole, nothing fetched."""

from collections.abc import Callable
from pathlib import Path

import roentgen
from roentgen.runs import Run
from tests.browser.chromium import Browser
from tests.browser.looks import check_looks
from tests.roentgen.test_probe_stop import probe, write_run

__all__ = ["write_run"]  # a fixture


async def test_the_page_as_a_reader_meets_it(browser: Browser, write_run: Callable[..., Run]) -> None:
    report = roentgen.probes.stop(write_run(), probe(), controls=1)
    page = Path(report.folder) / "stopping.html"
    await browser.open(page)
    assert await browser.ask("document.querySelector('#saved').textContent") == str(report.probes_own.saved)
    assert await browser.ask("[...document.images].map(i => i.naturalWidth > 300 && i.clientWidth > 200)") == [True]
    assert await browser.ask("document.querySelectorAll('#chosen tbody tr').length") == 1 + len(report.chosen)
    assert await browser.ask("document.documentElement.scrollWidth <= innerWidth")
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
    for width, scheme in ((390, "light"), (1280, "dark")):
        await browser.show_as(width, scheme)
        await browser.open(page)
        await check_looks(browser)
