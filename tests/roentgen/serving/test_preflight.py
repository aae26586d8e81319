"""What a configuration alone shows to be wrong is said before Ray starts, and in seconds."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from roentgen.serving.local_server import LaunchError, serving
from roentgen.serving.preflight import PreflightError, check_start
from serve_app.config import ServerConfig
from tests.conftest import ROENTGEN
from tests.serve_app import tiny


@dataclass(frozen=True)
class Capture:
    layers: Any = (0,)
    hook_points: tuple[str, ...] = ("resid_post",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "tiny"
    tiny.module("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def remove(folder: Path, pattern: str) -> None:
    for file in folder.glob(pattern):
        file.unlink()


def check(folder: Path, capture: Capture | None = None, **options: Any) -> None:
    check_start(ServerConfig(model=str(folder), **options), capture)


def test_what_is_right_passes(folder: Path) -> None:
    check(folder, Capture((-3, 2), ("resid_post", "embed", "mlp.gate_proj.input")))
    check(folder, Capture("all"), probes=(str(folder),))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: remove(f, "*token*"), r"model 'tiny' has no tokenizer: .*save_pretrained"),
        (lambda f: remove(f, "*.safetensors"), r"model 'tiny' has no weights: .*\.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read: "),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
        (lambda f: edit_config(f, model_type="lama"), r"does not know the model type 'lama' of its.*did you mean 'llama'"),
        (lambda f: edit_config(f, model_type="mine", auto_map={"AutoConfig": "x.Y"}), r"--trust-remote-code runs the code"),
        (lambda f: edit_config(f, is_encoder_decoder=True), r"encoder-decoder model"),
        (lambda f: (f / "model.safetensors").write_bytes(b"12"), r"not a complete safetensors file"),
        (
            lambda f: (remove(f, "*.safetensors"), (f / "model.safetensors.index.json").write_text(  # type: ignore[func-returns-value]
                '{"weight_map": {"a": "model-1.safetensors"}}')),
            r"names 1 missing files: model-1\.safetensors",
        ),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_loaded(folder: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(folder)
    with pytest.raises(PreflightError, match=said):
        check(folder)


@pytest.mark.parametrize(
    ("capture", "said"),
    [
        (Capture((0, 3)), r'--layers: 3 is out of range; tiny has layers 0–2 \(or "all"\)'),
        (Capture((-4,)), r"--layers: -4 is out of range"),
        (
            Capture(hook_points=("resid_pots",)),
            r"--hook-points: 'resid_pots' is not a hook point.*did you mean 'resid_post'",
        ),
    ],
)
def test_what_the_model_cannot_give(folder: Path, capture: Capture, said: str) -> None:
    with pytest.raises(PreflightError, match=said):
        check(folder, capture)


def test_what_the_machine_does_not_have(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("serve_app.engines.vllm.requirements.installed", lambda: False)
    with pytest.raises(PreflightError, match="--device: cuda is not available, because PyTorch finds no CUDA GPU"):
        check(folder, device="cuda")
    with pytest.raises(PreflightError, match="engine: vllm is not installed here; use engine=transformers"):
        check(folder, engine="vllm")
    with pytest.raises(PreflightError, match=r"--probes: .*/nowhere is not a folder"):
        check(folder, probes=("nowhere",))


def test_the_layers_of_a_model_of_several_parts_are_those_of_its_text(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    layers = config.pop("num_hidden_layers")
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {"num_hidden_layers": layers}}))
    with pytest.raises(PreflightError, match="layers 0–2"):
        check(folder, Capture((9,)))


@pytest.mark.parametrize("port", [-1, 65_536, 99_999])
def test_a_number_that_is_no_port(port: int, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=rf"--port {port}: not a valid port; allowed are 1 to 65535"), serving(
        ServerConfig(store=str(tmp_path)), port=port
    ):  # fmt: skip
        pass


def test_a_command_says_so_soon_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """The whole command, imports included; the bound is what a busy machine needs, and a start takes many times as long."""
    before = sorted(path.name for path in tmp_path.iterdir())
    started = time.monotonic()
    options = ["--collect-activations", "--layers", "7", "--model", "models/tiny/"]
    done = subprocess.run(
        [ROENTGEN, "eval", *options], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert done.returncode == 2
    assert "--layers: 7 is out of range; tiny has layers 0–2" in done.stderr
    assert "Traceback" not in done.stderr
    assert "starting Ray" not in done.stderr
    assert time.monotonic() - started < 60
    assert sorted(path.name for path in tmp_path.iterdir()) == before
