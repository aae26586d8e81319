"""The coverage of the configuration hash."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval_jobs.hashed_config import ServedModelInfo, hashed_configuration, variants_of
from eval_jobs.settings import EvalSettings, check_settings
from roentgen.contract import ActivationRequest, canonical_hash

SERVED = ServedModelInfo("m", "r", "float32", 30, 576)


def hash_of(settings: EvalSettings, served: ServedModelInfo = SERVED) -> str:
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
        {"prompt": "gsm8k_cot"},
        {"prompt": "gsm8k_cot", "fixed_shots": 5},
        {"system": "Be brief."},
        {"collect_activations": True},
        {"collect_activations": True, "layers": "all"},
        {"collect_activations": True, "hook_points": "resid_post"},
        {"collect_activations": True, "positions": "last"},
        {"collect_activations": True, "allow_non_finite": True},
    ],
)
def test_the_hash_covers_what_changes_the_model_s_work(values: dict[str, Any]) -> None:
    assert hash_of(check_settings(**values)) != hash_of(EvalSettings())
    assert hash_of(check_settings(**values)) == hash_of(check_settings(**values))


def test_rows_that_are_not_finite_are_asked_for_only_if_they_are_wanted() -> None:
    """Runs from before the option existed keep their hash."""
    usual = check_settings(collect_activations=True).capture or {}
    assert set(usual) == {"layers", "hook_points", "positions"}
    allowing = check_settings(collect_activations=True, allow_non_finite=True).capture
    assert allowing == {**usual, "allow_non_finite": True}
    assert ActivationRequest.model_validate(allowing).allow_non_finite


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
    others = [
        ServedModelInfo("n", "r", "float32"),
        ServedModelInfo("m", "s", "float32"),
        ServedModelInfo("m", "r", "bfloat16"),
    ]
    others.append(replace(SERVED, quantization="int8"))
    assert len({hash_of(EvalSettings(), served) for served in [SERVED, *others]}) == 5


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
