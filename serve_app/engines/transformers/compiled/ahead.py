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
import subprocess
import sys
import tempfile
import threading
import time
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


def start(wanted: Wanted) -> subprocess.Popen[str]:
    """Start the process that compiles, in a group of its own; what it says is on its standard error.

    It is of this session: where it is stopped when this process ends, the kernel ends it too.
    """
    folder = Path(tempfile.mkdtemp(prefix="roentgen-compile-"))
    (folder / REQUEST).write_text(json.dumps(asdict(wanted), default=str))
    (folder / CONFIG).write_text(json.dumps(wanted.config, default=str))
    command = [sys.executable, "-m", __name__, str(folder), str(wanted.folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0)


def main(request: Path, target: Path) -> None:
    """Compile what a folder asks for into another.

    Raises:
        NotCompilableError: if that cannot be done.
    """
    os.nice(NICENESS)
    threading.Thread(target=_end_with, args=(os.getppid(),), name="ends-with-engine", daemon=True).start()
    asked = json.loads((request / REQUEST).read_text())
    parts = Parts(
        asked["parts"]["architecture"],
        tuple((path, outputs) for path, outputs in asked["parts"]["linears"]),
        tuple(asked["parts"]["places"]),
    )
    torch.set_num_threads(asked["threads"])
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        for one_row, name in GRAPHS.items():
            model = without_weights(request, getattr(torch, asked["dtype"]), parts)
            graph = export_step(model, parts, one_row=one_row)
            torch._inductor.aoti_compile_and_package(
                graph,
                package_path=str(made / name),
                inductor_configs={"aot_inductor.package_constants_in_so": False},
            )
        (made / PARTS).write_text(json.dumps(asdict(parts)))
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(request, ignore_errors=True)


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
