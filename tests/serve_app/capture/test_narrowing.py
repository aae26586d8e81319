"""A configuration alone yields the same hook points as the weights: for full-size defaults, and for every row of
docs/architectures.md."""

import pytest
from transformers import AutoConfig

from benchmarks.architecture_cases import COLUMNS, cases, cell, in_six_layers
from benchmarks.architecture_page import PAGE
from serve_app.capture.narrowing import STAND_IN, resolve_config
from serve_app.capture.resolver import ResolutionError, resolve_structure
from serve_app.engines.batching import KINDS
from tests.serve_app import tiny

FULL_SIZE = (
    *("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2", "gemma3_text", "gpt2"),
    *("gpt_neox", "phi3", "olmo2", "olmoe", "falcon", "stablelm", "glm4", "gpt_oss", "deepseek_v3"),
)


def rows() -> list[tuple[str, list[str]]]:
    """The table of the docs: the case of each row, and its other cells."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [(first.replace("`", ""), rest) for first, *rest in lines]


@pytest.mark.parametrize("model_type", FULL_SIZE)
def test_a_full_size_configuration(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    structure = resolve_config(config, model_type)
    assert structure.verified_on == STAND_IN
    assert (structure.num_layers, structure.d_model) == (config.num_hidden_layers, config.hidden_size)
    assert {key for key in structure.taps if key.endswith("resid_post")} == {
        f"layers.{i}.resid_post" for i in range(config.num_hidden_layers)
    }


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_the_same_as_on_weights(architecture: str) -> None:
    narrow = resolve_config(tiny.config(architecture), architecture)
    wide = resolve_structure(tiny.module(architecture), architecture)
    assert (narrow.taps, narrow.d_model) == (wide.taps, wide.d_model)
    assert set(narrow.missing) == set(wide.missing)


# Rows of models that the server refuses, and of decoders made of encoders, would double the time.
SERVED = [(case, cells) for case, cells in rows() if cells[-1] in KINDS and "is_decoder" not in case]


@pytest.mark.parametrize(("case", "cells"), SERVED, ids=lambda value: value if isinstance(value, str) else "")
def test_the_table_of_the_docs(case: str, cells: list[str]) -> None:
    structure = resolve_config(in_six_layers(case), case)
    assert [cell(structure, name) for name in COLUMNS] == cells[:-1]


def test_the_table_has_every_architecture_that_is_tested_here() -> None:
    listed = {case.split()[0] for case, _ in rows()}
    assert {case for case, _ in rows()} <= set(cases())
    assert listed >= {*FULL_SIZE, *(tiny.config(name).model_type for name in tiny.CONFIGS)}


def test_what_cannot_be_narrowed_says_why() -> None:
    with pytest.raises(ResolutionError, match=r"narrowed, it still has [0-9,]+ parameters"):
        resolve_config(AutoConfig.for_model("rwkv"), "rwkv")
    with pytest.raises(ResolutionError, match="runs more than once in a forward"):
        resolve_config(AutoConfig.for_model("hrm_text"), "hrm")


def test_the_rotation_of_a_long_context_does_not_stand_in_the_way() -> None:
    """Phi-3's long contexts have a factor per dimension of a head, which would not fit a narrow one."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = AutoConfig.for_model("phi3", rope_parameters=rope, max_position_embeddings=131072)
    assert resolve_config(config, "phi3").missing == {"router": "not a mixture of experts"}
