"""The run directory: created, found again, and never shared by two configurations."""

from pathlib import Path
from typing import Any

import pytest

from eval_jobs.hashed_config import ServedModelInfo
from eval_jobs.resume import OtherConfigurationError, keep_recorded_settings, open_run
from eval_jobs.settings import check_settings
from eval_jobs.variants import attempts_of
from roentgen.atomic_files import write_json
from roentgen.contract import check_session_id
from roentgen.runs import Run, RunError
from tests.eval_jobs.conftest import take

SERVED = ServedModelInfo("Qwen/Qwen3-0.6B", "r", "float32", 28, 1024)


@pytest.fixture(autouse=True)
def _work_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def opened(served: ServedModelInfo = SERVED, **values: Any) -> Run:
    settings = check_settings(**values)
    return open_run(settings, take(settings.problems, settings.samples), served, "http://h:1/v1")


def test_a_made_up_folder_says_what_it_holds(tmp_path: Path) -> None:
    run = opened(samples=2, collect_activations=True)
    assert run.path.parent == tmp_path / "results"
    assert run.path.name.startswith("arithmetic_Qwen3-0.6B_no_tools_n2_activations_2")
    assert opened(samples=2).path.name.startswith("arithmetic_Qwen3-0.6B_no_tools_n2_2")


def test_the_configuration_is_all_that_is_needed_to_run_it_again() -> None:
    config = Run(opened(samples=2, temperature=0.5).path).config
    assert config.hashed["sampling"] == {"max_tokens": 512, "temperature": 0.5, "top_p": 1.0, "seed": 0}
    assert config.hashed["capture"] is None
    assert config.problems["source"] == "arithmetic"
    assert config.problems["samples"] == 2
    assert "{question}" in config.prompt["user"]
    assert config.settings["base_url"] == "http://h:1/v1"
    assert config.settings["served"]["num_layers"] == 28
    assert {"python", "roentgen", "ray", "openai"} <= config.versions.keys()


@pytest.mark.parametrize(
    "name", ["run", ".hidden run", "ünïcode and a name far longer than an identifier may ever be", "…"]
)
def test_a_run_s_id_can_name_its_session(tmp_path: Path, name: str) -> None:
    first, second = opened(output=tmp_path / "a" / name), opened(output=tmp_path / "b" / name)
    assert check_session_id(first.config.run_id)
    assert first.config.run_id != second.config.run_id


def test_an_unfinished_run_is_continued_and_a_finished_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened()
    assert opened().path == run.path
    write_json(run.path / "summary.json", {"complete": False})
    assert opened().path == run.path
    write_json(run.path / "summary.json", {"complete": True})
    monkeypatch.setattr("eval_jobs.resume.folder_name", lambda *_: "another")
    assert opened().path.name == "another"


def test_a_file_of_variants_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "v.yaml"
    file.write_text("plain: ''\ncalm: No hurry.\n")
    run = opened(samples=2, epochs=2, variants=str(file))
    file.write_text("plain: ''\ncalm: Hurry!\nnew: Now!\n")
    attempts = attempts_of(run.config, take("arithmetic", 2))
    assert [attempt.sample_id for attempt in attempts[:4]] == [
        "arithmetic_0001_v-plain", "arithmetic_0001_v-calm", "arithmetic_0001_e2_v-plain", "arithmetic_0001_e2_v-calm"
    ]  # fmt: skip
    assert {attempt.variant.prefix for attempt in attempts} == {"", "No hurry."}
    assert {attempt.variant.config_hash for attempt in attempts} == set(run.config.config_hashes)
    assert [
        attempt.variant.name
        for attempt in attempts_of(opened(samples=2, output=tmp_path / "one").config, take("arithmetic", 2))
    ] == [None] * 2


@pytest.mark.parametrize(
    "values", [{"new": True}, {"samples": 4}, {"temperature": 0.5}, {"extractor": "flexible"}, {"problems": "p.jsonl"}]
)
def test_another_run_is_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> None:
    (tmp_path / "p.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n' * 3)
    run = opened()
    monkeypatch.setattr("eval_jobs.resume.folder_name", lambda *_: "another")
    assert opened(**values).path != run.path


def test_an_output_folder_is_continued_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(output="out")
    monkeypatch.chdir("/")
    assert opened(output=tmp_path / "out").config == run.config


def test_an_output_folder_of_another_configuration_is_refused_with_what_differs() -> None:
    opened(output="out", collect_activations=True, layers="8,12")
    with pytest.raises(OtherConfigurationError) as caught:
        opened(ServedModelInfo("other", "r", "float32"), output="out", seed=7, samples=2, extractor="boxed")
    said = str(caught.value)
    for line in (
        "  model: 'Qwen/Qwen3-0.6B' in the folder, 'other' requested",
        "  sampling.seed: 0 in the folder, 7 requested",
        "  problems.samples: 3 in the folder, 2 requested",
        "  extractor: 'answer' in the folder, 'boxed' requested",
        "'layers': [8, 12]",
    ):
        assert line in said
    assert "revision" not in said


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="not writable"):
        opened(output=tmp_path / "file" / "run")


def test_no_key_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROENTGEN_API_KEY", "very-secret")
    assert "very-secret" not in (opened().path / "config.json").read_text()


def test_a_run_keeps_the_extractor_it_began_with(tmp_path: Path) -> None:
    opened(output="out", extractor="answer_line")
    again = opened(output="out")
    assert again.config.settings["extractor"] == "answer_line"
    with pytest.raises(OtherConfigurationError, match="extractor: 'answer_line' in the folder, 'answer' requested"):
        opened(output="out", extractor="answer")
    here = opened(extractor="answer_line")
    assert opened().path == here.path


def test_a_run_keeps_the_version_of_the_prompt_it_began_with(tmp_path: Path) -> None:
    opened(output="out", prompt="answer-line-1")
    settings = check_settings(output="out")
    with pytest.raises(OtherConfigurationError, match=r"prompt\.hash"):
        opened(output="out")
    assert keep_recorded_settings(settings).prompt == "answer-line-1"
    run = opened(output="out", prompt=keep_recorded_settings(settings).prompt)
    assert (run.config.prompt["version"], run.config.settings["extractor"]) == (1, "answer_line")
    assert keep_recorded_settings(check_settings(output="new")).prompt is None
    assert opened(output="new").config.prompt["name"] == "answer-line"
    assert keep_recorded_settings(check_settings(output="out", prompt="gsm8k")).prompt == "gsm8k"
