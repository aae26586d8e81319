"""The server as its users meet it: real Serve, real HTTP, the unmodified openai client, SmolLM2-135M."""

import asyncio
import io
import json
import tarfile
import time
from pathlib import Path

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from roentgen.store import Session, verify
from roentgen.store.pulling import pull
from tests.conftest import RayHome, Server, start_server
from tests.reference import teacher_forced, worst_error

pytestmark = pytest.mark.integration
MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is 2 + 3? Answer briefly."}]


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.base_url, api_key="none", max_retries=0)


def ask(client: OpenAI, **extra: object) -> openai.types.chat.ChatCompletion:
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 16, "temperature": 0, **extra}
    return client.chat.completions.create(**body)


def test_models_and_structure(server: Server, client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert model.model_extra is not None
    assert (model.model_extra["num_layers"], model.model_extra["d_model"]) == (30, 576)
    structure = httpx2.get(f"{server.base_url}/model/structure").json()
    assert structure["layer_access_pattern"] == "model.layers[i]"
    assert "/v1/chat/completions" in httpx2.get(f"{server.root}/openapi.json").json()["paths"]


def test_usage_and_finish_reasons_are_true(client: OpenAI) -> None:
    cut, whole = ask(client, max_tokens=3), ask(client, max_tokens=100)
    assert cut.usage is not None
    assert whole.usage is not None
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_stop_seed_and_temperature_are_honoured(client: OpenAI) -> None:
    free = ask(client, max_tokens=40).choices[0].message.content or ""
    stopped = ask(client, max_tokens=40, stop=[" "]).choices[0]
    assert stopped.message.content == free.split(" ")[0]
    assert stopped.finish_reason == "stop"
    hot = [ask(client, temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_a_stream_says_what_a_whole_reply_says(client: OpenAI) -> None:
    whole = ask(client, extra_body={"activations": {"layers": [0], "hook_points": ["resid_post"]}})
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=16, temperature=0, stream=True,
            stream_options={"include_usage": True},
            extra_body={"activations": {"layers": [0], "hook_points": ["resid_post"]}},
        )
    )  # fmt: skip
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert (
        chunks[-1].usage.model_copy(update={"prompt_tokens_details": whole.usage.prompt_tokens_details}) == whole.usage
    )
    assert chunks[-1].model_extra is not None
    activations = chunks[-1].model_extra["activations"]
    assert activations["tensors"]["layers.0.resid_post"]["shape"][0] == whole.usage.total_tokens - 1


def test_a_raw_stream_ends_with_done(server: Server) -> None:
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 3, "stream": True}
    lines = httpx2.post(f"{server.base_url}/chat/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk" for line in lines[:-2])


def test_stored_rows_equal_a_teacher_forced_forward(server: Server) -> None:
    """Requests of different lengths, together; each rollout is recomputed alone with plain hooks."""
    prompts = ["Hi.", "Count from one to five, slowly.", "What is 12 * 7? Think step by step, then answer."]
    layers = [8, 12, 16]

    async def ask_all() -> list[dict[str, object]]:
        async with AsyncOpenAI(base_url=server.base_url, api_key="none") as client:
            replies = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=MODEL, messages=[{"role": "user", "content": text}], max_tokens=10 + 5 * i, temperature=0,
                        extra_body={"activations": {"session_id": "fidelity", "labels": {"number": i}}},
                    )
                    for i, text in enumerate(prompts)
                )
            )  # fmt: skip
        return [reply.model_extra["activations"] for reply in replies]

    replies = asyncio.run(ask_all())
    session = Session.open(str(replies[0]["uri"]))
    rollouts = session.rollouts().set_index("rollout_id")
    assert sorted(label["number"] for label in rollouts["labels"]) == [0, 1, 2]
    for reply in replies:
        row = rollouts.loc[str(reply["rollout_id"])]
        n_rows = row["n_prompt"] + row["n_completion"] - 1
        assert row["row_stop"] - row["row_start"] == n_rows
        expected = teacher_forced(row["token_ids"][:-1], layers)
        where = session.rollouts().query("rollout_id == @reply['rollout_id']")
        for layer in layers:
            for hook_point in ("ln_attn", "ln_mlp"):
                key = f"layers.{layer}.{hook_point}"
                assert reply["tensors"][key]["shape"] == [n_rows, 576]
                assert worst_error(session.activations(key, where=where)[0].values, expected[key]) <= 1e-4
        assert [row["text"][s["start"] : s["stop"]] for s in row["segments"]][-1].startswith("<") is False
    assert verify(session).ok


