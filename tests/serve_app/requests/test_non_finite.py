"""A model that overflows in float16: what it gives is refused, unless a request allows it."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from roentgen.contract import ActivationRequest
from roentgen.store import NonFiniteRowsError, Session, StoreWriter
from serve_app.engines.protocol import NonFiniteLogitsError
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import load
from serve_app.engines.vllm.worker_messages import SyncReply, pack, unpack
from serve_app.models.model_source import locate
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.errors import from_store
from serve_app.replica.model_replica import ModelReplica
from serve_app.teacher_forcing.forced_capture import FailedText, StoredText, TeacherForcing
from serve_app.teacher_forcing.tokens import transcript_tokenizer
from tests.serve_app import tiny
from tests.serve_app.replica.test_model_replica import chat, complete, started, streamed
from tests.serve_app.teacher_forcing.conftest import TRANSCRIPTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose second layer overflows in float16 and in nothing else."""
    path = tmp_path_factory.mktemp("overflowing")
    model = tiny.module("llama")
    model.model.layers[1].mlp.down_proj.weight.data *= 1e7
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
async def replica(folder: Path, tmp_path: Path) -> AsyncIterator[ModelReplica]:
    async with started(model=str(folder), store=str(tmp_path / "store"), dtype="float16", device="cpu") as replica:
        yield replica


def asked(**options: object) -> dict[str, object]:
    return {"session_id": "s", "layers": "all", "hook_points": ["resid_post"], **options}


@pytest.mark.parametrize("positions", ["all", "last", "mean_prompt", "mean_generated"])
async def test_rows_that_are_not_finite_fail_the_request(replica: ModelReplica, tmp_path: Path, positions: str) -> None:
    failed, fine = await asyncio.gather(
        chat(replica, temperature=0, activations=asked(positions=positions)),
        chat(replica, activations=asked(positions=positions, layers=[0], allow_non_finite=True)),
    )
    error = failed["error"]
    assert (error["status"], error["code"], error["param"]) == (500, "non_finite_rows", "activations")
    assert "first layers.1.resid_post" in error["message"]
    assert "bfloat16" in error["message"]
    assert "allow_non_finite" in error["message"]
    assert fine["reply"]["activations"]["tensors"]  # beside it, rows that are finite are stored
    assert len(Session.open(tmp_path / "store/s").rollouts()) == 1
    chunks = await streamed(
        replica, ChatRequest, messages=[{"role": "user", "content": "hi"}], max_tokens=3, activations=asked()
    )
    assert chunks[-1]["error"]["code"] == "non_finite_rows"


async def test_a_request_may_allow_them(replica: ModelReplica, tmp_path: Path) -> None:
    reply = (await chat(replica, activations=asked(allow_non_finite=True, **{"return": "full"})))["reply"]
    found = reply["activations"]
    n_rows = found["row_stop"] - found["row_start"]
    assert found["non_finite_rows"] == n_rows
    json.dumps(reply, allow_nan=False)  # JSON has no NaN
    assert None not in found["tensors"]["layers.0.resid_post"]["data"][0][0]
    assert set(found["tensors"]["layers.2.resid_post"]["data"][0][0]) == {None}
    (row,) = Session.open(tmp_path / "store/s").rollouts().to_dict("records")
    assert row["non_finite_rows"] == n_rows
    (item,) = Session.open(tmp_path / "store/s").activations("layers.2.resid_post")
    assert not item.values.isfinite().any()
    sample = (await chat(replica, activations=asked(allow_non_finite=True, layers=[0], **{"return": "sample"})))[
        "reply"
    ]
    assert "non_finite_rows" not in sample["activations"]


async def test_without_rows_to_tell_it_the_logits_do(replica: ModelReplica) -> None:
    for reply in (await chat(replica, temperature=0), await complete(replica, prompt="hi", max_tokens=3)):
        assert (reply["error"]["status"], reply["error"]["code"]) == (500, "non_finite_logits")
    # Of rows that are finite, too, the generated tokens mean nothing.
    reply = await chat(replica, activations=asked(layers=[0]))
    assert reply["error"]["code"] == "non_finite_logits"


def test_a_worker_tells_its_replica_why() -> None:
    """vLLM's workers write rows in another process, by the same code; what fails there crosses as it is."""
    failed = {"rows": NonFiniteRowsError("1 of 2 rows"), "logits": NonFiniteLogitsError()}
    told = unpack(pack(SyncReply({}, failed, has_room=True, n_jobs=0, prefix_bytes=0)), SyncReply).failed
    rows = from_store(told["rows"], "activations_not_stored")
    assert [rows.code, told["logits"].code] == ["non_finite_rows", "non_finite_logits"]
    assert rows.headers() == {"x-should-retry": "false"}


def test_texts_that_are_read_are_not_captured_and_say_why(folder: Path, tmp_path: Path) -> None:
    model = load(locate(str(folder)), "float16", "cpu", lambda _: None)
    texts = [transcript_tokenizer(model)(transcript) for transcript in TRANSCRIPTS]
    engine = TransformersEngine(model)
    with StoreWriter(tmp_path) as writer:

        def capture(session: str, **options: object) -> list[StoredText | FailedText]:
            request = ActivationRequest.model_validate({"layers": "all", "hook_points": ["resid_post"], **options})
            return list(TeacherForcing(model, engine, writer, request, session).capture(texts))

        refused = capture("refused")
        assert all(isinstance(one, FailedText) and "NaN or infinity" in one.reason for one in refused)
        assert len(refused) == len(texts)
        assert not (tmp_path / "refused").exists()
        assert all(isinstance(one, StoredText) for one in capture("finite", layers=[0]))
        assert all(isinstance(one, StoredText) for one in capture("kept", allow_non_finite=True))
    engine.close()
    frame = Session.open(tmp_path / "kept").rollouts()
    assert (frame["non_finite_rows"] == frame["row_stop"] - frame["row_start"]).all()


def test_in_another_dtype_it_is_a_model_like_any(folder: Path, tmp_path: Path) -> None:
    """The control: float16 overflows, and nothing else is wrong with these weights."""
    model = load(locate(str(folder)), "float32", "cpu", lambda _: None)
    with torch.no_grad():
        assert model.observed._module(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
