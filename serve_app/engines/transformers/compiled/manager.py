"""Provides an engine's compiled decoding step while the engine serves.

The first decoding step starts a thread that looks for the graphs in the cache. If they are not there, the thread waits until
the engine has decoded for a while, since a short run would end before they are compiled. It then starts a process that
compiles them. That process is paused whenever the engine decodes: the threads of a step wait for one another at every
operation, and a process beside them, even of low priority, made generation ten to twenty times slower. Until the graphs are
there, and for models that cannot be compiled, the model itself runs the steps; the log says why.
"""

import logging
import shutil
import subprocess
import threading
import time
from pathlib import Path

from torch import nn
from torch._inductor.exc import InvalidCxxCompiler

from serve_app.engines.transformers.compiled import compilation
from serve_app.engines.transformers.compiled.graph import NotCompilableError
from serve_app.engines.transformers.compiled.step import CompiledStep, observed_modules_of
from serve_app.engines.transformers.grouped_attention import GROUPED
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.engines.transformers.packed_weights import PackedLinear
from serve_app.engines.transformers.rotation import depends_on_length

log = logging.getLogger(__name__)

COMPILE_AFTER_S = 60.0
"""Seconds of decoding after which graphs are compiled. Compiling takes about as long, on every core."""

POLL_S = 0.5

IDLE_S = 1.0
"""Seconds without a step after which the engine counts as idle."""


class CompiledStepManager:
    """Finds, compiles and provides the compiled step of one engine."""

    def __init__(self, model: LoadedModel, *, disabled_by: str = "", after_s: float = COMPILE_AFTER_S) -> None:
        """Create a manager; nothing starts before the first step.

        Args:
            model: with packed weights.
            disabled_by: the setting that disables compilation; "" if none does.
            after_s: seconds of decoding after which graphs are compiled.
        """
        self._model = model
        self._after_s = after_s
        self._decoded_s = 0.0
        self._stopped = threading.Event()
        self._decoded_enough = threading.Event()
        self._loaded: CompiledStep | None = None
        self._checked: CompiledStep | None = None
        self._thread: threading.Thread | None = None
        self._last_step = 0.0
        self._compilation: compilation.Compilation | None = None
        self._folder: Path | None = None
        if reason := disabled_by or _reason_not_to_compile(model):
            log.info("decoding steps are not compiled: %s", reason)
            self._stopped.set()

    def step(self) -> CompiledStep | None:
        """Return the compiled step; None if there is none yet. Called by the thread that runs the model."""
        if self._checked is not None or self._stopped.is_set():
            return self._checked
        self._start()
        self._last_step = time.monotonic()
        if (running := self._compilation) is not None:
            running.pause()
        if self._loaded is not None:
            self._take(self._loaded)
        return self._checked

    def compile_first(self) -> None:
        """Compile the graphs now, and wait until they are loaded or compiling has failed."""
        self._decoded_enough.set()
        self._start()
        if self._thread is not None:
            self._thread.join()

    def decoded(self, seconds: float) -> None:
        """Count the time of a step that the model itself ran."""
        self._decoded_s += seconds
        if self._decoded_s >= self._after_s:
            self._decoded_enough.set()

    def stop(self, reason: str = "") -> None:
        """Provide no compiled step from now on, and end the process that compiles.

        Args:
            reason: reason to log; "" to log nothing.
        """
        if reason and not self._stopped.is_set():
            log.warning("decoding steps are no longer compiled: %s", reason)
        self._stopped.set()
        self._loaded = self._checked = None
        if (running := self._compilation) is not None:
            running.end()

    def _start(self) -> None:
        if self._thread is None and not self._stopped.is_set():
            self._thread = threading.Thread(target=self._provide, name="compiled-step", daemon=True)
            self._thread.start()

    def _take(self, loaded: CompiledStep) -> None:
        try:
            loaded.check(self._model.observed._module, self._model.dtype)
        except NotCompilableError as error:
            log.warning("decoding steps are not compiled: %s", error)
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self.stop()
        else:
            log.info("decoding steps are compiled from now on")
            self._checked = loaded

    def _provide(self) -> None:
        try:
            model = self._model.observed._module
            observed_modules = observed_modules_of(self._model.structure)
            wanted = compilation.CompilationSpec.of(model, observed_modules)
            self._folder = wanted.folder
            if not wanted.done and not self._compiled(wanted):
                return
            self._loaded = CompiledStep.load(wanted.folder, model, observed_modules)
        except (NotCompilableError, OSError, RuntimeError) as error:
            log.warning("decoding steps are not compiled: %s", str(error).strip().split("\n")[0])
            self.stop()

    def _compiled(self, wanted: compilation.CompilationSpec) -> bool:
        """Compile the graphs once that is worthwhile; False if the engine has stopped before.

        Raises:
            NotCompilableError: if compiling failed.
        """
        while not self._decoded_enough.is_set() or not self._idle:
            if self._stopped.wait(POLL_S):
                return False
        log.info("compiling decoding steps while nothing is generated")
        self._compilation = running = compilation.Compilation(wanted)
        try:
            while not self._stopped.is_set():
                if self._idle:
                    running.resume()
                try:
                    errors = running.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    errors = None
                if wanted.done:  # all that is left is for the process to end, and it may be paused
                    return True
                if errors is not None:
                    raise NotCompilableError((errors.strip().splitlines() or ["the compiler wrote no error"])[-1])
            return False
        finally:
            self._compilation = None
            running.end()

    @property
    def _idle(self) -> bool:
        return time.monotonic() - self._last_step > IDLE_S


def _reason_not_to_compile(model: LoadedModel) -> str:
    """Return why a model's steps cannot be compiled; "" if no reason is known."""
    module = model.observed._module
    if model.device.type != "cpu":
        return "compilation is for CPUs only"
    if not all(isinstance(one, PackedLinear) for one in module.modules() if isinstance(one, nn.Linear)):
        return "its weights are not packed"
    if not type(module).__module__.startswith("transformers."):
        return f"{type(module).__name__} is not one of transformers' own models"
    if module.config._attn_implementation not in (GROUPED, "sdpa"):
        return f"it needs the attention {module.config._attn_implementation!r}"
    if not model.batching.joins:
        return "requests cannot join its batches"
    if depends_on_length(module):
        return "its rotation depends on the length of the sequence"
    if hasattr(module, "hf_device_map"):
        return "its weights are spread over devices"
    return "" if _compiler_exists() else "there is no C++ compiler"


def _compiler_exists() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler  # it looks for one when it is imported

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False
