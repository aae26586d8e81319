"""Names that lead to weights, and names that do not."""

from pathlib import Path

import pytest
from safetensors import safe_open

from serve_app.models.errors import ModelNotFoundError
from serve_app.models.model_source import locate
from tests.serve_app import tiny


def test_a_folder_is_a_model_and_its_revision_follows_its_files(tmp_path: Path) -> None:
    tiny.module("llama").save_pretrained(tmp_path / "mine")
    source = locate(str(tmp_path / "mine"))
    assert source.name == "mine"
    again = locate(str(tmp_path / "mine"))
    assert again.revision == source.revision
    tiny.module("qwen3").save_pretrained(tmp_path / "mine")
    assert locate(str(tmp_path / "mine")).revision != source.revision


def test_a_root_leads_to_the_same_model_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.module("llama").save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    found = locate("./mine/")
    assert (found.name, found.root) == ("mine", str(tmp_path / "mine"))
    monkeypatch.chdir("/")
    assert locate(found.root) == found
    assert locate("smollm2-135m").root == "smollm2-135m"


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "~/nothing", "a/b/c"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        locate(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"without a config\.json"):
        locate(str(tmp_path))


def test_no_hub_and_no_copy_names_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match=r"--model smollm2-135m needs no hub; or .* use its folder"):
        locate("Qwen/Qwen3-none")


def test_the_embedded_model_is_converted_once_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROENTGEN_CACHE", str(tmp_path))
    folder = Path(locate("smollm2-135m").path)
    assert folder == tmp_path / "models" / "smollm2-135m"
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert "model.layers.29.mlp.down_proj.weight" in set(weights.keys())
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert Path(locate("smollm2-135m").path, "model.safetensors").stat().st_mtime_ns == written
