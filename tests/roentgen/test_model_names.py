"""One model has many spellings, and a misspelt one is near a right one."""

from pathlib import Path

import pytest

from roentgen.model_names import canonical_name, is_named, suggest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ROENTGEN_CACHE", raising=False)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    return tmp_path / "models" / "tiny"


@pytest.mark.parametrize(
    "spelling", ["models/tiny", "models/tiny/", "./models/tiny", "~/models/tiny", "models/../models/tiny", "{}", "{}/"]
)
def test_a_folder_s_spellings_are_one_model(folder: Path, spelling: str) -> None:
    assert canonical_name(spelling.format(folder)) == str(folder)
    assert is_named(spelling.format(folder), ("tiny", str(folder)))


def test_the_embedded_models_folder_is_the_embedded_model(folder: Path) -> None:
    cached = "~/.cache/roentgen/models/smollm2-135m"
    assert canonical_name(cached) == canonical_name(f"{folder.parents[1]}{cached[1:]}/") == "smollm2-135m"
    assert is_named(cached, ("smollm2-135m", "smollm2-135m"))
    assert not is_named("~/elsewhere/smollm2-135m", ("smollm2-135m", "smollm2-135m"))


@pytest.mark.parametrize("name", ["smollm2-135m", "Qwen/Qwen3-0.6B", "", "~nobody\0/x"])
def test_other_names_stay_as_they_are(name: str) -> None:
    assert canonical_name(name) == name
    assert is_named(name, ("another", name))


@pytest.mark.parametrize("name", ["tin", "models", "other/tiny", "/models/tiny", "TINY"])
def test_another_name_is_another_model(folder: Path, name: str) -> None:
    assert not is_named(name, ("tiny", str(folder)))


KNOWN = ("smollm2-135m", "Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("smolm2-135m", "smollm2-135m"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("Qwen/Qwen3-0.6b", "Qwen/Qwen3-0.6B"),
        ("Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("Qwem/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
    ],
)
def test_a_near_name_is_suggested(asked: str, meant: str) -> None:
    assert suggest(asked, KNOWN) == f"; did you mean {meant!r}?"


@pytest.mark.parametrize("asked", ["gpt2", "", "mistralai/Mistral-7B"])
def test_nothing_is_suggested_where_nothing_is_near(asked: str) -> None:
    assert suggest(asked, KNOWN) == ""
