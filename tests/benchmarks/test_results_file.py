from pathlib import Path

import pytest

from benchmarks.results_file import record, replace_section, table


def test_a_section_is_appended_then_replaced_and_the_others_stay() -> None:
    document = replace_section("# Measured\n", "Engine", "one")
    document = replace_section(document, "Serving", "two")
    assert document == "# Measured\n\n## Engine\n\none\n\n## Serving\n\ntwo\n"
    document = replace_section(document, "Engine", "three\n\n### Below")
    assert document.count("## Engine") == 1
    assert "one" not in document
    assert document.endswith("## Serving\n\ntwo\n")
    assert replace_section(document, "Serving", "four").endswith("## Serving\n\nfour\n")


def test_a_title_is_not_a_pattern_nor_a_prefix() -> None:
    document = replace_section("## Engine (1.0)\n\na\n\n## Engine\n\nb\n", "Engine", "c")
    assert document == "## Engine (1.0)\n\na\n\n## Engine\n\nc\n"


def test_a_record_says_when_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/x/benchmarks/engine.py", "--pairs", "5"])
    file = tmp_path / "RESULTS.md"
    record("Engine", "numbers", file)
    text = file.read_text()
    assert text.startswith("# Measured\n\n## Engine\n\nnumbers\n")
    assert "    python -m benchmarks.engine --pairs 5\n" in text
    assert "torch 2." in text


def test_a_table() -> None:
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