def test_a_prefix_that_was_found_has_every_row(server: Server, client: OpenAI) -> None:
    """Two questions after the same long words: the second is read from where it differs, and is stored whole."""
    system = "You answer in few words, and only what was asked. " * 8
    found = []
    for text in ("What is 3 + 4?", "Name a color."):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        wanted = {"session_id": "prefixes", "layers": [8, 16], "hook_points": ["resid_post"]}
        reply = ask(client, messages=messages, max_tokens=8, extra_body={"activations": wanted})
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        found.append(reply.usage.prompt_tokens_details.cached_tokens)
    assert found[0] == 0
    assert found[1] >= 64
    session = Session.open(str(reply.model_extra["activations"]["uri"]))
    for key in ("layers.8.resid_post", "layers.16.resid_post"):
        rows = session.activations(key)
        for number, row in session.rollouts().iterrows():
            expected = teacher_forced(row["token_ids"][:-1], [8, 16])[key]
            assert worst_error(rows[number].values, expected) <= 1e-4
    assert verify(session).ok
    (model,) = client.models.list().data
    assert model.model_extra is not None
    assert model.model_extra["prefix_cache"] == {"enabled": True, "reason": None}
    metrics = httpx2.get(f"{server.root}/metrics").text
    (hits,) = [line for line in metrics.splitlines() if line.startswith("roentgen_prefix_cache_hit_tokens_total{")]
    assert float(hits.split()[-1]) >= found[1]


def test_a_base_url_says_whose_request_it_is(server: Server) -> None:
    """An unmodified client, given an address only; the name of its problem goes through Serve's proxy as it was written."""
    keep = {"layers": [3], "hook_points": ["resid_post"], "positions": "last_prompt"}
    run = {"id": "addressed", "activations": keep, "defaults": {"max_tokens": 4, "temperature": 0}}
    assert httpx2.post(f"{server.base_url}/runs", json=run).status_code == 200
    with OpenAI(base_url=f"{server.base_url}/r/addressed/sum%2F7%20%C3%A9/2", api_key="none") as client:
        assert client.models.list().data[0].id == MODEL
        client.chat.completions.create(model=MODEL, messages=QUESTION)
        assert [*client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True)]
        client.completions.create(model=MODEL, prompt="2 + 3 =")
    rows = Session.open(str(server.store / "addressed")).rollouts()
    keys = ["config_hash", "problem_id", "epoch", "turn"]
    assert sorted(rows[keys].itertuples(index=False, name=None)) == [("addressed", "sum/7 é", 2, n) for n in range(3)]
    with pytest.raises(openai.NotFoundError, match="there is no run 'other'; create it first"):
        OpenAI(base_url=f"{server.base_url}/r/other/a/1", api_key="none").models.list()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sessions_are_listed_shown_and_pulled(server: Server, client: OpenAI, tmp_path: Path) -> None:
    for number in range(3):
        key = {"config_hash": "abc", "problem_id": f"p{number}"}
        ask(
            client, extra_body={"activations": {"session_id": "listed", "key": key, "layers": [1], "positions": "last"}}
        )
    listed = httpx2.get(f"{server.base_url}/activations/sessions").json()["data"]
    (summary,) = [s for s in listed if s["session_id"] == "listed"]
    assert (summary["rollouts"], summary["keys"]) == (3, ["layers.1.ln_attn", "layers.1.ln_mlp"])
    page = httpx2.get(f"{server.base_url}/activations/session/listed", params={"offset": 1, "limit": 1}).json()
    assert [item["problem_id"] for item in page["items"]] == ["p1"]
    assert httpx2.get(f"{server.base_url}/activations/session/none").status_code == 404
    assert httpx2.get(f"{server.base_url}/activations/session/*").status_code == 400
    address = f"{server.base_url}/activations/session/listed"
    report = verify(Session.open(pull(address, str(tmp_path))))
    assert (report.rollouts, report.damage, report.orphans) == (3, [], [])
    archive = httpx2.get(f"{address}/download")
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    assert files_of(tmp_path / "unpacked" / "listed") == files_of(tmp_path / "listed")
    for path in ("nothing", "shards/..%2Fsession.json", f"shards/{26 * '0'}.safetensors"):
        assert httpx2.get(f"{address}/files/{path}").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("extra", "kind", "param", "words"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model", "not served here"),
        ({"messages": [{"role": "user", "content": "x " * 9000}]}, openai.BadRequestError, "messages", "8192 tokens"),
        ({"max_tokens": 9000}, openai.BadRequestError, "messages", "8192 tokens"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias", "out of vocabulary"),
        ({"extra_body": {"made_up": 1}}, openai.BadRequestError, "made_up", "not supported"),
        (
            {"extra_body": {"activations": {"layers": [40]}}},
            openai.BadRequestError,
            "activations.layers",
            "layers 0–29",
        ),
        (
            {"extra_body": {"activations": {"hook_points": ["x"]}}},
            openai.BadRequestError,
            "activations.hook_points",
            "'x'",
        ),
        (
            {"extra_body": {"activations": {"session_id": "a/b"}}},
            openai.BadRequestError,
            "activations.session_id",
            "a/b",
        ),
    ],
)
def test_errors_are_openais(
    client: OpenAI, extra: dict[str, object], kind: type[openai.APIStatusError], param: str, words: str, stream: bool
) -> None:
    with pytest.raises(kind, match=words) as caught:
        ask(client, stream=stream, **extra)
    assert caught.value.param == param


