"""Reads from a model's files, before loading, its type, its layers, and whether weights and a tokenizer are there.

It reports a mistake before something starts that takes a minute. `config.json` is read as plain JSON, because creating
transformers' configuration takes seconds. What the files do not contain is None, and is found out when the model is loaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roentgen.model_names import suggest
from serve_app.capture.structure import check_hook_points, check_layers
from serve_app.models.errors import ModelNotFoundError, WeightsError
from serve_app.models.identity import WEIGHT_SUFFIXES
from serve_app.models.model_source import ModelSource, config_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names of the number of decoder layers in configurations."""

TEXT_PARTS = ("text_config", "llm_config", "language_config", "decoder")
"""Names of the language model's part in configurations of several models."""

TOKENIZER_FILES = ("*token*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "*.spm", "*.vocab")


@dataclass(frozen=True)
class ModelDescription:
    """What a model's files contain about it."""

    name: str
    """The served name."""
    model_type: str | None
    """Transformers' model type."""
    num_layers: int | None
    """Number of decoder layers."""

    def check_capture(self, layers: Any, hook_points: Any) -> None:
        """Reject layers and hook points that the model cannot have.

        Raises:
            CaptureRequestError: naming the first of them.
        """
        check_hook_points(hook_points)
        if self.num_layers is not None:
            check_layers(layers, self.num_layers, self.name)


def describe(source: ModelSource, *, trust_remote_code: bool = False) -> ModelDescription:
    """Read a model's description from its files, and reject what cannot be loaded.

    Args:
        source: where the model is.
        trust_remote_code: whether code that comes with it may run; transformers may then not know its model type.

    Raises:
        ModelNotFoundError: if transformers does not know its model type.
        WeightsError: if its folder has no weights or no tokenizer, or its configuration cannot be read.
    """
    file = config_file(source)
    if file is None:
        return ModelDescription(source.name, None, None)
    config = _read(file)
    kind = config.get("model_type")
    if isinstance(kind, str) and not (trust_remote_code and config.get("auto_map")):
        _check_known(kind, source.name, own_code=bool(config.get("auto_map")))
    if config.get("is_encoder_decoder"):
        raise ModelNotFoundError(
            f"model {source.name!r}: {kind} is an encoder-decoder model; only decoder-only models are served"
        )
    folder = Path(source.path)
    if folder.is_dir():
        if not any(file.suffix in WEIGHT_SUFFIXES for file in folder.iterdir()):
            raise WeightsError(f"model {source.name!r} has no weights: {folder} has no .safetensors or .bin file")
        words, _ = source.tokenizer_at
        if Path(words).is_dir() and not _has_tokenizer(Path(words)):
            raise WeightsError(_no_tokenizer(source.name, words))
    return ModelDescription(source.name, kind if isinstance(kind, str) else None, _layers(config))


def read_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer.

    Raises:
        WeightsError: if there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    words, commit = source.tokenizer_at
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            words, revision=commit, trust_remote_code=trust_remote_code
        )
    except (
        ImportError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
    ) as error:  # transformers raises these on unexpected files
        if Path(words).is_dir() and not _has_tokenizer(Path(words)):
            raise WeightsError(_no_tokenizer(source.name, words)) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"model {source.name!r}: its tokenizer in {words} cannot be read: {reason}") from error
    return found


def _has_tokenizer(folder: Path) -> bool:
    return any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern))


def _no_tokenizer(name: str, folder: str) -> str:
    return (
        f"model {name!r} has no tokenizer: {folder} has neither a tokenizer.json nor another tokenizer's files; "
        "save its tokenizer beside its weights (tokenizer.save_pretrained)"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{file} is not a JSON object")
    return config


def _check_known(kind: str, name: str, *, own_code: bool) -> None:
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if kind not in CONFIG_MAPPING_NAMES:
        way_out = "; --trust-remote-code runs the code that comes with it" if own_code else ""
        raise ModelNotFoundError(
            f"model {name!r}: transformers {__version__} does not know the model type {kind!r} of its config.json"
            f"{suggest(kind, CONFIG_MAPPING_NAMES)}{way_out}"
        )


def _layers(config: dict[str, Any]) -> int | None:
    parts = [config[part] for part in TEXT_PARTS if isinstance(config.get(part), dict)]
    found = [part[name] for part in (*parts, config) for name in LAYERS if isinstance(part.get(name), int)]
    return int(found[0]) if found else None
