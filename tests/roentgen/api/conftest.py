"""One tiny model in a folder, as a script loads it, and the same weights in plain transformers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers as tr

import roentgen
from tests.probes.conftest import build_run, planted
from tests.serve_app.engines.subjects import save_tiny

__all__ = ["build_run", "planted"]  # fixtures: a run whose activations are planted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models") / "tiny"


@pytest.fixture(scope="module")
def reference(folder: Path) -> tr.PreTrainedModel:
    return save_tiny(folder)


@pytest.fixture(scope="module")
def model(folder: Path, reference: tr.PreTrainedModel) -> Iterator[roentgen.Model]:
    with roentgen.load(str(folder), dtype="float32", device="cpu") as loaded:
        yield loaded
