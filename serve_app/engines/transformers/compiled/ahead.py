"""Compiles a model's decoding step in a process of its own, once on a machine.

It takes a minute or more, and a C++ compiler. Whoever serves starts this process (`python -m
serve_app.engines.transformers.compiled.ahead REQUEST FOLDER`), goes on without it, and finds the graphs in a folder of the
cache when they are there. What is compiled depends on the model's configuration and on this machine, not on its weights: the
process makes the model without them.
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
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from roentgen.model_names import cache_folder
from serve_app.engines.transformers.compiled.graph import NotCompilableError, Parts, export_step, parts_of

log = logging.getLogger(__name__)

FORMAT = 1
"""Of the graphs and of the operations that they call; another number, and nothing older is used."""

GRAPHS = {True: "one_row.pt2", False: "rows.pt2"}
"""By whether it is for one row, a graph's file."""
PARTS, CONFIG, REQUEST = "parts.json", "config.json", "request.json"
NICENESS = 10


def _versions() -> tuple[str, ...]:
    return torch.__version__, transformers.__version__, torch.backends.cpu.get_cpu_capability(), str(FORMAT)


@dataclass(frozen=True)
class Wanted:
    """What is to be compiled, and for what."""

    parts: Parts
    config: dict[str, Any]
    """The model's."""
    dtype: str
    threads: int
    """To compute with: inductor writes it into the code."""
    made_with: tuple[str, ...] = field(default_factory=_versions)
    """What else the code depends on."""

    @property
    def folder(self) -> Path:
        """Where the graphs are kept."""
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return cache_folder() / "compiled" / hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def done(self) -> bool:
        """Whether they are there."""
        return (self.folder / PARTS).exists()

    @classmethod
    def of(cls, model: PreTrainedModel, places: list[str]) -> "Wanted":
        """Return what is wanted for a model.

        Args:
            model: with its weights.
            places: paths of the modules whose outputs are to be shown.
        """
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(parts_of(model, places), model.config.to_dict(), dtype, torch.get_num_threads())


class Compilation:
    """A process that compiles. It can be stopped and go on, with the compilers that it has started."""

    def __init__(self, wanted: Wanted) -> None:
        """Start it, in a process group of its own.

        The group belongs to this session: the kernel ends it when this process ends, even if it is stopped.
        """
        wanted.folder.parent.mkdir(parents=True, exist_ok=True)
        self._work = Path(tempfile.mkdtemp(prefix=f"{wanted.folder.name}.", dir=wanted.folder.parent))
        (self._work / REQUEST).write_text(json.dumps(asdict(wanted), default=str))
        (self._work / CONFIG).write_text(json.dumps(wanted.config, default=str))
        command = [sys.executable, "-m", __name__, str(self._work), str(wanted.folder)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
        )
        self._lock = threading.Lock()
        self._paused = False

    def wait(self, timeout_s: float) -> str:
        """Wait for its end and return what it wrote to its standard error.

        Raises:
            subprocess.TimeoutExpired: if it has not ended in time.
        """
        return self._process.communicate(timeout=timeout_s)[1]

    def pause(self) -> None:
        """Stop it, if it runs."""
        if not self._paused:
            self._send(signal.SIGSTOP, paused=True)

    def go_on(self) -> None:
        """Let it go on, if it is stopped."""
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


def main(work: Path, target: Path) -> None:
    """Compile what a folder asks for into another.

    Args:
        work: has the request; unfinished files are written there.
        target: where the graphs are kept.

    Raises:
        NotCompilableError: if that cannot be done.
    """
    os.nice(NICENESS)
    threading.Thread(target=_end_with, args=(os.getppid(),), name="ends-with-engine", daemon=True).start()
    asked = json.loads((work / REQUEST).read_text())
    parts = Parts(
        asked["parts"]["architecture"],
        tuple((path, outputs) for path, outputs in asked["parts"]["linears"]),
        tuple(asked["parts"]["places"]),
    )
    torch.set_num_threads(asked["threads"])
    made = work / "graphs"
    made.mkdir()
    for one_row, name in GRAPHS.items():
        model = without_weights(work, getattr(torch, asked["dtype"]), parts)
        graph = export_step(model, parts, one_row=one_row)
        torch._inductor.aoti_compile_and_package(
            graph,
            package_path=str(made / name),
            inductor_configs={"aot_inductor.package_constants_in_so": False},
        )
    (made / PARTS).write_text(json.dumps(asdict(parts)))
    try:
        made.rename(target)
    except OSError:
        if not (target / PARTS).exists():  # another process has not made them meanwhile
            raise


def without_weights(folder: Path, dtype: torch.dtype, parts: Parts) -> PreTrainedModel:
    """Make a model of a configuration whose weights are nowhere. Its buffers are: inductor writes small ones into the code.

    Args:
        folder: has `config.json`.
        dtype: of the weights.
        parts: what it has to be made of.

    Raises:
        NotCompilableError: if it is another model.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    if (found := parts_of(model, parts.places)) != parts:
        raise NotCompilableError(
            f"its configuration gives another model ({found.architecture}) than {parts.architecture}"
        )
    return model.eval()


def _end_with(parent: int) -> None:
    """End this process when the one that wants the graphs has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except NotCompilableError as error:
        sys.exit(str(error))
