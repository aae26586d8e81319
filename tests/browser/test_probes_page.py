"""The probes' page as it looks: pictures drawn, tokens coloured, the score shown where one points, nothing fetched."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from probes.page import TRANSCRIPTS
from probes.styles import CLASSES
from probes.train import train
from tests.browser.chromium import Browser
from tests.browser.looks import check_looks
from tests.probes.conftest import BuildRun, Plant, build_run, planted

__all__ = ["build_run", "planted"]  # fixtures

KEYS = ("layers.1.resid_post", "layers.3.resid_post")


@pytest.fixture
def page(build_run: BuildRun, planted: Plant) -> Path:
    features, _ = planted(KEYS, None)
    correct = [number % 10 == 0 for number in range(80)]
    features[KEYS[1]][:, 0] += 4 * torch.tensor(correct)
    run = build_run(features, correct)
    train(run.path, positions=["last_prompt", "last"])
    return run.path / "probes" / "correct" / "report.html"


async def test_the_page_as_a_reader_meets_it(browser: Browser, page: Path, tmp_path: Path) -> None:
    await browser.open(page)
    assert await browser.ask("document.querySelector('#best').textContent.trim()") != ""
    assert await browser.ask("[...document.images].map(i => i.naturalWidth > 300 && i.clientWidth > 200)") == [True] * 6
    assert await browser.ask("document.documentElement.scrollWidth <= innerWidth")
    assert await browser.ask("document.querySelectorAll('.transcript').length") == TRANSCRIPTS // 2 + 8

    # Colours: the stronger the score, the less transparent, green to one side and red to the other.
    def color(kind: str) -> str:
        return (
            f"[...document.querySelectorAll('.tokens .{kind}')].map(t => [+t.style.getPropertyValue('--s'),"
            " +getComputedStyle(t).backgroundColor.match(/[\\d.]+/g)[3],"
            " ...getComputedStyle(t).backgroundColor.match(/[\\d.]+/g).slice(0, 3).map(Number)])"
        )

    for kind, rgb in (("yes", [23, 117, 74]), ("no", [179, 64, 47])):
        found = [token for token in await browser.ask(color(kind)) if 0 < token[0] < 1]
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_at_any_width_and_in_either_color_scheme(browser: Browser, page: Path, scheme: str) -> None:
    for width in (390, 1280):
        await browser.show_as(width, scheme)
        await browser.open(page)
        await check_looks(browser)
    # A picture's ground is that of the card around it; its ink is not.
    card = "getComputedStyle(document.querySelector('figure')).backgroundColor.match(/[0-9]+/g).map(Number)"
    ground = await browser.ask(card)
    assert (sum(ground) < 150) is (scheme == "dark")
    for number in range(await browser.ask("document.images.length")):
        shown = await browser.look_at(f"document.images[{number}]")
        pixels = np.asarray(Image.open(io.BytesIO(shown)).convert("RGB"), dtype=int)
        assert np.abs(pixels[[12, 12, -12, -12], [12, -12, 12, -12]] - ground).max() <= 3
        assert (np.abs(pixels.mean(2) - np.mean(ground)) > 150).sum() > 100


async def test_both_classes_are_seen_in_the_scores(browser: Browser, page: Path) -> None:
    """A class's color is in the picture of distributions, also where it is one of ten samples."""
    await browser.open(page)
    shown = await browser.look_at("document.querySelector('#scores img')")
    pixels = np.asarray(Image.open(io.BytesIO(shown)).convert("RGB"), dtype=int)
    for look in CLASSES.values():
        color = 255 * np.array(to_rgb(look["color"]))
        assert (np.abs(pixels - color).max(2) < 40).sum() > 300


async def test_candidates_at_two_positions_are_two_rows(browser: Browser, page: Path) -> None:
    await browser.open(page)
    rows = await browser.ask("[...document.querySelectorAll('#candidates tbody tr')].map(r => r.innerText)")
    assert len(set(rows)) == len(rows) == 4
    heads = await browser.ask("[...document.querySelectorAll('#candidates thead th')].map(h => h.innerText)")
    assert heads == ["hook point", "layer", "position", "AUROC [95% interval]"]
