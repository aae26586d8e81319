"""The one place a replica has for a model: loading into it, and swapping what is in it.

There is never more than one copy of weights. To swap, a thread first finds the new model (a name that leads nowhere disturbs
nobody), then drains (what runs may finish, what is new is refused), frees (the engine is closed and the last reference to the
old weights goes), and only then loads. If loading fails, the model that was there is loaded again, so that a bad choice
leaves a server that works.

Requests hold the model through `use()`, which is what draining waits for. `/health` reads `status()` at any time.
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
    """CacheLimits for one model (see the module)."""

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
        """Return a slot with a model that is loaded already; its engine stays its owner's to close.

        Raises:
            StoreError: if the store cannot be written.
        """
        slot = cls(config)
        slot._writer = StoreWriter(config.store, expecting=slot._generating)
        slot._served, slot._choice = Served(model, engine, LocalStorage(slot._writer)), config.choice
        slot._stage, slot._open, slot._lent = "ready", True, True
        return slot

    def choose(self, choice: ModelChoice) -> None:
        """Start to serve another model; returns at once. If it is the one that is served, unchanged, nothing happens."""
        self._refused = None
        with self._changed:
            self._unsettled += 1
        threading.Thread(target=self._swap, args=(choice,), name="load", daemon=True).start()

    def reload(self) -> None:
        """Start to load what is in the slot once more, if its engine has died; returns at once."""
        if self._choice is not None:
            self.choose(self._choice)

    @property
    def served(self) -> Served | None:
        """What is in the slot, also while it drains."""
        return self._served

    @property
    def ready(self) -> bool:
        """Whether what is in the slot can be used now."""
        served = self._served
        return served is not None and served.engine.alive and self._open

    def status(self) -> dict[str, Any]:
        """Say what is served, or how far loading it is, and which choice has failed since the last one was made."""
        served, refused = self._served, self._refused
        status: dict[str, Any] = {
            "choice": self._choice,
            "settled": self._unsettled == 0,
            "refused": {"choice": refused[0], "error": refused[1].payload()} if refused else None,
        }
        if served is not None and not served.engine.alive:
            return {**status, "status": "loading", "stage": "the engine has given up; the replica is restarted"}
        if served is not None and self.ready:
            return {**status, "status": "ok", "stage": "ready", **describe(served)}
        if refused is not None and not self._one_at_a_time.locked():
            return {**status, "status": "failed", "stage": refused[1].message}
        return {**status, "status": "loading", "stage": self._stage}

    @contextmanager
    def use(self) -> Iterator[Served]:
        """Hold the model for as long as a request needs it.

        Raises:
            ApiError: 503, if there is none to be had now.
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
        """Stop the engine and commit what is pending."""
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
        """Serve a model, or the former one if that fails."""
        with self._one_at_a_time:
            former = self._choice
            torch.set_num_threads(self._config.threads or os.cpu_count() or 1)
            source = self._find(choice)
            if source is None:
                return
            if self._served is not None:
                same = choice == former and source == self._served.model.source
                if same and self._served.engine.alive:
                    self._say("ready")
                    return
                self._drain()
                self._free()
            if not self._load(choice, source) and former is not None:
                gc.collect()  # what the failed load has left
                source = self._find(former)
                if source is not None:
                    self._load(former, source)

    def _find(self, choice: ModelChoice) -> ModelSource | None:
        self._say(f"finding {choice.model_id}")
        try:
            return locate(
                choice.model_id,
                choice.revision,
                quantize=self._config.quantize,
                trust_remote_code=choice.trust_remote_code,
            )
        except RequestError as error:  # whoever asked is told, so the log needs no traceback
            log.info("%s cannot be found: %s", choice.model_id, error)
            self._refused = choice, error
            return None
        except Exception as error:
            log.exception("%s cannot be found", choice.model_id)
            self._refused = choice, as_load_error(error)
            return None

    def _drain(self) -> None:
        """Refuse what is new and wait for what runs; every request ends by its time limit at the latest."""
        with self._changed:
            self._open = False
            self._say(f"draining {self._users} requests")
            self._changed.wait_for(lambda: self._users == 0, self._config.request_timeout_s)

    def _free(self) -> None:
        """Let go of the model, so that no copy of its weights is left."""
        self._say("freeing the old model")
        served, self._served, self._choice = self._served, None, None
        if served is not None:
            served.engine.close()
        del served
        gc.collect()  # a wrapped model is a cycle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, choice: ModelChoice, source: ModelSource) -> bool:
        """Load a model into the empty slot; whether that worked."""
        try:
            served = self._make(choice, source)
        except RequestError as error:  # whoever asked is told, so the log needs no traceback
            log.info("%s cannot be loaded: %s", choice.model_id, error)
            self._refused = choice, error
            return False
        except Exception as error:
            log.exception("%s cannot be loaded", choice.model_id)
            self._refused = choice, as_load_error(error)
            return False
        with self._changed:
            self._served, self._choice, self._open = served, choice, True
        self._say("ready")
        return True

    def _make(self, choice: ModelChoice, source: ModelSource) -> Served:
        engine = engine_for(self._config, choice, source)
        return self._make_vllm(choice, source) if engine == "vllm" else self._make_transformers(choice, source)

    def _make_vllm(self, choice: ModelChoice, source: ModelSource) -> Served:
        config = self._config
        if choice.device_map is not None:
            raise EngineUnavailableError("device_map: vLLM spreads a model by the server's tensor_parallel_size")
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
        model, engine = vllm.start(source, settings, self._say, trust_remote_code=choice.trust_remote_code)
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
            self._say,
            choice.device_map,
            trust_remote_code=choice.trust_remote_code,
        )
        savepoints = {savepoint.name: savepoint.tap for savepoint in choice.savepoints}
        model = replace(model, structure=model.structure.with_savepoints(savepoints))
        if config.compile_first:
            self._say(f"compiling decoding steps of {source.name}")
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

    def _say(self, stage: str) -> None:
        self._stage = stage
        log.info("%s", stage)


def engine_for(config: ServerConfig, choice: ModelChoice, source: ModelSource | None = None) -> str:
    """Return which engine runs a model: "auto" is vLLM where it is installed, on a CUDA GPU, for what it can run."""
    if config.engine != "auto":
        return config.engine
    adapted = source is not None and source.adapter is not None
    on_cpu = config.device == "cpu" or config.quantize is not None
    fits = not on_cpu and choice.device_map is None and not adapted
    return "vllm" if fits and torch.cuda.is_available() and installed() else "transformers"


def describe(served: Served) -> dict[str, Any]:
    """Return the model's card and structure."""
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
    """Return why a model could not be loaded: 4xx for what whoever chose it did wrong."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, StoreError):
        return from_store(error, "store_failed")
    return ApiError(500, f"{type(error).__name__}: {error}", code="load_failed")
