"""Starts, pauses and ends the process that compiles a model's decoding step.

Compiling takes a minute or more, and needs a C++ compiler. The engine writes a request, starts `python -m
serve_app.engines.transformers.compiled`, and continues without the graphs until they are in the cache folder. Graphs depend on
the model's configuration and on this machine, not on the weights.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from roentgen.model_names import cache_folder
from serve_app.engines.transformers.compiled.graph import GraphParts, parts_of
from serve_app.engines.transformers.compiled.operations import library_file

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the graphs; graphs of another version are not used."""

GRAPHS = {True: "one_row.pt2", False: "rows.pt2"}
"""Per whether it is for one row, a graph's file name."""
PARTS, CONFIG, REQUEST = "parts.json", "config.json", "request.json"


def _versions() -> tuple[str, ...]:
    return transformers.__version__, library_file().stem, str(FORMAT)


@dataclass(frozen=True)
class CompilationSpec:
    """What to compile, and for which environment."""

    parts: GraphParts
    config: dict[str, Any]
    """The model's configuration."""
    dtype: str
    threads: int
    """Number of threads: inductor compiles it into the code."""
    made_with: tuple[str, ...] = field(default_factory=_versions)
    """What else the code depends on: transformers' version, and the operations, whose file name covers PyTorch and the
    processor."""

    @property
    def folder(self) -> Path:
        """Cache folder of the graphs."""
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return cache_folder() / "compiled" / hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def done(self) -> bool:
        """Whether the graphs are in the cache."""
        return (self.folder / PARTS).exists() and library_file().exists()

    @classmethod
    def of(cls, model: PreTrainedModel, observed_modules: list[str]) -> "CompilationSpec":
        """Return the specification for a model.

        Args:
            model: with its weights.
            observed_modules: paths of the modules whose outputs are exposed.
        """
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(parts_of(model, observed_modules), model.config.to_dict(), dtype, torch.get_num_threads())


class Compilation:
    """A process that compiles. It can be paused and resumed, together with the compilers that it has started."""

    def __init__(self, wanted: CompilationSpec) -> None:
        """Start the process, in a process group of its own.

        The group belongs to this session: the kernel ends it when this process ends, even if it is paused.
        """
        wanted.folder.parent.mkdir(parents=True, exist_ok=True)
        self._work = Path(tempfile.mkdtemp(prefix=f"{wanted.folder.name}.", dir=wanted.folder.parent))
        (self._work / REQUEST).write_text(json.dumps(asdict(wanted), default=str))
        (self._work / CONFIG).write_text(json.dumps(wanted.config, default=str))
        command = [sys.executable, "-m", __package__, str(self._work), str(wanted.folder)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
        )
        self._lock = threading.Lock()
        self._paused = False

    def wait(self, timeout_s: float) -> str:
        """Wait until it ends and return its standard error.

        Raises:
            subprocess.TimeoutExpired: if it has not ended in time.
        """
        return self._process.communicate(timeout=timeout_s)[1]

    def pause(self) -> None:
        """Pause it, if it runs."""
        if not self._paused:
            self._send(signal.SIGSTOP, paused=True)

    def resume(self) -> None:
        """Resume it, if it is paused."""
        if self._paused:
            self._send(signal.SIGCONT, paused=False)

    def end(self) -> None:
        """End it, and remove its unfinished files."""
        self._send(signal.SIGKILL, paused=True)
        self._process.wait()
        shutil.rmtree(self._work, ignore_errors=True)

    def _send(self, number: signal.Signals, *, paused: bool) -> None:
        with self._lock, suppress(ProcessLookupError):  # it may have ended
            self._paused = paused
            if self._process.returncode is None:
                os.killpg(self._process.pid, number)
