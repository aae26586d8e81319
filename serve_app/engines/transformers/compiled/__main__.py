"""Compiles a decoding step: `python -m serve_app.engines.transformers.compiled REQUEST_FOLDER TARGET_FOLDER`.

The graphs do not depend on the weights, so this process builds the model from its configuration alone. `compilation` starts
the process and pauses it while the engine decodes. `compilation` does not import this module, because it needs packages that
serving does not.
"""

import json
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.exc import CppCompileError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from serve_app.engines.transformers.compiled.compilation import GRAPHS, PARTS, REQUEST
from serve_app.engines.transformers.compiled.graph import GraphParts, NotCompilableError, export_step, parts_of
from serve_app.engines.transformers.compiled.operations import SOURCE, library_file, load

NICENESS = 10


def main(work: Path, target: Path) -> None:
    """Compile the graphs that a request folder specifies.

    Args:
        work: contains the request; unfinished files are written there.
        target: folder for the finished graphs.

    Raises:
        NotCompilableError: if the model cannot be compiled.
    """
    os.nice(NICENESS)
    threading.Thread(target=_exit_with, args=(os.getppid(),), name="exit-with-engine", daemon=True).start()
    asked = json.loads((work / REQUEST).read_text())
    parts = GraphParts(
        asked["parts"]["architecture"],
        tuple((path, outputs) for path, outputs in asked["parts"]["linears"]),
        tuple(asked["parts"]["observed_modules"]),
    )
    torch.set_num_threads(asked["threads"])
    library = library_file()
    if not library.exists():
        build(work).replace(library)
    load(library)
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
        if not (target / PARTS).exists():  # unless another process has compiled them meanwhile
            raise


def build(folder: Path) -> Path:
    """Compile the operations into a folder, with inductor's flags for this processor; returns the library.

    Raises:
        NotCompilableError: if the compiler fails.
    """
    options = CppTorchOptions(vec_isa=pick_vec_isa(), include_pytorch=True)
    builder = CppBuilder("operations", str(SOURCE), options, str(folder))
    try:
        builder.build()
    except CppCompileError as error:
        reason = next((line for line in str(error).splitlines() if "error:" in line), str(error).splitlines()[0])
        raise NotCompilableError(f"the operations cannot be compiled: {reason}") from error
    return Path(builder.get_target_file_path())


def without_weights(folder: Path, dtype: torch.dtype, parts: GraphParts) -> PreTrainedModel:
    """Create a configuration's model without weights. It does have buffers: inductor compiles small ones into the code.

    Args:
        folder: contains `config.json`.
        dtype: dtype of the weights.
        parts: the parts that the model must have.

    Raises:
        NotCompilableError: if it has other parts.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    if (found := parts_of(model, parts.observed_modules)) != parts:
        raise NotCompilableError(
            f"its configuration builds another model ({found.architecture}) than {parts.architecture}"
        )
    return model.eval()


def _exit_with(parent: int) -> None:
    """Exit when the process that wants the graphs has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except NotCompilableError as error:
        sys.exit(str(error))
