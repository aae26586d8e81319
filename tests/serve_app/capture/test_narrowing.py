"""A configuration alone gives what the weights would: on full-size defaults, and on every row of docs/architectures.md."""

import ast
from pathlib import Path

import pytest
from transformers import AutoConfig, PretrainedConfig

from roentgen.contract import LAYER_HOOK_POINTS, MODEL_HOOK_POINTS
from serve_app.capture.narrowing import STAND_IN, resolve_config
from serve_app.capture.resolver import ResolutionError, resolve_structure
from serve_app.capture.structure import ModelStructure
from tests.serve_app import tiny

FULL_SIZE = (
    *("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2", "gemma3_text", "gpt2"),
    *("gpt_neox", "phi3", "olmo2", "olmoe", "falcon", "stablelm", "glm4", "gpt_oss", "deepseek_v3"),
)
WHOLE = ("`gpt_neo`", "`gemma3n_text`")  # their other options do not allow fewer layers
COLUMNS = (*LAYER_HOOK_POINTS, *MODEL_HOOK_POINTS)

# The words of the table for a reason, by what the reason says.
WORDS = {
    "in parallel": "parallel",
    "no norm takes the stream": "no norm",
    "×": "scaled",
    "normalises the stream": "post-norm",
    "adds one thing": "one addition",
    "adds up to the stream": "not found",
    "the MLP adds was not found": "not found",
    "no attention": "no attention",
    "dense": "dense",
    "not a mixture of experts": "dense",
    "no module gives the linear projection": "not found",
    "no norm takes what leaves": "not found",
    "not a row per token": "no rows",
}


def cell(structure: ModelStructure, name: str) -> str:
    """What the table says of a hook point."""
    if name in MODEL_HOOK_POINTS:
        reasons = [structure.missing[name]] if name in structure.missing else []
        somewhere = name in structure.taps
    else:
        reasons, somewhere = list(structure.absences(name)), bool(structure.places(name))
    words = [next(word for said, word in WORDS.items() if said in reason) for reason in reasons]
    return " / ".join(dict.fromkeys(["✓"] * somewhere + words))


def rows() -> list[tuple[str, list[str]]]:
    """The table of the docs: the first cell of each row, and the others."""
    page = Path(__file__).parents[3] / "docs" / "architectures.md"
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| `")]
    return [(first, rest) for first, *rest in lines]


def configuration(first_cell: str, **others: object) -> PretrainedConfig:
    """The configuration that a row's first cell names: a model type, then options."""
    model_type, *options = first_cell.replace("`", "").split()
    given = {name: ast.literal_eval(value) for name, _, value in (option.partition("=") for option in options)}
    return AutoConfig.for_model(model_type, **given | others)


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


@pytest.mark.parametrize(("first", "cells"), rows(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_table_of_the_docs(first: str, cells: list[str]) -> None:
    fewer = {} if first in WHOLE else {"num_hidden_layers": 6}  # enough for every pattern, and quick
    structure = resolve_config(configuration(first, **fewer), first)
    assert [cell(structure, name) for name in COLUMNS] == cells


def test_the_table_has_every_architecture_that_is_tested_here() -> None:
    listed = {first.replace("`", "").split()[0] for first, _ in rows()}
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
