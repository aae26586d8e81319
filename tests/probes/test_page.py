import re
from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest

from probes.candidate_detail import CandidateDetail, Trace
from probes.labels import Example
from probes.page import PICTURES, TRANSCRIPTS, render_page
from probes.report import Estimate, ProbeReport
from tests.eval_jobs.test_report import Page


def trace(number: int, value: bool, tokens: tuple[str, ...] = ("<b>", "x", "", "\n", "y")) -> Trace:
    example = Example(f"problem {number}", 1, f"r{number}", 2, 3, False, "?", {})
    scores = np.array([-3.0, -1, 0, 1])
    return Trace(example, value, 2, tokens, np.arange(4), scores, number)


@pytest.fixture
def detail() -> CandidateDetail:
    traces = tuple(trace(i, i % 3 == 0) for i in range(40))
    return CandidateDetail("layers.1.resid_post@last_prompt", np.zeros(40), np.zeros(40), traces)


def test_the_page_is_whole_and_needs_nothing_else(report: ProbeReport, detail: CandidateDetail) -> None:
    page = Page(html := render_page(report, {"auroc_by_layer": b"png"}, detail))
    assert page.sources == ["data:image/png;base64,cG5n"]
    assert "url(" not in html
    assert "@import" not in html
    assert "script" not in page.tags
    assert "0.70 [0.61, 0.79]" in page.text
    assert "shuffled labels" in page.text
    assert page.tags.count("details") == TRANSCRIPTS
    assert page.text.count("correct is True") == page.text.count("correct is False") == TRANSCRIPTS // 2


def test_every_token_has_its_score_and_its_colour(report: ProbeReport, detail: CandidateDetail) -> None:
    html = render_page(report, {}, detail)
    own = html[html.index("problem 0") :].split("</details>")[0]
    tokens = re.findall(r'<span class="([^"]*)"(?: style="--s:([\d.]+)")? data-score="([^"]*)">([^<]*)</span>', own)
    # The middle of the scores is -0.5, and 2.5 away from it the color is full.
    assert tokens == [
        ("t no", "1.0", "-3.00 at 0", "&lt;b&gt;"),
        ("t no", "0.2", "-1.00 at 1", "x"),
        ("t yes", "0.2", "+0.00 at 2", "·"),
        ("t yes", "0.6", "+1.00 at 3", "↵\n"),
        ("t", "", "not read", "y"),
    ]


def test_every_candidate_has_its_position(report: ProbeReport, detail: CandidateDetail) -> None:
    other = tuple(replace(result, positions="at:0.5") for result in report.results)
    page = Page(
        render_page(replace(report, positions=("last_prompt", "at:0.5"), results=report.results + other), {}, detail)
    )
    rows = [row for row in page.rows if len(row) == 4 and row[0] in ("embed", "resid_post", "ln_mlp", "final_norm")]
    assert len({tuple(row) for row in rows}) == len(rows) == 2 * len(report.results)
    assert ["resid_post", "10", "last_prompt", "0.70 [0.60, 0.80]"] in rows
    assert ["final_norm", "–", "at:0.5", "0.70 [0.60, 0.80]"] in rows


def test_pictures_have_a_variant_for_dark_pages_and_words_for_those_who_do_not_see_them(
    report: ProbeReport, detail: CandidateDetail
) -> None:
    pictures = {name: name.encode() for name in PICTURES}
    html = render_page(report, pictures, detail, {name: b"dark " + data for name, data in pictures.items()})
    page = Page(html)
    assert [b64decode(source.partition(",")[2]) for source in page.sources] == list(pictures.values())
    assert [b64decode(source.partition(",")[2]) for source in page.dark] == [b"dark " + d for d in pictures.values()]
    page.check_parts()
    assert "the highest is 0.70 [0.60, 0.80] at layers.10.resid_post@last_prompt" in html


def test_transcripts_are_in_the_order_of_problems_and_epochs(report: ProbeReport, detail: CandidateDetail) -> None:
    traces = [trace(number, value) for value in (False, True) for number in (10, 9, 2)]
    again = [replace(one, example=replace(one.example, epoch=2)) for one in traces]
    html = render_page(report, {}, replace(detail, traces=tuple(again + traces)))
    shown = re.findall(r"problem (\d+) · epoch (\d)\s+· <span class=\"(?:good|bad)\">correct is (\w+)", html)
    for value in ("True", "False"):
        assert [(n, e) for n, e, v in shown if v == value] == [(n, e) for n in ("2", "9", "10") for e in ("1", "2")]


def test_counts_stand_beside_shares_and_what_is_not_defined_is_a_dash(report: ProbeReport) -> None:
    nothing = Estimate("auroc", float("nan"), float("nan"), float("nan"))
    page = Page(render_page(replace(report, baselines={**report.baselines, "prevalence": nothing}), {}, None))
    assert "40 of 100 samples True (40.0%)" in page.words
    assert ["prevalence", "–"] in page.rows
    assert "nan" not in page.words.split()
    assert str(replace(nothing, value=0.5)) == "0.50 [–]"


def test_without_a_detail_there_are_no_transcripts(report: ProbeReport) -> None:
    assert "Transcripts" not in render_page(report, {}, None)
