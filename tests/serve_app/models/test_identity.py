"""Two models never have one revision, and one model has the same wherever it lies."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.models import identity
from serve_app.models.errors import ModelNotFoundError
from serve_app.models.identity import folder_revision
from serve_app.models.model_source import locate
from tests.serve_app import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "mine"
    tiny.module("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "other" / "mine"))


def change_one(key: str, at: int) -> Callable[[Path], object]:
    """Change one number of one weight; name, shape and size stay."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[key].view(-1)[at] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def edit(file: str, old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    return change


CHANGES: dict[str, Callable[[Path], object]] = {
    "first weight": change_one("model.embed_tokens.weight", 0),
    "a weight in the middle": change_one("model.layers.1.mlp.up_proj.weight", 1000),
    "last norm": change_one("model.norm.weight", 31),
    "configuration": edit("config.json", '"rope_theta": 10000.0', '"rope_theta": 10001.0'),
    "generation": edit("generation_config.json", '"eos_token_id": 256', '"eos_token_id": 255'),
    "vocabulary": edit("tokenizer.json", '"a":', '"å":'),
    "tokenizer's configuration": edit("tokenizer_config.json", "<eos>", "<end>"),
    "chat template": edit("chat_template.jinja", "[reply]", "[answer]"),
    "new template": lambda folder: (folder / "chat_template.json").write_text("{}"),
    "code": lambda folder: (folder / "modeling_mine.py").write_text("x = 1\n"),
    "adapter": lambda folder: (folder / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()),
    "pytorch": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"weights"),
}  # fmt: skip


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_whatever_decides_makes_another_revision(
    model: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, what: str, sampled: bool
) -> None:
    if sampled:
        monkeypatch.setattr(identity, "WHOLE_BYTES", 0)
    assert folder_revision(copy) == folder_revision(model)
    CHANGES[what](copy)
    assert folder_revision(copy) != folder_revision(model)


def test_what_decides_nothing_changes_nothing(model: Path, copy: Path) -> None:
    (copy / "README.md").write_text("about")
    (copy / "trainer_state.json").write_text("{}")
    (copy / "training_args.bin").write_bytes(b"x")
    (copy / "optimizer.pt").write_bytes(b"x")
    (copy / ".gitattributes").write_text("x")
    (copy / "runs").mkdir()
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    assert folder_revision(copy) == folder_revision(model)
    assert (locate(str(copy)).name, locate(str(copy)).revision) == ("mine", folder_revision(model))


def test_of_large_weights_every_tensor_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, merging or quantizing moves every part of a tensor; a file without names is sampled all over."""
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1 << 20)
    weights = {f"w{i}": torch.randn(1000, 1000) for i in range(3)}
    save_file(weights, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "old.bin")
    before = folder_revision(tmp_path)
    (tmp_path / "w.gguf").write_bytes(b"GGUF" + bytes(4 << 20))
    with_gguf = folder_revision(tmp_path)
    assert with_gguf != before
    read = sum(
        length for _, length in identity._sample(12_000_300, identity.read_header(tmp_path / "model.safetensors"))
    )
    assert read < 300_000
    weights["w1"] *= 1.0001
    save_file(weights, tmp_path / "model.safetensors")
    changed = folder_revision(tmp_path)
    assert changed != with_gguf
    torch.save(weights, tmp_path / "old.bin")
    assert folder_revision(tmp_path) != changed
    weights["w2"][-1, -1] += 1  # a PyTorch file ends with the checksums of its tensors
    torch.save(weights, tmp_path / "old.bin")
    changed = folder_revision(tmp_path)
    (tmp_path / "w.gguf").write_bytes(b"GGUF" + bytes(2 << 20) + b"x" * (1 << 20) + bytes(1 << 20))
    assert folder_revision(tmp_path) != changed


def test_a_revision_that_is_asked_for_is_that_of_the_content(model: Path, copy: Path) -> None:
    """A folder's revision depends on its content only, not on its name."""
    revision = folder_revision(model)
    assert locate(str(copy), revision).revision == revision
    with pytest.raises(ModelNotFoundError, match=f"'main' is not the revision of mine, which is {revision}"):
        locate(str(copy), "main")


def test_a_hub_model_has_the_commit_of_its_files(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = ["a" * 40, "b" * 40]
    repository = tmp_path / "hub" / "models--me--mine"
    for commit in commits:
        shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commits[1])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = locate("me/mine")
    assert (source.name, source.path, source.revision, source.commit) == ("me/mine", "me/mine", commits[1], commits[1])
    assert locate("me/mine", commits[0]).revision == commits[0]


def test_a_converted_model_that_was_changed_is_converted_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve_app.models import model_source

    made = []

    def convert(gguf: Path, folder: Path, revision: str) -> None:
        made.append(revision)
        shutil.copytree(model, folder, dirs_exist_ok=True)
        (folder / model_source._CONVERTED).write_text(f"{revision} {folder_revision(folder)}\n")

    monkeypatch.setenv("ROENTGEN_CACHE", str(tmp_path))
    monkeypatch.setattr(model_source, "_convert", convert)
    first = locate("smollm2-135m")
    assert locate("smollm2-135m") == first
    assert first.revision == f"gguf-{made[0]}"
    assert len(made) == 1
    change_one("model.norm.weight", 0)(Path(first.path))
    locate("smollm2-135m")
    assert len(made) == 2
    with pytest.raises(ModelNotFoundError, match="is not the revision of smollm2-135m"):
        locate("smollm2-135m", "main")


def test_two_models_of_one_name_are_two_to_a_session(model: Path, copy: Path, tmp_path: Path) -> None:
    """The second capture into one session is rejected; into a session of its own, it captures its own rows."""
    from rich.console import Console

    from roentgen.store import Session
    from roentgen.workflows.capture_texts import CaptureError, capture
    from roentgen.workflows.command_settings import CaptureSettings

    change_one("model.layers.0.mlp.down_proj.weight", 5)(copy)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"prompt": "hi", "completion": "you"}) + "\n")

    def run(folder: Path, session: str | None = None, dtype: str = "float32") -> Any:
        settings = CaptureSettings(
            source=texts, model=str(folder), device="cpu", dtype=dtype, store=str(tmp_path / "s"), session=session,
            layers="all", hook_points=("resid_post",),
        )  # fmt: skip
        return capture(settings, Console(quiet=True), lambda _: None)

    one, two, again = run(model), run(copy), run(model)
    assert [(report.stored, report.held) for report in (one, two, again)] == [(1, 0), (1, 0), (0, 1)]
    assert one.session != two.session
    rows = [next(iter(Session.open(report.session).activations("layers.2.resid_post"))).values for report in (one, two)]
    assert not torch.equal(*rows)
    run(model, "both")
    with pytest.raises(CaptureError, match="captured with other settings: model mine"):
        run(copy, "both")
