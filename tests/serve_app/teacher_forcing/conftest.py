from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from roentgen.contract import ActivationRequest, RolloutKey
from roentgen.store import StoreWriter
from roentgen.transcripts import Transcript
from serve_app.engines.protocol import Engine
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.teacher_forcing.forced_capture import TeacherForcing

TeacherForce = Callable[..., TeacherForcing]

TRANSCRIPTS = [
    Transcript(
        RolloutKey(config_hash="c", problem_id=f"p{number}"),
        prompt if isinstance(prompt, str) else tuple(prompt),
        completion,
        "stop" if completion is not None and number % 2 else "length",
        {"number": number},
    )
    for number, (prompt, completion) in enumerate(
        [
            ("To be, or not to be", ", that is the question."),
            ([{"role": "user", "content": "hi"}], "Hello, how are you?"),
            ("All of this is prompt.", None),
            ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}], "4"),
            ("x", ""),
            ([{"role": "user", "content": "?"}], ""),
        ]
    )
]
"""Raw and chat, with and without completion, ended and cut, down to one token and none."""


@pytest.fixture
def force(tmp_path: Path) -> Iterator[TeacherForce]:
    """Return a function that makes a `TeacherForcing` into the session "s" of a store in `tmp_path`."""
    writer = StoreWriter(tmp_path, max_wait_s=0.01)

    def make(model: LoadedModel, engine: Engine, chunk_size: int | None = None, **asked: object) -> TeacherForcing:
        request = ActivationRequest.model_validate({"layers": "all", "hook_points": ["resid_post", "embed"]} | asked)
        return TeacherForcing(model, engine, writer, request, "s", chunk_size=chunk_size)

    yield make
    writer.close()
