"""The probes' page as it looks: pictures drawn, tokens coloured, the score shown where one points, nothing fetched."""

from pathlib import Path

import pytest

from probes.page import TRANSCRIPTS
from probes.train import train
from tests.browser.chromium import Browser
from tests.probes.conftest import build_run, planted

__all__ = ["build_run", "planted"]  # fixtures

KEYS = ("layers.1.resid_post", "layers.3.resid_post")


@pytest.fixture
def page(build_run, planted) -> Path:
    run = build_run(*planted(KEYS, KEYS[1]))
    train(run.path, positions=["last_prompt", "last"])
    return run.path / "probes" / "correct" / "report.html"


async def test_the_page_as_a_reader_meets_it(browser: Browser, page: Path, tmp_path: Path) -> None:
    await browser.open(page)
    assert await browser.ask("document.querySelector('#best').textContent.trim()") != ""
    assert await browser.ask("[...document.images].map(i => i.naturalWidth > 300 && i.clientWidth > 200)") == [True] * 5
    assert await browser.ask("document.documentElement.scrollWidth <= innerWidth")
    assert await browser.ask("document.querySelectorAll('.transcript').length") == TRANSCRIPTS

    # Colours: the stronger the score, the less transparent, green to one side and red to the other.
    def colour(kind: str) -> str:
        return (
            f"[...document.querySelectorAll('.tokens .{kind}')].map(t => [+t.style.getPropertyValue('--s'),"
            " +getComputedStyle(t).backgroundColor.match(/[\\d.]+/g)[3],"
            " ...getComputedStyle(t).backgroundColor.match(/[\\d.]+/g).slice(0, 3).map(Number)])"
        )

    for kind, rgb in (("yes", [23, 117, 74]), ("no", [179, 64, 47])):
        found = [token for token in await browser.ask(colour(kind)) if 0 < token[0] < 1]
        assert len(found) > 10
        for strength, alpha, *shown in found:
            assert alpha == pytest.approx(0.6 * strength, abs=0.01)
            assert shown == rgb

    # Pointing at a token shows its score beside it, and only then.
    token = "document.querySelector('.transcript[open] .tokens .t')"
    said = f"getComputedStyle({token}, '::after').content"
    assert await browser.ask(said) == "none"
    before = await browser.picture()
    await browser.point_at(token)
    assert await browser.ask(said) == f'"{await browser.ask(f"{token}.dataset.score")}"'
    assert await browser.picture() != before

    # A transcript opens where it is clicked.
    assert not await browser.ask("document.querySelectorAll('.transcript')[1].open")
    await browser.ask("document.querySelectorAll('.transcript summary')[1].click()")
    assert await browser.ask("document.querySelectorAll('.transcript')[1].querySelector('.tokens').clientHeight > 0")
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


async def test_the_page_on_a_narrow_screen(browser: Browser, page: Path) -> None:
    await browser.do("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    await browser.open(page)
    assert await browser.ask("document.documentElement.scrollWidth <= innerWidth")
