"""The slot for a model: never two copies of weights, and always one that works."""

import asyncio
import gc
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from serve_app.config import ModelChoice, ServerConfig
from serve_app.openai_api.errors import ApiError
from serve_app.replica import model_slot
from serve_app.replica.model_slot import ModelSlot
from tests.serve_app import tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    paths = {name: tmp_path_factory.mktemp(name) for name in ("llama", "qwen3")}
    for name, path in paths.items():
        tiny.module(name).save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture
def slot(tmp_path: Path) -> Iterator[ModelSlot]:
    slot = ModelSlot(ServerConfig(store=str(tmp_path), dtype="float32", device="cpu"))
    yield slot
    slot.close()


def put(slot: ModelSlot, model: str, **options: Any) -> dict[str, Any]:
    """Choose a model and wait until it is there or has been refused."""
    choice = ModelChoice(model_id=model, **options)
    slot.choose(choice)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = slot.status()
        if not status["settled"]:
            time.sleep(0.01)
            continue
        refused = status["refused"] is not None and status["refused"]["choice"] == choice
        if status["status"] == "failed" or (status["status"] == "ok" and (refused or status["choice"] == choice)):
            return status
        time.sleep(0.01)
    raise AssertionError(status)


def living() -> list[str]:
    """Return the models that are in memory."""
    gc.collect()
    return [type(o).__name__ for o in gc.get_objects() if isinstance(o, PreTrainedModel) and hasattr(o, "lm_head")]


def test_the_old_weights_are_gone_before_the_new_ones_come(
    slot: ModelSlot, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = len(living())
    seen: list[int] = []
    load = model_slot.load

    def counted(*args: Any, **options: Any) -> Any:
        seen.append(len(living()) - there)
        return load(*args, **options)

    monkeypatch.setattr(model_slot, "load", counted)
    for name in ("llama", "qwen3", "llama"):
        assert put(slot, folders[name])["structure"]["model_type"] == name
        assert len(living()) - there == 1
    assert seen == [0, 0, 0]


def test_memory_never_holds_two_models(slot: ModelSlot, tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=256, intermediate_size=40_000, num_hidden_layers=3, vocab_size=257,
                         num_attention_heads=4, num_key_value_heads=4, eos_token_id=256)  # fmt: skip
    for name in ("one", "two"):
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    size = sum(file.stat().st_size for file in (tmp_path / "one").glob("*.safetensors"))
    assert size > 300e6
    peaks = []
    for name in ("one", "two", "one"):
        peak, done = [0], threading.Event()

        def watch(peak: list[int], done: threading.Event) -> None:
            while not done.is_set():
                peak[0] = max(peak[0], psutil.Process().memory_info().rss)
                time.sleep(0.005)

        watcher = threading.Thread(target=watch, args=(peak, done))
        watcher.start()
        put(slot, str(tmp_path / name))
        done.set()
        watcher.join()
        peaks.append(peak[0])
    # Loading into an empty slot is what one model takes; a second copy would add its size.
    assert max(peaks[1:]) < peaks[0] + size / 3, (peaks, size)


def test_a_load_that_fails_leaves_the_model_there_was(
    slot: ModelSlot, folders: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(slot, folders["llama"])
    missing = put(slot, "/no/such/folder")
    assert (missing["status"], missing["refused"]["error"]["status"]) == ("ok", 404)
    nowhere = [{"name": "far", "selector": "model.layers[99]"}]
    unpointed = put(slot, folders["qwen3"], savepoints=nowhere)
    assert (unpointed["refused"]["error"]["status"], unpointed["refused"]["error"]["param"]) == (400, "savepoints")
    assert unpointed["structure"]["model_type"] == "llama"
    broken = tmp_path / "broken"
    tiny.module("qwen3").save_pretrained(broken)
    tiny.tokenizer().save_pretrained(broken)
    next(broken.glob("*.safetensors")).write_bytes(b"torn")
    torn = put(slot, str(broken))
    assert (torn["refused"]["error"]["status"], torn["structure"]["model_type"]) == (500, "llama")
    assert not [record for record in caplog.records if record.exc_info]  # of what is said to whoever asked
    assert put(slot, folders["qwen3"])["refused"] is None


def test_the_same_folder_with_other_weights_is_another_model(
    slot: ModelSlot, folders: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(folders["llama"], folder)
    first = put(slot, str(folder))
    assert first["settled"]
    engine = slot.served.engine
    again = put(slot, str(folder))
    assert (again["model"]["revision"], slot.served.engine) == (first["model"]["revision"], engine)  # nothing happened
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    changed = put(slot, str(folder))
    assert changed["model"]["revision"] not in (first["model"]["revision"], "")
    head = slot.served.model.observed._module.model.norm.weight
    assert torch.equal(head, weights["model.norm.weight"])


def test_weights_that_are_not_the_models_leave_the_model_there_was(
    slot: ModelSlot, folders: dict[str, str], tmp_path: Path
) -> None:
    put(slot, folders["llama"])
    folder = tmp_path / "mine"
    shutil.copytree(folders["qwen3"], folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused = put(slot, str(folder))
    error = refused["refused"]["error"]
    assert (error["code"], refused["structure"]["model_type"]) == ("weights_unusable", "llama")
    assert "model.norm.weight" in error["message"]


def test_an_empty_slot_says_why(slot: ModelSlot) -> None:
    with slot_refusal() as first, slot.use():
        pass
    assert (first.value.code, first.value.retry_after_s) == ("loading", 2)
    put(slot, "/no/such/folder")
    with slot_refusal() as second, slot.use():
        pass
    assert (second.value.code, second.value.retry_after_s) == ("model_failed", None)


def slot_refusal() -> Any:
    return pytest.raises(ApiError, match="model")


async def test_what_runs_is_waited_for_and_what_is_new_is_refused(slot: ModelSlot, folders: dict[str, str]) -> None:
    put(slot, folders["llama"])
    with slot.use() as served:
        slot.choose(ModelChoice(model_id=folders["qwen3"]))
        while slot.status()["status"] == "ok":
            await asyncio.sleep(0.01)
        assert slot.status()["stage"].startswith("draining")
        with slot_refusal(), slot.use():
            pass
        await asyncio.sleep(0.1)
        assert served.engine.alive
        del served
    while slot.status()["status"] != "ok":
        await asyncio.sleep(0.01)
    assert slot.status()["structure"]["model_type"] == "qwen3"
