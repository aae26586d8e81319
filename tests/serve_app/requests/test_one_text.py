"""One text, sent by every route: it is stored in one form, and its rows are the same."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr

from roentgen.contract import ActivationRequest, RolloutKey
from roentgen.store import Session, StoreWriter
from roentgen.transcripts import Transcript
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import load
from serve_app.models.model_source import locate
from serve_app.openai_api.tokenize import TokenizeRequest
from serve_app.replica.model_replica import ModelReplica
from serve_app.teacher_forcing.forced_capture import TeacherForcing
from serve_app.teacher_forcing.tokens import transcript_tokenizer
from tests.serve_app import tiny
from tests.serve_app.replica.test_model_replica import chat, complete, started
from tests.serve_app.tokenizers import KINDS

TEXT = "one  two, three"
TALK = ({"role": "user", "content": "one two"},)


@pytest.fixture(params=["first", "normalizer", "byte level, prefix space", "first, begins and ends"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose tokenizer puts something around a text."""
    tokenizer = KINDS[request.param]()
    config = tiny.config("llama")
    config.vocab_size = len(tokenizer)
    tr.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
async def replica(folder: Path, tmp_path: Path) -> AsyncIterator[ModelReplica]:
    async with started(model=str(folder), store=str(tmp_path / "store"), dtype="float32", device="cpu") as replica:
        yield replica


def asked(session: str) -> dict[str, Any]:
    return {"session_id": session, "layers": "all", "hook_points": ["resid_post"], "positions": "prompt"}


def capture(folder: Path, store: Path, session: str, prompt: str | tuple[dict[str, str], ...]) -> None:
    """What `roentgen capture` does with one line of a file."""
    model = load(locate(str(folder)), "float32", "cpu", lambda _: None)
    text = transcript_tokenizer(model)(Transcript(RolloutKey(config_hash="c", problem_id="p"), prompt))
    engine = TransformersEngine(model)
    with StoreWriter(store) as writer:
        request = ActivationRequest.model_validate(
            {name: value for name, value in asked(session).items() if name != "session_id"}
        )
        list(TeacherForcing(model, engine, writer, request, session).capture([text]))
    engine.close()


def stored(store: Path, session: str) -> tuple[dict[str, Any], torch.Tensor]:
    """A session's one prompt as it is stored, and its rows."""
    opened = Session.open(store / session)
    (row,) = opened.rollouts().to_dict("records")
    (rows,) = opened.activations("layers.2.resid_post")
    n_prompt, segments = int(row["n_prompt"]), [tuple(s.values()) for s in row["segments"]]
    end = int(row["token_offsets"][n_prompt]) if row["n_completion"] else len(row["text"])
    prompt = {
        "text": row["text"][:end],
        "token_ids": [int(token) for token in row["token_ids"][:n_prompt]],
        "token_offsets": [int(offset) for offset in row["token_offsets"][:n_prompt]],
        "segments": [segment for segment in segments if segment[2] <= end],
    }
    return prompt, rows.values


async def test_a_raw_text_is_stored_in_one_form(replica: ModelReplica, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    name = (await replica.status())["model"]["id"]
    tokens = (await replica.tokenize(TokenizeRequest(model=name, prompt=TEXT)))["reply"]["tokens"]
    await complete(replica, prompt=TEXT, max_tokens=2, activations=asked("text"))
    await complete(replica, prompt=tokens, max_tokens=2, activations=asked("tokens"))
    capture(folder, store, "captured", TEXT)
    (form, rows), *others = (stored(store, session) for session in ("text", "tokens", "captured"))
    assert form["token_ids"] == tokens
    assert TEXT in form["text"]
    assert form["segments"] == [("prompt", 0, len(form["text"]))]
    for other, its_rows in others:
        assert other == form
        np.testing.assert_allclose(its_rows, rows, rtol=1e-4, atol=1e-5)


async def test_a_conversation_is_stored_in_one_form(replica: ModelReplica, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    await chat(replica, messages=list(TALK), max_tokens=2, activations=asked("chat"))
    capture(folder, store, "captured", TALK)
    (form, rows), (other, its_rows) = (stored(store, session) for session in ("chat", "captured"))
    assert other == form
    np.testing.assert_allclose(its_rows, rows, rtol=1e-4, atol=1e-5)
    # As raw text, what the template made has the same tokens in the same places.
    await complete(replica, prompt=form["text"], add_special_tokens=False, max_tokens=2, activations=asked("rendered"))
    rendered, its_rows = stored(store, "rendered")
    assert {**rendered, "segments": form["segments"]} == form
    np.testing.assert_allclose(its_rows, rows, rtol=1e-4, atol=1e-5)
