"""Finds a model's hook points without serving it: from its weights, or from its configuration alone."""

from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from serve_app.capture.narrowing import resolve_config
from serve_app.capture.resolver import resolve_structure
from serve_app.capture.structure import ModelStructure
from serve_app.models.adapters import read_model
from serve_app.models.architecture import read_config
from serve_app.models.errors import ModelNotFoundError
from serve_app.models.model_source import ModelSource, locate


def inspect_model(name: str, *, revision: str | None = None, config_only: bool = False) -> ModelStructure:
    """Find and verify a model's hook points.

    Args:
        name: the embedded model, a folder or a hub id; a folder with only a config.json is resolved from that.
        revision: revision of a hub model.
        config_only: do not read weights (nor download those of a hub model).

    Raises:
        ModelNotFoundError: if there is no such model, or transformers cannot load it.
        WeightsError: if weights are missing or belong to another model.
        ResolutionError: if its hook points cannot be found.
    """
    disable_progress_bar()
    source = locate(name, revision)
    try:
        config = read_config(source)
        if config_only or _is_bare(source):
            return resolve_config(config, source.name)
        model = read_model(source, revision=source.commit, dtype="auto").eval()
    except ModelNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"model {name!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    return resolve_structure(model, source.name)


def _is_bare(source: ModelSource) -> bool:
    """Whether a source is a folder without weights."""
    folder = Path(source.path)
    return folder.is_dir() and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())
