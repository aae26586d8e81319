"""Files of variants."""

from pathlib import Path

import pytest

from eval_jobs.problems import Problem
from eval_jobs.variants import Attempt, Variant, VariantError, read_variants


def test_names_and_prefixes_in_order(tmp_path: Path) -> None:
    file = tmp_path / "v.yaml"
    file.write_text("plain: ''\nimpatient: |\n  Hurry up!\n  Now!\ncalm: No hurry.\n")
    assert list(read_variants(file).items()) == [
        ("plain", ""), ("impatient", "Hurry up!\nNow!"), ("calm", "No hurry.")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- calm", "is not a mapping of two or more names"),
        ("calm: a", "is not a mapping of two or more names"),
        ("calm: a\n../x: b", "'../x' is not a valid name"),
        ("calm: a\n1: b", "1 is not a valid name"),
        ("calm: a\nplain:", "plain must be a text"),
        ("calm: [a\n", "cannot be read"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "v.yaml"
    file.write_text(text)
    with pytest.raises(VariantError, match=rf"--variants: .*v\.yaml.*{words}"):
        read_variants(file)


def test_names_of_samples() -> None:
    problem = Problem("p", 7, "?", "#### 1", "1")
    assert Attempt(problem, Variant(None, "", "h")).sample_id == "gsm8k_0007"
    assert Attempt(problem, Variant("calm", "", "h"), epoch=2).sample_id == "gsm8k_0007_e2_v-calm"
