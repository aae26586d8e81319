"""A server while things happen to it, through real Serve and real HTTP: models are swapped, clients leave, replicas die."""

import asyncio
import json
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from safetensors.torch import load_file, save_file

from serve_app.app import most_per_replica
from serve_app.config import ServerConfig
from tests.conftest import RayHome, Server, clean_up, start_server
from tests.serve_app import tiny

pytestmark = pytest.mark.integration
TIMEOUT_S = 12
MAX_QUEUE = 16
LONG = {"max_tokens": 15_000, "logit_bias": {str(tiny.EOS): -100}, "temperature": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny models with room for generations that take longer than any of these tests."""
    base = tmp_path_factory.mktemp("models")
    for name in ("llama", "qwen3"):
        tiny.module(name).save_pretrained(base / name)
        tiny.tokenizer().save_pretrained(base / name)
        config = json.loads((base / name / "config.json").read_text())
        (base / name / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20_000}))
    return {name: base / name for name in ("llama", "qwen3")}


@pytest.fixture(scope="module")
def served(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, RayHome]]:
    """One place in the batch, a short queue, and a short limit for requests."""
    home = RayHome(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    options = ["--max-batch", "1", "--max-queue", str(MAX_QUEUE), "--request-timeout", str(TIMEOUT_S)]
    options += ["--model", str(folders["llama"])]
    for allowed in (folders["qwen3"], "/no/such/folder"):
        options += ["--allow-model", str(allowed)]
    server = start_server(tmp_path_factory.mktemp("store"), home, *options)
    yield server, home
    server.process.terminate()
    try:
        assert server.process.wait(60) == 0
    finally:
        server.process.kill()
        clean_up(home)


def body(model: str = "llama", **extra: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, **extra}


def chat(server: Server, model: str = "llama", **extra: Any) -> httpx2.Response:
    return httpx2.post(f"{server.base_url}/chat/completions", json=body(model, **extra), timeout=60)


def gauge(server: Server, name: str) -> float:
    text = httpx2.get(f"{server.root}/metrics", timeout=10).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name}{{"))


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(served: tuple[Server, RayHome], stream: bool) -> None:
    server, _ = served
    with httpx2.Client(timeout=60) as leaving:
        if stream:
            with leaving.stream("POST", f"{server.base_url}/chat/completions", json=body(stream=True, **LONG)) as reply:
                lines = reply.iter_lines()
                assert next(lines).startswith("data: ")
                wait_for(lambda: gauge(server, "roentgen_generations_running") == 1, 5)
        else:
            with pytest.raises(httpx2.ReadTimeout):
                leaving.post(f"{server.base_url}/chat/completions", json=body(**LONG), timeout=1)
    start = time.monotonic()
    assert chat(server).status_code == 200  # the only place in the batch
    assert time.monotonic() - start < TIMEOUT_S / 2  # long before the first would have ended
    wait_for(lambda: gauge(server, "roentgen_generations_running") == 0, 5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_gone_from_it(served: tuple[Server, RayHome], stream: bool) -> None:
    server, _ = served
    url = f"{server.base_url}/chat/completions"
    with httpx2.Client(timeout=60) as first, first.stream("POST", url, json=body(stream=True, **LONG)) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(url, json=body(stream=stream), timeout=1)
        wait_for(lambda: gauge(server, "roentgen_generations_waiting") == 0, 5)
        assert gauge(server, "roentgen_generations_running") == 1


def test_clients_that_leave_at_any_moment_are_no_failures(served: tuple[Server, RayHome]) -> None:
    """Before their body is whole, in the queue, while they are answered: no 5xx is counted and no traceback logged."""
    server, home = served
    dice = random.Random(0)

    async def leave(number: int) -> None:
        message = json.dumps(body(stream=bool(number % 2), **LONG)).encode()
        sent = message[: len(message) // 2] if number % 3 == 0 else message
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(message)}\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", int(server.root.rpartition(":")[2]))
        writer.write(f"{head}Content-Type: application/json\r\nX-Request-Id: leaves-{number}\r\n\r\n".encode() + sent)
        await writer.drain()
        await asyncio.sleep(dice.choice([0, 0.01, 0.1, 0.5]) * dice.random())
        writer.transport.abort()

    async def leave_all() -> None:
        await asyncio.gather(*(leave(number) for number in range(60)))

    before = failures(server)
    asyncio.run(leave_all())
    assert chat(server).status_code == 200
    wait_for(lambda: gauge(server, "roentgen_generations_running") == 0, 10)
    assert httpx2.get(f"{server.base_url}/models").status_code == 200
    assert failures(server) == before
    logs = {file.name: file.read_text() for file in Path(home.path).rglob("*.err")}
    assert sum('"leaves-' in text for text in logs.values())  # these are the logs of the ingress
    assert [name for name, text in logs.items() if "Traceback" in text] == []


def failures(server: Server) -> list[str]:
    text = httpx2.get(f"{server.root}/metrics", timeout=10).text
    counts = [line for line in text.splitlines() if line.startswith("roentgen_requests_total{")]
    return [line for line in counts if 'status="5' in line and '"/health"' not in line]


def test_a_request_that_takes_too_long_is_408(served: tuple[Server, RayHome]) -> None:
    server, _ = served
    late = chat(server, **LONG)
    assert (late.status_code, late.json()["error"]["code"]) == (408, "timeout")
    assert chat(server).status_code == 200


def test_ids_are_echoed_chunks_are_counted_and_no_origin_is_let_in(served: tuple[Server, RayHome]) -> None:
    server, home = served
    reply = httpx2.post(
        f"{server.base_url}/chat/completions",
        json=body(),
        headers={"X-Request-Id": "of-this-test", "Origin": "https://x.y"},
    )
    assert reply.headers["x-request-id"] == "of-this-test"
    odd = httpx2.get(f"{server.base_url}/models", headers={"X-Request-Id": b"\xe9\xff", "traceparent": b"\xff"})
    assert (odd.status_code, odd.headers["x-request-id"]) == (200, "éÿ")
    assert not [name for name in reply.headers if name.startswith("access-control")]
    pieces = (b" " * 1_000_000 for _ in range(33))
    big = httpx2.post(
        f"{server.base_url}/chat/completions", content=pieces, headers={"content-type": "application/json"}
    )
    assert (big.status_code, "larger than" in big.json()["error"]["message"]) == (413, True)
    logs = [file.read_text() for file in Path(home.path).rglob("*.err")]
    lines = [json.loads(line) for text in logs for line in text.splitlines() if '"of-this-test"' in line]
    assert [(line["route"], line["status"]) for line in lines if "route" in line] == [("/v1/chat/completions", 200)]


def test_health_answers_while_a_replica_does_not(served: tuple[Server, RayHome]) -> None:
    server, home = served

    def health() -> httpx2.Response:
        return httpx2.get(f"{server.root}/health", timeout=4)  # less than a replica is given to answer

    (replica,) = replicas(home)
    replica.suspend()
    try:
        wait_for(lambda: health().json()["stage"] == "waiting for the replicas to answer")
        assert health().status_code == 503
    finally:
        replica.resume()
    wait_for(lambda: health().status_code == 200)
    assert chat(server).status_code == 200


def test_replicas_that_hang_gather_a_bounded_number_of_requests(served: tuple[Server, RayHome]) -> None:
    server, home = served
    (replica,) = replicas(home)
    most = 2 * most_per_replica(
        ServerConfig(max_batch=1, max_queue=MAX_QUEUE)
    )  # on their way, and in Serve's own queue

    async def send_all() -> list[httpx2.Response]:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx2.AsyncClient(timeout=120, limits=limits) as client:
            url = f"{server.base_url}/chat/completions"
            sent = [asyncio.create_task(client.post(url, json=body(max_tokens=1))) for _ in range(most + 50)]
            try:
                refused = await next(asyncio.as_completed(sent))  # while the replica still hangs
                assert refused.status_code == 429, refused.text
            finally:
                replica.resume()
            return await asyncio.gather(*sent)

    replica.suspend()
    replies = asyncio.run(send_all())
    # On a slow machine the last of those that were let in may be too late.
    assert {reply.status_code for reply in replies} <= {200, 408, 429}
    refused = [reply for reply in replies if reply.status_code == 429]
    assert {reply.headers["retry-after"] for reply in refused} == {"2"}
    assert {reply.json()["error"]["code"] for reply in refused} == {"busy"}
    assert len(refused) >= 50
    wait_for(lambda: httpx2.get(f"{server.root}/health", timeout=10).status_code == 200)


def test_an_unknown_session_is_said_without_where_sessions_are(served: tuple[Server, RayHome]) -> None:
    server, _ = served
    for method in ("GET", "DELETE"):
        reply = httpx2.request(method, f"{server.base_url}/activations/session/none-such")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "session_not_found")
        assert reply.json()["error"]["message"] == "there is no session 'none-such'"


def test_an_empty_body_is_said_to_be_empty(served: tuple[Server, RayHome]) -> None:
    server, _ = served
    reply = httpx2.post(f"{server.base_url}/chat/completions")
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "the body is empty; send a JSON object")


def test_another_model_is_loaded_while_health_is_live(served: tuple[Server, RayHome], folders: dict[str, Path]) -> None:
    server, home = served
    (before,) = replicas(home)
    seen: list[tuple[int, dict[str, str]]] = []
    refused: list[httpx2.Response] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            health = httpx2.get(f"{server.root}/health", timeout=10)
            seen.append((health.status_code, health.json()))
            if health.status_code == 503 and not refused:
                refused.append(chat(server))

    watcher = threading.Thread(target=watch)
    points = [{"name": "middle", "selector": "model.layers[1].mlp.down_proj"}]
    swapped: list[httpx2.Response] = []
    swap = threading.Thread(target=lambda: swapped.append(load(server, folders["qwen3"], savepoints=points)))
    running = body(stream=True, **{**LONG, "max_tokens": 500})
    with httpx2.stream("POST", f"{server.base_url}/chat/completions", json=running, timeout=60) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")  # it runs when the swap is asked for
        watcher.start()
        swap.start()
        rest = list(lines)
    swap.join()
    done.set()
    watcher.join()
    (loaded,) = swapped
    assert (loaded.status_code, loaded.json()["id"]) == (200, "qwen3")
    assert any('"length"' in line for line in rest)  # it was let finish
    assert "data: [DONE]" in rest
    stages = {health["stage"].split(" ")[0] for status, health in seen if status == 503}
    assert stages & {"draining", "loading", "freeing", "verifying"}
    assert (refused[0].status_code, refused[0].headers["retry-after"]) == (503, "2")
    assert replicas(home) == [before]  # the process has stayed
    kept = chat(server, "qwen3", activations={"layers": [0], "hook_points": ["middle", "resid_post"]})
    assert set(kept.json()["activations"]["tensors"]) == {"middle", "layers.0.resid_post"}
    structure = httpx2.get(f"{server.base_url}/model/structure").json()
    assert structure["savepoints"] == {"middle": "model.layers.1.mlp.down_proj.output"}
    assert chat(server).status_code == 404


def test_what_may_not_or_cannot_be_loaded(served: tuple[Server, RayHome], folders: dict[str, Path]) -> None:
    server, _ = served
    current = httpx2.get(f"{server.base_url}/models").json()["data"][0]["id"]
    path = folders["llama"]
    for model, extra, status, words in (
        ("/etc", {}, 403, "allowed_models"),
        (path, {"trust_remote_code": True}, 403, "trust_remote_code"),
        (path, {"savepoints": [{"name": "a", "selector": "model.__class__()"}]}, 400, "not a selector"),
        (path, {"savepoints": [{"name": "a", "selector": "model.layers[9]"}]}, 400, "is still served"),
        ("/no/such/folder", {}, 404, "is still served"),
    ):
        reply = load(server, model, **extra)
        assert (reply.status_code, words in reply.json()["error"]["message"]) == (status, True), reply.text
        assert chat(server, current).status_code == 200


def test_a_killed_replica_is_said_and_comes_back_with_the_model_loaded_last(
    served: tuple[Server, RayHome], folders: dict[str, Path]
) -> None:
    server, home = served
    assert load(server, folders["qwen3"]).status_code == 200
    unary: list[httpx2.Response] = []
    with httpx2.stream(
        "POST", f"{server.base_url}/chat/completions", json=body("qwen3", stream=True, **LONG)
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        waiting = threading.Thread(target=lambda: unary.append(chat(server, "qwen3")))
        waiting.start()
        wait_for(lambda: gauge(server, "roentgen_generations_waiting") == 1)
        (replica,) = replicas(home)
        replica.kill()
        rest = [line for line in lines if line]
    waiting.join()
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
    assert (unary[0].status_code, unary[0].json()["error"]["type"]) == (503, "service_unavailable_error")
    refused = chat(server, "qwen3")  # at once: it does not wait for the next replica
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
    assert "starting a replica" in refused.json()["error"]["message"]
    wait_for(lambda: httpx2.get(f"{server.root}/health", timeout=30).status_code == 200)
    assert chat(server, "qwen3").status_code == 200


def load(server: Server, model: Path | str, **options: Any) -> httpx2.Response:
    return httpx2.post(f"{server.base_url}/models/load", json={"model_id": str(model), **options}, timeout=120)


def revisions(server: Server) -> set[str]:
    """Return the revisions that the server says it serves, asked often enough to meet each replica."""
    return {httpx2.get(f"{server.base_url}/models").json()["data"][0]["revision"] for _ in range(6)}


def replicas(home: RayHome) -> list[psutil.Process]:
    """Return the processes that hold a model: those of the RayHome's replicas."""
    ours = {child.pid for process in home.processes() for child in [process, *process.children(recursive=True)]}
    return [
        p for p in psutil.process_iter() if p.pid in ours and "ServeReplica:roentgen:model" in " ".join(p.cmdline())
    ]


def test_two_replicas_swap_together_and_one_lost_comes_back_as_the_other(
    folders: dict[str, Path], ray_home: RayHome, tmp_path: Path
) -> None:
    options = ["--num-replicas", "2", "--model", str(folders["llama"]), "--allow-model", str(folders["qwen3"])]
    server = start_server(tmp_path / "store", ray_home, *options)
    try:
        wait_for(lambda: len(replicas(ray_home)) == 2 and len(loads(server)) == 2)
        before = replicas(ray_home)
        assert load(server, folders["qwen3"]).status_code == 200
        assert replicas(ray_home) == before
        # The same folder with other weights is another model, which both serve before the answer comes.
        former, weights = revisions(server), load_file(folders["qwen3"] / "model.safetensors")
        weights["model.norm.weight"] *= 1.5
        save_file(weights, folders["qwen3"] / "model.safetensors", metadata={"format": "pt"})
        assert load(server, folders["qwen3"]).status_code == 200
        assert len(former | revisions(server)) == 2
        assert replicas(ray_home) == before
        assert {chat(server, "qwen3").status_code for _ in range(20)} == {200}  # whichever replica it meets
        before[0].kill()
        wait_for(lambda: chat(server, "qwen3").status_code == 200, 10)
        wait_for(lambda: len(loads(server)) == 2 and len(replicas(ray_home)) == 2)
        assert before[1] in replicas(ray_home)
        replies = [chat(server, "qwen3", activations={"layers": [0]}) for _ in range(20)]
        assert [reply.status_code for reply in replies] == [200] * 20
        assert len({reply.json()["activations"]["rollout_id"] for reply in replies}) == 20
    finally:
        server.process.terminate()
        server.process.wait(60)


def loads(server: Server) -> list[str]:
    """Return what `/metrics` says of each replica that answers."""
    text = httpx2.get(f"{server.root}/metrics", timeout=10).text
    return [line for line in text.splitlines() if line.startswith("roentgen_generations_running{")]


FRAGILE = """
from pathlib import Path

from transformers import LlamaForCausalLM


class FragileForCausalLM(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        if Path(self.config.breaks_if).exists():
            raise RuntimeError("the device is broken")
        return super().forward(*args, **kwargs)
"""


@pytest.fixture
def fragile(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A model that comes with code of its own, which fails for as long as there is a file `broken` beside it."""
    folder = tmp_path / "fragile"
    shutil.copytree(folders["llama"], folder)
    (folder / "modeling_fragile.py").write_text(FRAGILE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_fragile.FragileForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config | {"breaks_if": str(tmp_path / "broken")}))
    return folder


def test_an_engine_that_gives_up_is_replaced(fragile: Path, ray_home: RayHome, tmp_path: Path) -> None:
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    options = ["--model", str(fragile), "--trust-remote-code"]
    server = start_server(tmp_path / "store", ray_home, *options, environment=environment)
    try:
        (before,) = replicas(ray_home)
        assert chat(server, "fragile").status_code == 200
        (tmp_path / "broken").touch()
        failed = [chat(server, "fragile") for _ in range(3)]
        (tmp_path / "broken").unlink()
        assert [reply.status_code for reply in failed] == [500] * 3
        assert "the device is broken" in failed[0].json()["error"]["message"]
        refused = chat(server, "fragile")
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "service_unavailable_error")
        wait_for(lambda: not before.is_running() and httpx2.get(f"{server.root}/health", timeout=10).status_code == 200)
        assert chat(server, "fragile").status_code == 200
    finally:
        server.process.terminate()
        server.process.wait(60)
