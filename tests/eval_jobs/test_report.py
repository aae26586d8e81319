"""The page: well formed, self-contained, escaped, and saying what the summary says."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval_jobs.outputs import Timing, write_summary
from eval_jobs.problems import Problem
from eval_jobs.report import write_report
from roentgen.runs import Run, RunError
from tests.eval_jobs.test_outputs import make_run, sample

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed in order; keeps ids, links to elsewhere, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.sources += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: Run) -> Page:
    return Page(write_report(run).read_text())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = make_run(tmp_path)
    write_summary(run, Timing(4.0, 1, 1))
    return run


def test_it_says_what_the_summary_says(run: Run) -> None:
    page = page_of(run)
    assert write_report(run) == run.path / "report.html"
    assert "50.0%" in page.text
    assert "15.0–85.0%" in page.text  # Wilson, 2 of 4
    assert "answer (primary)" in page.text
    assert "failed samples: 1" in page.text
    assert "extractors disagree about 1 of 4 outputs: gsm8k_0003" in page.text
    assert page.tags.count("details") == 5 + 1  # a transcript each, and the agreement of extractors
    assert {"headline", "extractors", "problems", "configuration"} <= set(page.ids)
    assert "0.2 tokens/s" in page.text or "0 tokens/s" in page.text


def test_it_needs_nothing_else(run: Run) -> None:
    page = page_of(run)
    assert page.sources == []
    assert "script" not in page.tags
    assert "@import" not in (run.path / "report.html").read_text()


def test_what_a_model_wrote_is_escaped(run: Run) -> None:
    attack = Problem("arithmetic-0001", 6, "<script>alert(1)</script>", "</pre>", "1")
    with run.recording() as record:
        record.append(sample(attack, '"><img src=x onerror=alert(1)>\nAnswer: 1', "stop").model_copy(
            update={"config_hash": "another"}))  # fmt: skip
    page = page_of(run)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "500: <b>poisoned</b>" in page.text


def test_probe_results_are_shown(run: Run) -> None:
    folder = run.path / "probes" / "correct"
    folder.mkdir(parents=True)
    (folder / "auroc_by_layer.png").write_bytes(b"\x89PNG")
    estimate = {"auroc": 0.712, "low": 0.6, "high": 0.8}
    results = {
        "label": "correct",
        "positions": "last_prompt",
        "n_samples": 4,
        "n_problems": 4,
        "prevalence": 0.5,
        "keys": [
            {"key": "layers.8.ln_attn", "hook_point": "ln_attn", "layer": 8, **estimate},
            {"key": "embed", "hook_point": "embed", "layer": None, **estimate},
        ],
        "best": estimate,
        "baselines": {"prompt_length": {"auroc": 0.55, "low": 0.4, "high": 0.7}},
        "notes": ["The rarer class has 2 samples."],
    }
    (folder / "results.json").write_text(json.dumps(results))
    page = page_of(run)
    assert "0.71 [0.60, 0.80]" in page.text
    assert "0.55 [0.40, 0.70]" in page.text
    assert "The rarer class has 2 samples." in page.text
    assert page.sources == ["data:image/png;base64,iVBORw=="]


def test_probe_results_may_be_sparse_but_not_damaged(run: Run) -> None:
    folder = run.path / "probes" / "correct"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"keys": [{"key": "embed", "auroc": 0.5}], "best": {"auroc": 0.5}}')
    assert "embed" in page_of(run).text
    (folder / "results.json").write_text("{")
    with pytest.raises(RunError, match=r"results\.json is damaged"):
        write_report(run)


def test_a_run_that_is_not_finished_has_a_page(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, activations=False))
    assert "not complete" in page.text
