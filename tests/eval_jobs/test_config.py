"""Settings: what is refused, in words that name the option; and what the configuration's hash covers."""

from pathlib import Path
from typing import Any

import pytest

from eval_jobs.config import EvalSettings, ServedModel, SettingsError, check_settings, hashed_configuration, variants_of
from roentgen.contract import canonical_hash

SERVED = ServedModel("m", "r", "float32", 30, 576)


def test_the_defaults_are_the_seeds() -> None:
    settings = EvalSettings()
    assert (settings.samples, settings.parallel, settings.layers) == (3, 1, (8, 12, 16))
    assert settings.hook_points == ("input_layernorm.output", "post_attention_layernorm.output")


def test_what_the_command_line_spells_is_read() -> None:
    settings = check_settings(
        layers="0,-1", hook_points="resid_pre, resid_post", output="out", base_url="http://h:1/v1/"
    )
    assert settings.layers == (0, -1)
    assert settings.hook_points == ("resid_pre", "resid_post")
    assert settings.output == Path.cwd() / "out"
    assert settings.base_url == "http://h:1/v1"
    assert check_settings(layers="all").layers == "all"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 0}, "--samples: input should be greater than or equal to 1 (given: 0)"),
        ({"parallel": -1}, "--parallel: -1 is not allowed; allowed are whole numbers from 1, and auto"),
        ({"parallel": "many"}, "--parallel: 'many' is not allowed; allowed are whole numbers from 1, and auto"),
        ({"mode": "tools"}, "--mode: input should be 'no-tools' or 'with-tools' (given: 'tools')"),
        ({"sample_ids": "1,,2"}, "--sample-ids: '1,,2' has nothing between two commas, or nothing at all"),
        ({"sample_ids": "1", "offset": 2}, "--sample-ids names the problems"),
        ({"max_tokens": 0}, "--max-tokens: input should be greater than or equal to 1 (given: 0)"),
        ({"temperature": 3.0}, "--temperature: input should be less than or equal to 2 (given: 3.0)"),
        ({"top_p": 0.0}, "--top-p: input should be greater than 0 (given: 0.0)"),
        ({"layers": "eight"}, "--layers: 'eight' is not a list of layers; allowed are 8,12,16 and the like, or all"),
        ({"layers": ""}, "--layers: '' is not a list of layers; allowed are 8,12,16 and the like, or all"),
        ({"hook_points": "a,,b"}, "--hook-points: 'a,,b' has nothing between two commas, or nothing at all"),
        ({"positions": "some"}, "--positions: 'some' is not a position policy; allowed are all, prompt"),
        ({"prompt": "poem"}, "--prompt: 'poem' is unknown; allowed are answer-line"),
        ({"extractor": "luck"}, "--extractor: 'luck' is unknown; allowed are answer_line, gsm8k_strict"),
        ({"base_url": "localhost:8000"}, "--base-url: 'localhost:8000' is not the address of a server"),
        ({"ray_address": "auto"}, "--ray-address: 'auto' takes whatever Ray it finds"),
        ({"ray_address": "head"}, "--ray-address: 'head' is not an address of Ray; allowed are local and HOST:PORT"),
        ({"output": "out", "new": True}, "--new makes up a folder of its own"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_settings(**values)
    assert str(caught.value).startswith(message)


def test_every_bad_value_is_named() -> None:
    with pytest.raises(SettingsError) as caught:
        check_settings(samples=0, seed=-1)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["--samples", "--seed"]


def hash_of(settings: EvalSettings, served: ServedModel = SERVED) -> str:
    return canonical_hash(hashed_configuration(settings, served))


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 1},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"seed": 1},
        {"mode": "with-tools"},
        {"mode": "with-tools", "max_turns": 3},
        {"prompt": "gsm8k_cot_zeroshot"},
        {"system": "Be brief."},
        {"collect_activations": True},
        {"collect_activations": True, "layers": "all"},
        {"collect_activations": True, "hook_points": "resid_post"},
        {"collect_activations": True, "positions": "last"},
    ],
)
def test_the_hash_covers_what_changes_the_model_s_work(values: dict[str, Any]) -> None:
    assert hash_of(check_settings(**values)) != hash_of(EvalSettings())
    assert hash_of(check_settings(**values)) == hash_of(check_settings(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"samples": 9, "offset": 3, "shuffle": True, "epochs": 5},
        {"sample_ids": "3,4"},
        {"parallel": "auto", "fail_on_error": 3},
        {"extractor": "flexible"},
        {"problems": "gsm8k"},
        {"layers": "all"},
        {"max_turns": 3},
    ],
)
def test_the_hash_leaves_out_the_rest(values: dict[str, Any]) -> None:
    assert hash_of(check_settings(**values)) == hash_of(EvalSettings())


def test_the_hash_covers_the_model() -> None:
    others = [ServedModel("n", "r", "float32"), ServedModel("m", "s", "float32"), ServedModel("m", "r", "bfloat16")]
    assert len({hash_of(EvalSettings(), served) for served in [SERVED, *others]}) == 4


def test_variants_have_hashes_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "variants.yaml"
    file.write_text("calm: No hurry.\nplain: ''\n")
    settings = check_settings(variants=str(file))
    hashed = hashed_configuration(settings, SERVED)
    calm, plain = variants_of(settings, hashed)
    (only,) = variants_of(EvalSettings(), hashed)
    assert [(v.name, v.prefix) for v in (calm, plain, only)] == [("calm", "No hurry."), ("plain", ""), (None, "")]
    assert len({calm.config_hash, plain.config_hash, only.config_hash}) == 3
    file.write_text("plain: ''\ncalm: No hurry.\n")
    assert {v.config_hash for v in variants_of(settings, hashed)} == {calm.config_hash, plain.config_hash}


def test_the_hash_covers_what_shots_are_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = '{"question": "1 + %d?", "answer": "#### %d"}\n'
    hashes = set()
    for first in (1, 2):
        (tmp_path / "train.jsonl").write_text("".join(line % (n, n + 1) for n in range(first, 9)))
        monkeypatch.setenv("ROENTGEN_GSM8K_DIR", str(tmp_path))
        hashes.add(hash_of(check_settings(prompt="gsm8k")))
    assert len(hashes) == 2
