"""A loaded model, served from this process: the replies and rows are the model's own, and nothing of it stays behind."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
import torch

import roentgen
from roentgen.serving.local_server import LaunchError
from tests.roentgen.api.conftest import folder, model, reference

__all__ = ["folder", "model", "reference"]  # fixtures: a tiny model

CHAT = [{"role": "user", "content": "hi"}]
KEPT = {"session_id": "s", "layers": [1], "hook_points": ["resid_post"]}


@pytest.fixture(scope="module")
def server(model: roentgen.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[roentgen.Server]:
    with roentgen.serve(model, store=str(tmp_path_factory.mktemp("store"))) as running:
        yield running


def test_what_it_says_and_keeps_is_the_model_s_own(model: roentgen.Model, server: roentgen.Server) -> None:
    (own,) = model.generate([CHAT], max_tokens=6, capture={"layers": [1], "hook_points": ["resid_post"]})
    assert [card.id for card in server.client.models.list()] == [model.name]
    reply = server.client.chat.completions.create(
        model=model.name, messages=CHAT, max_tokens=6, temperature=0, extra_body={"activations": KEPT}
    )
    assert reply.choices[0].message.content == own.text
    assert reply.usage.completion_tokens == len(own.token_ids)
    session = roentgen.Session.open(reply.activations["uri"])
    (rows,) = session.activations("layers.1.resid_post")
    torch.testing.assert_close(rows.values, own["layers.1.resid_post"])
    pieces = server.client.chat.completions.create(
        model=model.name, messages=CHAT, max_tokens=6, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == own.text


def test_it_serves_the_weights_as_they_are(folder: Path, reference: object, tmp_path: Path) -> None:
    """Also those that were changed after they were loaded."""
    with roentgen.load(str(folder), dtype="float32", device="cpu") as changed:
        before = changed.generate("abc", max_tokens=8)[0].text
        head = changed.nnsight._module.lm_head.weight.data
        head.copy_(head.roll(1, 0))
        after = changed.generate("abc", max_tokens=8)[0].text
        assert after != before
        with roentgen.serve(changed, store=str(tmp_path)) as server:
            said = server.client.completions.create(model=changed.name, prompt="abc", max_tokens=8, temperature=0)
            assert said.choices[0].text == after


def test_errors_are_the_server_s(model: roentgen.Model, server: roentgen.Server) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'other' is not served here"):
        server.client.chat.completions.create(model="other", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match=r"activations.layers: 9 is out of range"):
        server.client.chat.completions.create(
            model=model.name, messages=CHAT, extra_body={"activations": {**KEPT, "layers": [9]}}
        )
    swap = httpx2.post(f"{server.base_url}/models/load", json={"model_id": server.config.model})
    assert swap.status_code == 403
    assert "cannot take the place of a script's own model" in swap.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(model: roentgen.Model, server: roentgen.Server, stream: bool) -> None:
    engine = model._held.engine
    assert engine is not None
    body = {"model": model.name, "prompt": "a", "max_tokens": 450, "ignore_eos": True, "n": 8, "stream": stream}
    address = urlsplit(server.base_url)
    with socket.create_connection((address.hostname, address.port)) as client:
        request = httpx2.Request("POST", f"{server.base_url}/completions", json=body)
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        client.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        wait_for(lambda: engine.load.running > 0)
    wait_for(lambda: engine.load.running == engine.load.waiting == 0, 5)


def test_nothing_of_it_stays(model: roentgen.Model, tmp_path: Path) -> None:
    before = threading.active_count()
    with roentgen.serve(model, store=str(tmp_path)) as server:
        server.client.models.list()
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{server.base_url}/models")
    wait_for(lambda: threading.active_count() <= before)
    assert model.generate("a", max_tokens=1)[0].finish_reason == "length"


def test_coroutines_serve_too(model: roentgen.Model, tmp_path: Path) -> None:
    async def asked() -> list[str]:
        async with roentgen.serve(model, store=str(tmp_path)) as server:
            create = server.async_client.completions.create
            replies = await asyncio.gather(
                *(create(model=model.name, prompt=text, max_tokens=3, temperature=0) for text in "abc")
            )
            return [reply.choices[0].text for reply in replies]

    assert asyncio.run(asked()) == [out.text for out in model.generate(["a", "b", "c"], max_tokens=3)]


def test_what_is_of_the_model_cannot_be_chosen_again(model: roentgen.Model, tmp_path: Path) -> None:
    with pytest.raises(roentgen.RequestError, match="dtype: the model is loaded already; allowed are cors_origins"):
        roentgen.serve(model, dtype="float16")
    with (
        roentgen.serve(model, store=str(tmp_path)) as server,
        pytest.raises(LaunchError, match="choose another"),
        roentgen.serve(model, store=str(tmp_path), port=urlsplit(server.base_url).port),
    ):
        pass


def wait_for(condition: object, seconds: float = 30) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()
