"""The terminal output: a table, warnings, and progress with and without a terminal."""

import io
from pathlib import Path

from rich.console import Console

from eval_jobs.outputs import Timing, write_summary
from eval_jobs.progress import Progress, Tally
from eval_jobs.terminal_summary import format_samples, interval, percent, print_summary, warnings
from tests.eval_jobs.test_outputs import make_run
from tests.eval_jobs.test_summary import make


def test_the_summary_is_printed_with_its_warnings(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    out = io.StringIO()
    print_summary(run, write_summary(run, Timing(4.0, 1, 3)), Console(file=out, width=120))
    said = out.getvalue()
    for words in (
        "stand-in on arithmetic",
        "→ answer",
        "2/4",
        "verdicts of answer: 2 correct, 1 wrong, 1 no answer found",
        "50.0%",
        "15.0–85.0%",
        "tokens: 40 in (32 of them cached), 10 out",
        "4.0 s for 1 samples, 0.8 tokens/s",
        "activations: 4 rollouts × 1 keys, 5 rows each, in /store/s",
        "warning: failed samples: 1",
        "warning: 1 of 4 outputs were truncated at the token limit: raise --max-tokens.",
        "warning: answer found no answer in 1 of 4 outputs.",
        "warning: extractors disagree about 1 of 4 outputs: gsm8k_0003.",
        f"report: {run.path / 'report.html'}",
    ):
        assert words in said


def test_a_server_without_a_prefix_cache_is_not_spoken_of(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    out = io.StringIO()
    print_summary(run, {**write_summary(run, None), "cached_tokens": 0}, Console(file=out, width=120))
    assert "tokens: 40 in, 10 out" in out.getvalue()


def test_few_truncations_are_no_warning() -> None:
    summary = {"samples": 100, "errors": 0, "truncated": 10, "out_of_turns": 10, "unparsable": 10, "disagreements": []}
    assert warnings(summary) == []
    assert len(warnings({**summary, "truncated": 11, "out_of_turns": 11, "unparsable": 11, "extractor": "boxed"})) == 3


def test_absent_numbers_are_dashes() -> None:
    assert percent(None) == "–"
    assert interval({"low": None, "high": None}) == "–"


def test_nearly_none_is_not_none_and_nearly_all_is_not_all() -> None:
    shares = (0.0, 1 / 5000, 0.001, 0.5, 4999 / 5000, 1.0)
    assert [percent(share) for share in shares] == ["0.0%", "<0.1%", "0.1%", "50.0%", ">99.9%", "100.0%"]


def test_the_commonest_error_is_a_warning(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    summary = write_summary(run, None)
    said = warnings(summary)
    assert said[0].startswith("failed samples: 1 of 5 (20.0%). They are excluded from all numbers.")
    assert said[1] == "most common error (1 of 1): 500: <b>poisoned</b>. The server failed: see its log for the reason."
    long = [{**summary["failures"][0], "message": "500: " + "word " * 1000}]
    assert len(warnings({**summary, "failures": long})[1]) < 500


def test_samples_problems_epochs_and_variants_are_told_apart(tmp_path: Path) -> None:
    assert (
        format_samples(write_summary(make_run(tmp_path / "plain"), None))
        == "4 of 5 samples scored, 1 failed: 5 problems"
    )
    (tmp_path / "v.yaml").write_text("plain: ''\ncalm: No hurry.\n")
    run = make(
        tmp_path / "run", {(1, 2, "calm"): "Answer: GOLD"}, variants=str(tmp_path / "v.yaml"), epochs=2, temperature=1.0
    )
    out = io.StringIO()
    print_summary(run, write_summary(run, None), Console(file=out, width=120))
    said = out.getvalue()
    assert "12 of 12 samples scored: 3 problems × 2 epochs × 2 variants" in said
    assert "variant calm: 1/6, 16.7%" in said
    assert "of 3 problems 1 gained, 0 lost" in said
    assert said.count("pass_at_k: k=1") == said.count("maj_at_k: k=1") == 2


def test_without_a_terminal_progress_is_plain_lines(tmp_path: Path) -> None:
    samples = make_run(tmp_path).read_samples()
    out = io.StringIO()
    with Progress(Console(file=out), total=5, recorded=Tally(scored=1)) as progress:
        for sample in samples[1:]:
            progress.add(sample)
    (line,) = out.getvalue().splitlines()  # the last one; the others came within seconds
    assert line.startswith("5/5 done, 2 correct, 40.0% (11.8–76.9), ")


def test_on_a_terminal_progress_is_a_bar(tmp_path: Path) -> None:
    samples = make_run(tmp_path).read_samples()
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=120), total=5, recorded=Tally()) as progress:
        for sample in samples:
            progress.add(sample)
    assert "5/5" in out.getvalue()
    assert "1 errors" in out.getvalue()
