"""The report page: well formed, self-contained, escaped, and consistent with the summary."""

import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from eval_jobs.outputs import Timing, write_summary
from eval_jobs.problems import Problem
from eval_jobs.report import write_report
from roentgen.runs import Run, RunError, recording, rewrite
from tests.eval_jobs.test_outputs import make_run, sample
from tests.eval_jobs.test_summary import make

VOID = {"meta", "img", "br", "link", "input", "hr", "source"}


class Page(HTMLParser):
    """Checks that tags are closed in order; keeps ids, links to elsewhere, tables' rows, names of parts, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.dark: list[str] = []
        self.rows: list[list[str]] = []
        self.headings: list[int] = []
        self.unnamed: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.sources += [value for name, value in attrs if name in ("src", "href") and value]
        if tag == "source" and found.get("media") == "(prefers-color-scheme: dark)":
            self.dark.append(found.get("srcset") or "")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append(int(tag[1]))
        wanted = {"th": "scope", "img": "alt", "svg": "aria-label", "html": "lang"}.get(tag)
        if wanted and not found.get(wanted):
            self.unnamed.append(f"{tag} without {wanted}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def words(self) -> str:
        """The text with single spaces."""
        return " ".join(self.text.split())

    def check_parts(self) -> None:
        """Check the accessibility of the page."""
        assert self.unnamed == []
        assert self.tags.count("table") == self.tags.count("caption")
        assert self.headings[0] == 1
        assert self.headings.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(self.headings))


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
    with recording(run) as record:
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


def test_samples_and_problems_are_counted_apart(tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text("plain: ''\ncalm: No hurry.\n")
    says: dict[tuple[int, int, str | None], str] = {(1, 1, "calm"): "Answer: GOLD", (2, 2, "plain"): "Answer: GOLD"}
    run = make(tmp_path / "run", says, variants=str(tmp_path / "v.yaml"), epochs=3, temperature=1.0)
    write_summary(run, None)
    page = page_of(run)
    assert "2 of 18 samples correct, of 3 problems" in page.words
    assert "18 of 18 samples scored: 3 problems × 3 epochs × 2 variants" in page.words
    assert "18 problems" not in page.words
    page.check_parts()
    # pass@k of each variant: k = 1, 2 and 3.
    several = [row[:2] for row in page.rows if len(row) == 7 and row[1] in "123"]
    assert several == [[name, k] for name in ("plain", "calm") for k in "123"]


def test_samples_are_in_the_order_in_which_they_were_declared(tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text("v10: ''\nv9: No hurry.\na: Hurry.\n")
    run = make(tmp_path / "run", {}, variants=str(tmp_path / "v.yaml"), epochs=11, temperature=1.0)
    lines = run.record_path.read_bytes().splitlines(keepends=True)
    run.record_path.write_bytes(b"".join(reversed(lines)))  # as they may have finished
    shown = [" ".join(row[0].split()) for row in page_of(run).rows if row[0].startswith("arithmetic-")]
    variants = ("v10", "v9", "a")
    assert len(shown) == 99
    # The page's text has line breaks for spaces between the three.
    assert [name.replace(" ", "") for name in shown] == [
        f"arithmetic-000{problem}epoch{epoch}{variant}"
        for problem in (1, 2, 3) for epoch in range(1, 12) for variant in variants
    ]  # fmt: skip


def test_failed_samples_are_told_by_their_commonest_error(run: Run) -> None:
    errors = {"gsm8k_0001": "503: 4 waiting", "gsm8k_0002": "500: <b>broken</b>", "gsm8k_0004": "503: 9 waiting"}

    def failed(one: Any) -> Any:
        return one.model_copy(update={"error": errors.get(one.sample_id, one.error)})

    run = rewrite(run, failed, run.config)
    summary = write_summary(run, None)
    assert [(f["count"], f["message"]) for f in summary["failures"]] == [
        (2, "503: 4 waiting"), (1, "500: <b>broken</b>"), (1, "500: <b>poisoned</b>"),
    ]  # fmt: skip
    page = page_of(run)
    assert "failed samples: 4 of 5 (80.0%)" in page.words
    assert "most common error (2 of 4): 503: 4 waiting. The server is overloaded: lower --parallel" in page.words
    (row,) = (row for row in page.rows if row[0] == "2" and row[1] == "50.0%")
    assert row[2].startswith("503: 4 waiting")
    assert "--parallel" in row[3]
    # What a failed sample does not have is no zero.
    (row,) = (row for row in page.rows if row[0] == "arithmetic-0001")
    assert (row[1].strip(), row[3], row[4]) == ("failed", "–", "–")
    page.check_parts()


def test_a_run_of_failures_only_has_no_accuracy(tmp_path: Path) -> None:
    run = make_run(tmp_path, samples=5)
    run = rewrite(run, lambda one: one.model_copy(update={"error": "500: broken"}), run.config)
    page = page_of(run)
    assert "no sample is scored" in page.text
    assert "most common error (5 of 5): 500: broken" in page.words
    assert " 0.0%" not in page.words
    page.check_parts()


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.record_path.unlink()
    page = page_of(run)
    assert "No sample has finished yet." in page.text
    assert "0 of 5 samples scored" in page.words
    assert "%" not in page.text.replace("95% interval", "")
    page.check_parts()


@pytest.mark.parametrize(("reply", "share"), [("Answer: GOLD", "100.0%"), ("Answer: 1234", "0.0%")])
def test_all_or_nothing_of_one_sample(tmp_path: Path, reply: str, share: str) -> None:
    run = make(tmp_path / "run", {(number, 1, None): reply for number in (1, 2, 3)})
    run.record_path.write_bytes(run.record_path.read_bytes().splitlines(keepends=True)[0])
    page = page_of(run)
    assert share in page.text
    assert "of 1 sample correct, of 1 problem ·" in page.words
    assert "1 samples" not in page.words
    page.check_parts()


def test_the_page_says_the_numbers_of_the_summary(run: Run) -> None:
    summary = write_summary(run, Timing(4.0, 1, 3))
    words = page_of(run).words
    accuracy = summary["accuracy"]
    assert f"{100 * accuracy['value']:.1f}%" in words
    assert (
        f"{accuracy['correct']} of {accuracy['n']} samples correct, of {summary['scored_problems']} problems" in words
    )
    assert f"samples scored {summary['samples']}" in words
    assert f"cut at the token limit {summary['truncated']} 25.0% of 4 samples" in words
    assert f"no answer found {summary['unparsable']} 25.0% of 4 samples" in words
    assert (
        f"tokens generated {summary['completion_tokens']} {summary['prompt_tokens']} tokens in, 32 of them cached "
        "0.8 tokens/s, 1 sample in 4.0 s" in words
    )
    for name, scores in summary["extractors"].items():
        (row,) = (row for row in page_of(run).rows if row[0].removesuffix(" (primary)") == name and "/" in row[1])
        assert row[1] == f"{scores['correct']}/{scores['n']}"
        assert (row[5], row[6]) == (str(scores["unparsable"]), str(scores["differs_from_primary"]))
    for count, what in ((5, "all"), (2, "correct"), (2, "wrong"), (1, "cut"), (1, "no answer found"), (1, "failed")):
        assert f"{what} ({count})" in words


def test_a_summary_of_an_older_version_or_an_older_record_is_made_again(run: Run) -> None:
    (run.path / "summary.json").write_text(json.dumps({"accuracy": {"value": 0.987}, "timing": None}))
    page = page_of(run)
    assert "98.7%" not in page.text
    assert "2 of 4 samples correct" in page.words


def test_two_candidates_at_two_positions_differ(run: Run) -> None:
    folder = run.path / "probes" / "correct"
    (folder / "dark").mkdir(parents=True)
    (folder / "auroc_by_layer.png").write_bytes(b"light")
    (folder / "dark" / "auroc_by_layer.png").write_bytes(b"dark")
    keys = [
        {
            "key": "layers.8.ln",
            "hook_point": "ln",
            "layer": 8,
            "positions": place,
            "auroc": 0.7,
            "low": 0.6,
            "high": 0.8,
        }
        for place in ("last_prompt", "at:0.5")
    ]
    best = {**keys[0], "keys": ["layers.8.ln@last_prompt", "layers.8.ln@last_prompt", "layers.8.ln@at:0.5"]}
    results = {"label": "correct", "positions": "last_prompt, at:0.5", "keys": keys, "best": best, "metric": "auroc"}
    (folder / "results.json").write_text(json.dumps(results))
    page = page_of(run)
    rows = [row for row in page.rows if row[0] == "ln"]
    assert rows == [["ln", "8", place, "0.70 [0.60, 0.80]"] for place in ("last_prompt", "at:0.5")]
    assert "AUROC 0.70 [0.60, 0.80], layers.8.ln@last_prompt, layers.8.ln@at:0.5" in page.words
    assert page.sources == ["data:image/png;base64,bGlnaHQ="]
    assert page.dark == ["data:image/png;base64,ZGFyaw=="]
    page.check_parts()


def test_probes_of_a_number_and_of_two_kinds_are_told_apart(run: Run) -> None:
    for name in ("difficulty", "difficulty+lda"):
        folder = run.path / "probes" / name
        folder.mkdir(parents=True)
        estimate = {"r2": 0.25, "low": 0.1, "high": 0.4}
        keys = [{"key": "embed", "hook_point": "embed", "layer": None, "positions": "last", **estimate}]
        results = {
            "label": "difficulty",
            "metric": "r2",
            "keys": keys,
            "best": estimate,
            "baselines": {"prompt_length": estimate},
        }
        (folder / "results.json").write_text(json.dumps(results))
    page = page_of(run)
    assert "Probe: difficulty " in page.words
    assert "Probe: difficulty+lda" in page.words
    assert "Best candidate, chosen on inner folds: R² 0.25 [0.10, 0.40]" in page.words
    assert [row[-1] for row in page.rows if row[0] == "embed"] == ["0.25 [0.10, 0.40]"] * 2
    assert ["baseline: prompt length", "0.25 [0.10, 0.40]"] in page.rows


def test_text_that_runs_the_other_way_or_has_no_encoding(run: Run) -> None:
    nasty = "\u202eevil\u202c שלום </script><script>alert(1)</script>"
    messages = [{"role": "user", "content": nasty}, {"role": "assistant", "content": "half \ud83d a pair"}]
    changed = [one.model_copy(update={"question": nasty, "messages": messages}) for one in run.read_samples()]
    html = write_page(run, changed)
    page = Page(html)
    assert "script" not in page.tags
    assert nasty in page.text
    assert "half ? a pair" in page.text
    # Text that a model or a problem wrote is set apart, so that its direction does not reach what stands beside it.
    assert f"<bdi>{nasty[:5]}" in html


def write_page(run: Run, samples: list[Any]) -> str:
    """Return the page of a run with other samples than its record can hold."""

    class Changed(list[Any]):
        def by_name(self) -> "Changed":
            return self

    class Other(Run):
        def read_samples(self) -> Any:
            return Changed(samples)

    return write_report(Other(run.path, run.config)).read_text()
