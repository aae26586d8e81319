from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from roentgen.store import Session
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.teacher_forcing.already_captured import OtherCaptureError, find_missing
from serve_app.teacher_forcing.tokens import transcript_tokenizer
from tests.serve_app.teacher_forcing.conftest import TRANSCRIPTS, TeacherForce


@pytest.fixture
def texts(llama: LoadedModel) -> Any:
    return [transcript_tokenizer(llama)(transcript) for transcript in TRANSCRIPTS]


def test_a_stopped_capture_goes_on_and_a_finished_one_does_nothing(
    force: TeacherForce, engine: TransformersEngine, llama: LoadedModel, tmp_path: Path, texts: Any
) -> None:
    forcing = force(llama, engine)
    assert find_missing(None, texts, forcing.spec).missing == texts
    list(forcing.capture(texts[:4]))
    session = Session.open(tmp_path / "s")
    assert find_missing(session, texts, forcing.spec).missing == texts[4:]
    list(forcing.capture(texts[4:]))
    assert find_missing(session, texts, forcing.spec).missing == []


def test_a_text_that_has_changed_is_captured_again(
    force: TeacherForce, engine: TransformersEngine, llama: LoadedModel, tmp_path: Path, texts: Any
) -> None:
    forcing = force(llama, engine)
    list(forcing.capture(texts))
    edited = transcript_tokenizer(llama)(replace(TRANSCRIPTS[0], completion=", that is the answer."))
    session = Session.open(tmp_path / "s")
    held = find_missing(session, [edited, *texts[1:]], forcing.spec)
    assert (held.missing, held.changed) == ([edited], 1)
    list(forcing.capture(held.missing))
    assert set(session.rollouts()["text"]) == {edited.sequence.text, *(text.sequence.text for text in texts[1:])}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"layers": [1]},
            r"keys \['embed', 'layers.0.resid_post'.*\] in the session, \['embed', 'layers.1.resid_post'\] requested",
        ),
        ({"positions": "last"}, "positions all in the session, last requested"),
        ({"dtype": "bfloat16"}, r"dtype torch\.float32 in the session, torch\.bfloat16 requested"),
    ],
)
def test_the_same_texts_captured_otherwise_are_refused(
    force: TeacherForce,
    engine: TransformersEngine,
    llama: LoadedModel,
    tmp_path: Path,
    texts: Any,
    asked: Any,
    words: str,
) -> None:
    """Readers would count the later ones only, and the earlier would be hidden."""
    list(force(llama, engine).capture(texts[:1]))
    with pytest.raises(OtherCaptureError, match=words):
        find_missing(Session.open(tmp_path / "s"), texts, force(llama, engine, **asked).spec)


def test_another_models_reading_is_refused_and_other_texts_are_not(
    force: TeacherForce, engine: TransformersEngine, llama: LoadedModel, tmp_path: Path, texts: Any
) -> None:
    forcing = force(llama, engine)
    list(forcing.capture(texts[:1]))
    session, other = Session.open(tmp_path / "s"), forcing.spec.model_copy(update={"revision": "1"})
    with pytest.raises(OtherCaptureError, match=r"model tiny-llama \(0\) in the session, tiny-llama \(1\) requested"):
        find_missing(session, texts, other)
    assert find_missing(session, texts[1:], other).missing == texts[1:]


def test_what_was_computed_in_another_dtype_is_another_capture(
    force: TeacherForce, engine: TransformersEngine, llama: LoadedModel, tmp_path: Path, texts: Any
) -> None:
    """Stored as float32, rows of a model in bfloat16 look like those of one in float32."""
    forcing = force(llama, engine, dtype="float32")
    list(forcing.capture(texts[:1]))
    session = Session.open(tmp_path / "s")
    other = force(replace(llama, dtype=torch.bfloat16), engine, dtype="float32")
    with pytest.raises(
        OtherCaptureError, match=r"computed in torch\.float32 in the session, torch\.bfloat16 requested"
    ):
        find_missing(session, texts, other.spec)
    unsaid = forcing.spec.model_copy(update={"computed_in": None})  # as shards from before
    session.spec = lambda shard: unsaid
    assert find_missing(session, texts, other.spec).missing == texts[1:]
