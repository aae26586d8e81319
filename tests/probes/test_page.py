import re

import numpy as np
import pytest

from probes.closeup import Closeup, Trace
from probes.labels import Example
from probes.page import TRANSCRIPTS, render_page
from tests.eval_jobs.test_report import Page


def trace(number: int, value: bool, tokens: tuple[str, ...] = ("<b>", "x", "", "\n", "y")) -> Trace:
    example = Example(f"problem {number}", 1, f"r{number}", 2, 3, False, "?", {})
    scores = np.array([-3.0, -1, 0, 1])
    return Trace(example, value, 2, tokens, np.arange(4), scores, number)


@pytest.fixture
def closeup() -> Closeup:
    traces = tuple(trace(i, i % 3 == 0) for i in range(40))
    return Closeup("layers.1.resid_post@last_prompt", np.zeros(40), np.zeros(40), traces)


def test_the_page_is_whole_and_needs_nothing_else(report, closeup):
    page = Page(html := render_page(report, {"auroc_by_layer": b"png"}, closeup))
    assert page.sources == ["data:image/png;base64,cG5n"]
    assert "url(" not in html
    assert "@import" not in html
    assert "script" not in page.tags
    assert "0.70 [0.61, 0.79]" in page.text
    assert "shuffled labels" in page.text
    assert page.tags.count("details") == TRANSCRIPTS
    assert page.text.count("correct is True") == page.text.count("correct is False") == TRANSCRIPTS // 2


def test_every_token_has_its_score_and_its_colour(report, closeup):
    html = render_page(report, {}, closeup)
    own = html[html.index("problem 0") :].split("</details>")[0]
    tokens = re.findall(r'<span class="([^"]*)"(?: style="--s:([\d.]+)")? data-score="([^"]*)">([^<]*)</span>', own)
    # The middle of the scores is -0.5, and 2.5 away from it the colour is full.
    assert tokens == [
        ("t no", "1.0", "-3.00 at 0", "&lt;b&gt;"),
        ("t no", "0.2", "-1.00 at 1", "x"),
        ("t yes", "0.2", "+0.00 at 2", "·"),
        ("t yes", "0.6", "+1.00 at 3", "↵\n"),
        ("t", "", "not read", "y"),
    ]


def test_without_a_closeup_there_are_no_transcripts(report):
    assert "Transcripts" not in render_page(report, {}, None)
