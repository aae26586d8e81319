from collections.abc import Iterator

import pytest

from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel
from tests.serve_app import tiny


@pytest.fixture(scope="session")
def llama() -> LoadedModel:
    return tiny.loaded("llama")


@pytest.fixture
def engine(llama: LoadedModel) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(llama)
    yield engine
    engine.close()
