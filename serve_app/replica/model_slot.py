"""Owns the replica's single loaded model: load, drain, swap.

There is never more than one copy of the weights. A thread swaps in this order:

    find     locate the new model; a wrong name fails here and disturbs nothing
    drain    refuse new requests and wait for the running ones
    free     close the engine and drop the last reference to the old weights
    load     load the new model; if that fails, load the former one again, so that the server keeps working

Requests hold the model with `use()`, and draining waits for them. `/health` may read `status()` at any time.
"""

import gc
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from roentgen.store import StoreError, StoreWriter
from serve_app.capture.structure import CaptureRequestError
from serve_app.config import ModelChoice, ServerConfig
from serve_app.engines.protocol import Engine
from serve_app.engines.served_model import ServedModel
from serve_app.engines.storage import LocalStorage
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import load
from serve_app.engines.vllm import loading as vllm
from serve_app.engines.vllm.requirements import EngineUnavailableError, installed
from serve_app.errors import RETRY_AFTER_S, RequestError
from serve_app.models.model_source import ModelSource, locate
from serve_app.openai_api.errors import ApiError, from_store
from serve_app.openai_api.schemas import ModelCard
from serve_app.requests.generation import Served

log = logging.getLogger(__name__)


class ModelSlot:
    """Holds at most one model (see the module)."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._writer: StoreWriter | None = None
        self._served: Served | None = None
        self._choice: ModelChoice | None = None
        self._refused: tuple[ModelChoice, RequestError] | None = None
        self._stage = "starting"
        self._users = 0
        self._unsettled = 0
        self._open = False
        self._changed = threading.Condition()
        self._one_at_a_time = threading.Lock()
        self._lent = False

    @classmethod
    def holding(cls, config: ServerConfig, model: ServedModel, engine: Engine) -> "ModelSlot":
        """Return a slot with an already loaded model, whose engine the caller closes.

        Raises:
            StoreError: if the store cannot be written.
        """
        slot = cls(config)
        slot._writer = StoreWriter(config.store, expecting=slot._generating)
        slot._served, slot._choice = Served(model, engine, LocalStorage(slot._writer)), config.choice
        slot._stage, slot._open, slot._lent = "ready", True, True
        return slot

    def choose(self, choice: ModelChoice) -> None:
        """Start to load another model; returns at once. Nothing happens if it is the served one, unchanged."""
        self._refused = None
        with self._changed:
            self._unsettled += 1
        threading.Thread(target=self._swap, args=(choice,), name="load", daemon=True).start()

    def reload(self) -> None:
        """Start to reload the slot's model if its engine has died; returns at once."""
        if self._choice is not None:
            self.choose(self._choice)

    @property
    def served(self) -> Served | None:
        """The model in the slot, also while it drains."""
        return self._served

    @property
    def ready(self) -> bool:
        """Whether the model in the slot accepts requests."""
        served = self._served
        return served is not None and served.engine.alive and self._open

    def status(self) -> dict[str, Any]:
        """Return the served model or the stage of loading, and the error if the last choice failed."""
        served, refused = self._served, self._refused
        status: dict[str, Any] = {
            "choice": self._choice,
            "settled": self._unsettled == 0,
            "refused": {"choice": refused[0], "error": refused[1].payload()} if refused else None,
        }
        if served is not None and not served.engine.alive:
            return {**status, "status": "loading", "stage": "the engine has died; the replica is restarting"}
        if served is not None and self.ready:
            return {**status, "status": "ok", "stage": "ready", **describe(served)}
        if refused is not None and not self._one_at_a_time.locked():
            return {**status, "status": "failed", "stage": refused[1].message}
        return {**status, "status": "loading", "stage": self._stage}

    @contextmanager
    def use(self) -> Iterator[Served]:
        """Hold the model while a request uses it.

        Raises:
            ApiError: 503, if no model is ready.
        """
        with self._changed:
            served = self._served
            if served is None or not self._open:
                raise self._unready()
            self._users += 1
        try:
            yield served
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Stop the engine and commit pending activations."""
        self._open = False
        if self._served is not None and not self._lent:
            self._served.engine.close()
        if self._writer is not None:
            self._writer.close()

    def _unready(self) -> ApiError:
        status = self.status()
        if status["status"] == "failed":
            return ApiError(503, f"the model could not be loaded: {status['stage']}", code="model_failed")
        return ApiError(503, f"the model is loading: {status['stage']}", code="loading", retry_after_s=RETRY_AFTER_S)

    def _swap(self, choice: ModelChoice) -> None:
        try:
            self._settle(choice)
        finally:
            with self._changed:
                self._unsettled -= 1

    def _settle(self, choice: ModelChoice) -> None:
        """Load a model, or the former one again if that fails."""
        with self._one_at_a_time:
            former = self._choice
            torch.set_num_threads(self._config.threads or os.cpu_count() or 1)
            source = self._find(choice)
            if source is None:
                return
            if self._served is not None:
                same = choice == former and source == self._served.model.source
                if same and self._served.engine.alive:
                    self._set_stage("ready")
                    return
                self._drain()
                self._free()
            if not self._load(choice, source) and former is not None:
                gc.collect()  # free the remains of the failed load
                source = self._find(former)
                if source is not None:
                    self._load(former, source)

    def _find(self, choice: ModelChoice) -> ModelSource | None:
        self._set_stage(f"finding {choice.model_id}")
        try:
            return locate(
                choice.model_id,
                choice.revision,
                quantize=self._config.quantize,
                trust_remote_code=choice.trust_remote_code,
            )
        except RequestError as error:  # the client gets the error, so the log needs no traceback
            log.info("%s cannot be found: %s", choice.model_id, error)
            self._refused = choice, error
            return None
        except Exception as error:
            log.exception("%s cannot be found", choice.model_id)
            self._refused = choice, as_load_error(error)
            return None

    def _drain(self) -> None:
        """Refuse new requests and wait for the running ones, at most for the request time limit."""
        with self._changed:
            self._open = False
            self._set_stage(f"draining {self._users} requests")
            self._changed.wait_for(lambda: self._users == 0, self._config.request_timeout_s)

    def _free(self) -> None:
        """Drop the model, so that no copy of its weights is left."""
        self._set_stage("freeing the old model")
        served, self._served, self._choice = self._served, None, None
        if served is not None:
            served.engine.close()
        del served
        gc.collect()  # a wrapped model is a reference cycle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, choice: ModelChoice, source: ModelSource) -> bool:
        """Load a model into the empty slot; return whether it succeeded."""
        try:
            served = self._make(choice, source)
        except RequestError as error:  # the client gets the error, so the log needs no traceback
            log.info("%s cannot be loaded: %s", choice.model_id, error)
            self._refused = choice, error
            return False
        except Exception as error:
            log.exception("%s cannot be loaded", choice.model_id)
            self._refused = choice, as_load_error(error)
            return False
        with self._changed:
            self._served, self._choice, self._open = served, choice, True
        self._set_stage("ready")
        return True

    def _make(self, choice: ModelChoice, source: ModelSource) -> Served:
        engine = engine_for(self._config, choice, source)
        return self._make_vllm(choice, source) if engine == "vllm" else self._make_transformers(choice, source)

    def _make_vllm(self, choice: ModelChoice, source: ModelSource) -> Served:
        config = self._config
        if choice.device_map is not None:
            raise EngineUnavailableError(
                "device_map: the vLLM engine does not support it; the server's tensor_parallel_size splits a model"
            )
        settings = vllm.VllmSettings(
            dtype=config.dtype,
            device=config.device,
            max_batch=config.max_batch,
            max_queue=config.max_queue,
            max_prefill_tokens=config.max_prefill_tokens,
            max_cache_tokens=config.max_cache_tokens,
            tensor_parallel_size=config.tensor_parallel_size,
            threads=config.threads,
            capture=config.capture,
            taps=config.taps,
            eager=config.eager,
            store=config.store,
            batch_invariant=config.batch_invariant,
            prefix_cache=config.prefix_cache,
        )
        model, engine = vllm.start(source, settings, self._set_stage, trust_remote_code=choice.trust_remote_code)
        savepoints = {savepoint.name: savepoint.tap for savepoint in choice.savepoints}
        try:
            structure = model.structure.with_savepoints(savepoints)
        except CaptureRequestError:
            engine.close()
            raise
        return Served(replace(model, structure=structure), engine, engine.storage)

    def _make_transformers(self, choice: ModelChoice, source: ModelSource) -> Served:
        config = self._config
        if self._writer is None:
            self._writer = StoreWriter(config.store, expecting=self._generating)
        model = load(
            source,
            config.dtype,
            config.device,
            self._set_stage,
            choice.device_map,
            trust_remote_code=choice.trust_remote_code,
        )
        savepoints = {savepoint.name: savepoint.tap for savepoint in choice.savepoints}
        model = replace(model, structure=model.structure.with_savepoints(savepoints))
        if config.compile_first:
            self._set_stage(f"compiling decoding steps of {source.name}")
        engine = TransformersEngine(
            model,
            max_batch=config.max_batch,
            max_queue=config.max_queue,
            max_prefill_tokens=config.max_prefill_tokens,
            max_cache_tokens=config.max_cache_tokens,
            batch_invariant=config.batch_invariant,
            prefix_cache=config.prefix_cache,
            eager=config.eager,
            compile_first=config.compile_first,
        )
        return Served(model, engine, LocalStorage(self._writer))

    def _generating(self) -> bool:
        served = self._served
        return served is not None and served.engine.load.running > 0

    def _set_stage(self, stage: str) -> None:
        self._stage = stage
        log.info("%s", stage)


def engine_for(config: ServerConfig, choice: ModelChoice, source: ModelSource | None = None) -> str:
    """Return the name of the engine for a model; "auto" is vLLM if it is installed and supports the model and device."""
    if config.engine != "auto":
        return config.engine
    adapted = source is not None and source.adapter is not None
    on_cpu = config.device == "cpu" or config.quantize is not None
    fits = not on_cpu and choice.device_map is None and not adapted
    return "vllm" if fits and torch.cuda.is_available() and installed() else "transformers"


def describe(served: Served) -> dict[str, Any]:
    """Return the model's card and its structure."""
    model, cache = served.model, served.engine.prefix_cache
    card: ModelCard = {
        "id": model.source.name,
        "root": model.source.root,
        "object": "model",
        "created": 0,
        "owned_by": "roentgen",
        "revision": model.source.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": model.quantization,
        "device": str(model.device),
        "engine": served.engine.name,
        "batch_invariant": served.engine.batch_invariant,
        "prefix_cache": {"enabled": cache.enabled, "reason": cache.reason or None},
        "num_layers": model.structure.num_layers,
        "d_model": model.structure.d_model,
        "context_length": model.context_length,
        "max_model_len": model.context_length,
        "checks": model.checks.record(),
    }
    return {"model": card, "structure": model.structure.record()}


def as_load_error(error: Exception) -> RequestError:
    """Convert the exception of a failed load into an error for the client; errors in the choice get a 4xx status."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, StoreError):
        return from_store(error, "store_failed")
    return ApiError(500, f"{type(error).__name__}: {error}", code="load_failed")
