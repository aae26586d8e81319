"""One tiny model in each engine that is installed, and one way to read its captured rows."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import transformers as tr
from safetensors.torch import load_file
from ulid import ULID

from roentgen.store import StoreWriter
from roentgen.tokenized_text import TokenizedText
from serve_app.engines.protocol import Engine, Finished
from serve_app.engines.rollout_metadata import RolloutMetadata
from serve_app.engines.served_model import ServedModel
from serve_app.engines.storage import LocalStorage, Storage
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import load
from serve_app.engines.vllm import loading as vllm
from serve_app.models.model_source import ModelSource
from tests.serve_app import tiny

ENGINES = ["transformers"] + (["vllm", "vllm eager", "vllm on two ranks"] if importlib.util.find_spec("vllm") else [])


EVERY_TAP = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "ln_attn", "ln_mlp", "embed", "final_norm")
"""The hook points of a decoder, for vLLM to tap in its graph."""


def save_tiny(folder: Path, architecture: str = "wide_llama") -> tr.PreTrainedModel:
    """Save a tiny model and its tokenizer as a folder that every engine loads; returns the model."""
    model = tiny.module(architecture)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


@dataclass
class Subject:
    """An engine with a tiny model, its storage, and the same weights in plain transformers."""

    model: ServedModel
    engine: Engine
    storage: Storage
    reference: tr.PreTrainedModel

    def rows(self, call: tiny.Call) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Store a finished call's rows; returns the positions and values in the store."""
        result, asked = call.result(), call.job.capture
        assert asked is not None
        reply = self.storage.keep(entry(call.job.prompt_ids, result, str(asked.positions)), result).result(60).reply
        shard = load_file(f"{reply['uri'].removeprefix('file://')}/{reply['shard']}")
        rows = slice(reply["row_start"], reply["row_stop"])
        return shard["position"][rows].tolist(), {key: shard[key][rows] for key in reply["tensors"]}

    def alone(self, prompt: list[int], max_tokens: int, **settings: object) -> list[int]:
        """Greedy completion by transformers' own generate."""
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = self.reference.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, **settings
            )
        return output[0, len(prompt) :].tolist()


def entry(prompt: list[int], result: Finished, positions: str) -> RolloutMetadata:
    ids = prompt + result.token_ids
    logprobs = np.array([np.nan] * len(prompt) + [score.logprob for score in result.scores], dtype=np.float32)
    return RolloutMetadata(
        session_id="s",
        rollout_id=str(ULID()),
        model="tiny",
        revision="0",
        positions=positions,
        sequence=TokenizedText("", ids, [0] * len(ids), [], len(prompt)),
        logprobs=logprobs,
        finish_reason=result.finish_reason,
        key=None,
        labels={},
        delivery="reference",
        forced=result.forced,
    )


@contextmanager
def subject(name: str, folder: Path, architecture: str = "wide_llama", **settings: object) -> Iterator[Subject]:
    """Start an engine on a tiny model.

    Args:
        name: of `ENGINES`.
        folder: for the model and the store.
        architecture: of `tiny.CONFIGS`.
        settings: in place of the usual ones of vLLM, or options of the transformers engine.
    """
    reference = save_tiny(folder / "model", architecture)
    source = ModelSource("tiny", str(folder / "model"), "0")
    if name == "transformers":
        model = load(source, "float32", "cpu")
        engine = TransformersEngine(model, **settings)
        with StoreWriter(folder / "store", max_wait_s=0.01) as writer:
            yield Subject(model, engine, LocalStorage(writer), reference)
            engine.close()
        return
    if name == "vllm eager":
        settings = {"eager": True, **settings}
    if name == "vllm on two ranks":
        settings = {"tensor_parallel_size": 2, **settings}
    served, fast = vllm.start(source, vllm_settings(folder / "store", **settings))
    try:
        yield Subject(served, fast, fast.storage, reference)
    finally:
        fast.close()


def is_core(process: psutil.Process) -> bool:
    """Whether a process is a running core of vLLM's."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "EngineCore" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def vllm_settings(store: Path, **changed: object) -> vllm.VllmSettings:
    """vLLM on one thread of a CPU: with more, its threads wait for one another where others compute too."""
    usual = {
        "dtype": "float32",
        "device": "cpu",
        "max_batch": 8,
        "max_queue": 64,
        "max_cache_tokens": 0,
        "tensor_parallel_size": 1,
        "threads": 1,
        "capture": True,
        "taps": EVERY_TAP,
        "store": str(store),
    }
    return vllm.VllmSettings(**{**usual, **changed})
