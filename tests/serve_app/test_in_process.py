"""A loaded model, served from this process: the replies and rows are the model's own, and nothing of it stays behind."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
import torch

import roentgen
from roentgen.serving.local_server import LaunchError, is_enough, serving
from serve_app.config import ServerConfig
from serve_app.in_process import _watch
from serve_app.replica.model_replica import ModelReplica
from serve_app.replica.model_slot import ModelSlot
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
    assert "cannot replace a model that a script has loaded" in swap.json()["error"]["message"]


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
    with pytest.raises(roentgen.RequestError, match="dtype: not allowed for a loaded model; allowed are cors_origins"):
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


@pytest.fixture(scope="module")
def replica(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What `roentgen serve` runs where one process is enough: a replica that loads a tiny model itself."""
    config = ServerConfig(model=str(folder), dtype="float32", device="cpu", store=str(tmp_path_factory.mktemp("store")))
    assert is_enough(config)
    with serving(config, stage=lambda _: None) as base_url:
        yield base_url


def test_a_replica_answers_as_a_loaded_model_does(model: roentgen.Model, replica: str) -> None:
    body = {"model": model.name, "prompt": "abc", "max_tokens": 6, "temperature": 0}
    reply = httpx2.post(f"{replica}/completions", json=body)
    assert reply.json()["choices"][0]["text"] == model.generate("abc", max_tokens=6)[0].text
    assert reply.headers["x-request-id"]
    assert httpx2.post(f"{replica}/completions", json=body, headers={"X-Request-Id": "mine"}).headers[
        "x-request-id"
    ] == ("mine")


def test_a_replica_loads_the_model_that_it_is_told_to(folder: Path, replica: str) -> None:
    same = httpx2.post(f"{replica}/models/load", json={"model_id": str(folder)}, timeout=60)
    assert same.status_code == 200, same.text
    other = httpx2.post(f"{replica}/models/load", json={"model_id": "/no/such/folder"})
    assert other.status_code == 403
    assert httpx2.get(f"{replica.removesuffix('/v1')}/health").json()["status"] == "ok"


def test_an_engine_that_has_died_is_loaded_again(folder: Path, tmp_path: Path) -> None:
    slot = ModelSlot(ServerConfig(model=str(folder), dtype="float32", device="cpu", store=str(tmp_path)))
    replica = ModelReplica(slot._config, slot)
    over = threading.Event()
    watching = threading.Thread(target=_watch, args=(replica, over, 0.05))
    replica.reconfigure(slot._config.choice.model_dump(mode="json"))
    try:
        wait_until(lambda: slot.ready)
        died = slot.served
        assert died is not None
        died.engine.close()
        assert not slot.ready
        watching.start()
        wait_until(lambda: slot.ready)
        assert slot.served is not died
    finally:
        over.set()
        watching.join()
        replica.close()


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "options", [{"num_replicas": 2}, {"max_replicas": 2}, {"num_ingresses": 2}, {"engine": "vllm"}]
)
def test_what_one_process_is_not_enough_for(options: dict[str, Any]) -> None:
    assert not is_enough(ServerConfig.model_validate({"device": "cpu", **options}))