def test_what_is_not_json_and_what_is_not_there(server: Server) -> None:
    broken = httpx2.post(
        f"{server.base_url}/chat/completions", content="{", headers={"content-type": "application/json"}
    )
    assert (broken.status_code, "not JSON" in broken.json()["error"]["message"]) == (400, True)
    missing = httpx2.get(f"{server.base_url}/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    assert httpx2.get(f"{server.base_url}/chat/completions").status_code == 405


def test_health_answers_while_a_batch_runs(server: Server) -> None:
    async def probe() -> tuple[list[float], int]:
        async with AsyncOpenAI(base_url=server.base_url, api_key="none") as client, httpx2.AsyncClient() as http:
            batch = asyncio.gather(
                *(
                    client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=60, temperature=2, seed=i)
                    for i in range(8)
                )
            )
            times = []
            while not batch.done():
                start = time.monotonic()
                assert (await http.get(f"{server.root}/health", timeout=30)).json()["status"] == "ok"
                times.append(time.monotonic() - start)
                await asyncio.sleep(0.05)
            return times, sum(reply.usage.completion_tokens for reply in await batch if reply.usage)

    times, tokens = asyncio.run(probe())
    assert tokens > 100
    assert len(times) >= 3  # it answered again and again before the batch was done


def test_a_key_locks_everything_but_health(tmp_path, ray_home: RayHome) -> None:  # type: ignore[no-untyped-def]
    locked = start_server(tmp_path, ray_home, environment={"ROENTGEN_API_KEY": "first, second"})
    assert httpx2.get(f"{locked.root}/health").status_code == 200
    for path in ("models", "model/structure", "activations/sessions", "activations/session/x"):
        refused = httpx2.get(f"{locked.base_url}/{path}", headers={"Authorization": "Bearer wrong"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        ask(OpenAI(base_url=locked.base_url, api_key="nope", max_retries=0))
    assert ask(OpenAI(base_url=locked.base_url, api_key="second")).choices
    locked.process.terminate()
    assert locked.process.wait(60) == 0
    assert ray_home.wait_until_gone() == []


def test_a_full_queue_is_429_with_retry_after_and_the_rest_are_served(tmp_path, ray_home: RayHome) -> None:  # type: ignore[no-untyped-def]
    """More requests at once than fit: some are refused at once, whole and streamed alike, and none hangs."""
    small = start_server(tmp_path, ray_home, "--max-batch", "1", "--max-queue", "1")
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 30, "temperature": 0}

    async def flood() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(timeout=120) as http:
            requests = [
                http.post(f"{small.base_url}/chat/completions", json={**body, "stream": i % 2 == 0}) for i in range(8)
            ]
            return list(await asyncio.gather(*requests))

    replies = asyncio.run(flood())
    refused = [reply for reply in replies if reply.status_code != 200]
    assert {reply.status_code for reply in refused} == {429}
    assert all(reply.headers["retry-after"] == "2" for reply in refused)
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    served = [reply for reply in replies if reply.status_code == 200]
    assert 1 <= len(served) <= 3
    assert all(reply.text.endswith("data: [DONE]\n\n") or reply.json()["choices"] for reply in served)
    # A client that waits as it is told gets through.
    patient = OpenAI(base_url=small.base_url, api_key="none", max_retries=10)
    assert ask(patient).choices
    small.process.terminate()
    assert small.process.wait(60) == 0
