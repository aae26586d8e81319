"""`roentgen inspect`, as a user runs it: on weights, on a configuration alone, and on what is no model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from roentgen.cli import app
from tests.serve_app import tiny

NARROWED = "a narrowed random model of this configuration"


def inspect(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny.module("llama").save_pretrained(folder)
    return folder


def test_weights_are_verified_themselves(weights: Path) -> None:
    record = json.loads(inspect(weights, "--json"))
    assert record["verified_on"] == "weights"
    assert record["model_name"] == "tiny-llama"
    assert record["pre_mlp_path"] == "model.layers.{i}.post_attention_layernorm"
    assert record["hook_points"]["resid_mid"] == "model.layers.0.post_attention_layernorm.input"
    assert record["missing"] == {"router": "not a mixture of experts"}


def test_without_weights_the_configuration_is_enough(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((weights / "config.json").read_text())
    alone, asked_for = json.loads(inspect(tmp_path, "--json")), json.loads(inspect(weights, "--json", "--config-only"))
    assert alone["verified_on"] == asked_for["verified_on"] == NARROWED
    assert (alone["num_layers"], alone["d_model"]) == (3, 32)
    with_weights = json.loads(inspect(weights, "--json"))
    assert alone["hook_point_layers"] == asked_for["hook_point_layers"] == with_weights["hook_point_layers"]


def test_the_table_says_where_and_in_which_layers(tmp_path: Path) -> None:
    tiny.config("deepseek_v3").save_pretrained(tmp_path)
    lines = inspect(tmp_path).splitlines()
    assert (
        f"DeepseekV3ForCausalLM (deepseek_v3), 3 layers of width 32 at model.layers; verified on {NARROWED}"
        in " ".join(lines)
    )
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert ["attn_out", "model.layers.{i}.self_attn", "output", "all"] in rows
    assert ["router", "model.layers.{i}.mlp.gate", "output", "1–2"] in rows
    assert ["router", "missing: its MLP is dense, not a mixture of experts", "", "0"] in rows
    assert ["final_norm", "model.norm", "output", ""] in rows


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "there is no such folder"),
        ('{"model_type":', "not a valid JSON file"),
        ('{"model_type": "nonesuch"}', "model type `nonesuch`"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "'hidden_size' expected int, got str"),
        ('{"model_type": "t5"}', "no narrow model of it can be built"),
    ],
)
def test_what_is_no_model_is_one_line_and_exit_code_2(tmp_path: Path, config: str | None, message: str) -> None:
    folder = tmp_path / "model"
    if config is not None:
        folder.mkdir()
        (folder / "config.json").write_text(config)
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
