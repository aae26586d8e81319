"""Runs: requests of clients that only know a base URL, captured, keyed and steered as the run says, by a real replica."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from roentgen.store import Session
from serve_app.config import ServerConfig
from serve_app.http.ingress import Ingress
from serve_app.http.run_addresses import RunAddress, read_address
from serve_app.http.run_registry import TurnCounter
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.errors import ApiError
from serve_app.openai_api.responses.request import ResponsesRequest
from serve_app.openai_api.run_settings import RunSettings, with_settings
from serve_app.replica.model_replica import ModelReplica
from tests.serve_app import tiny
from tests.serve_app.http.test_replies import TEMPLATE, Handle

HI = [{"role": "user", "content": "hi"}]
KEEP = {"layers": [1], "hook_points": ["resid_post"], "positions": "last"}
RUN = {"id": "mine", "activations": {**KEEP, "labels": {"team": "a"}}, "defaults": {"max_tokens": 3, "temperature": 0}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.module("llama").save_pretrained(folder)
    words = tiny.tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(folder)
    return ServerConfig(model=str(folder), store=str(tmp_path_factory.mktemp("store")), dtype="float32", threads=1)


@pytest.fixture(scope="module")
def replica(config: ServerConfig) -> Iterator[ModelReplica]:
    replica = ModelReplica(config)
    replica.reconfigure(config.choice.model_dump())
    yield replica
    replica.close()


def opened(replica: ModelReplica, config: ServerConfig) -> TestClient:
    """A client of a new ingress."""
    ingress = Ingress(Handle(replica), config, lambda choice: None)
    client = TestClient(ingress.__serve_build_asgi_app__(), client=("127.0.0.1", 1), raise_server_exceptions=False)
    while client.get("/health").status_code != 200:
        pass
    return client


@pytest.fixture(scope="module")
def client(replica: ModelReplica, config: ServerConfig) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ROENTGEN_API_KEY", raising=False)
        with opened(replica, config) as client:
            assert client.post("/v1/runs", json=RUN).status_code == 200
            yield client


def ask(client: TestClient, where: str, body: dict[str, Any], status: int = 200) -> Any:
    (served,) = client.get("/v1/models").json()["data"]
    reply = client.post(where, json={"model": served["id"], **body})
    assert reply.status_code == status, reply.text
    return reply.json() if status == 200 else reply.json()["error"]


def stored(config: ServerConfig, session: str = "mine") -> dict[tuple[str, int, int], dict[str, Any]]:
    frame = Session.open(f"{config.store}/{session}").rollouts(unique=False)
    keys = ("problem_id", "epoch", "turn")
    return {tuple(row[key] for key in keys): row for row in frame.to_dict("records")}  # type: ignore[misc]


def test_each_call_is_a_turn_of_the_address_and_goes_on_after_a_restart(
    client: TestClient, replica: ModelReplica, config: ServerConfig
) -> None:
    where = "/v1/r/mine/sum%2F7/2"
    first = ask(client, f"{where}/chat/completions", {"messages": HI})
    assert first["usage"]["completion_tokens"] <= 3
    assert first["activations"]["session_id"] == "mine"
    ask(client, f"{where}/chat/completions", {"messages": HI, "max_completion_tokens": 1})  # the same, once more
    ask(client, f"{where}/v1/chat/completions", {"messages": HI, "n": 2})  # of a client that appends all of it
    with opened(replica, config) as another:
        ask(another, f"{where}/completions", {"prompt": ["ab", "c"], "activations": {"labels": {"of": "x"}}})
    found = {key: row for key, row in stored(config).items() if key[0] == "sum/7"}
    assert sorted(found) == [("sum/7", 2, turn) for turn in range(6)]
    assert {row["config_hash"] for row in found.values()} == {"mine"}
    assert {row["n_completion"] for key, row in found.items() if key[2] == 1} == {1}
    assert [found["sum/7", 2, turn]["labels"] for turn in (0, 4)] == [{"team": "a"}, {"team": "a", "of": "x"}]
    session = Session.open(f"{config.store}/mine")
    assert session.keys() == ["layers.1.resid_post"]
    assert {len(item.values) for item in session.activations("layers.1.resid_post")} == {1}


def test_streams_and_responses_are_keyed_too(client: TestClient, config: ServerConfig) -> None:
    (served,) = client.get("/v1/models").json()["data"]
    body = {"model": served["id"], "messages": HI, "stream": True}
    with client.stream("POST", "/v1/r/mine/streamed/1/chat/completions", json=body) as reply:
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    assert events[-1]["activations"]["session_id"] == "mine"
    assert client.post("/v1/runs", json={"id": "responses", "activations": KEEP}).status_code == 200
    ask(client, "/v1/r/responses/q/1/responses", {"input": "hi", "max_output_tokens": 2})
    assert ("streamed", 1, 0) in stored(config)
    assert list(stored(config, "responses")) == [("q", 1, 0)]


def test_a_problem_without_a_name_is_known_by_its_prompt(client: TestClient, config: ServerConfig) -> None:
    before = stored(config).keys()
    for text in ("one", "two", "one"):
        ask(client, "/v1/r/mine/-/1/completions", {"prompt": text})
    made = sorted(stored(config).keys() - before)
    assert sorted(turn for _, _, turn in made) == [0, 0, 1]
    assert len({problem for problem, _, _ in made}) == 2


def test_steering_and_probes_of_the_run_are_every_request_s(client: TestClient, config: ServerConfig) -> None:
    probe = {"name": "p", "key": "layers.1.resid_post", "weight": [0.25] * 32}
    steering = [{"vector": [0.5] * 32, "layer": 1, "scale": 2}]
    run = {"id": "steered", "activations": KEEP, "probes": [probe], "steering": steering}
    assert client.post("/v1/runs", json=run).status_code == 200
    given = {"max_tokens": 2, "temperature": 0, "messages": HI}
    said = ask(client, "/v1/r/steered/a/1/chat/completions", given)
    direct = ask(client, "/v1/chat/completions", {**given, "probes": [probe], "steering": steering})
    plain = ask(client, "/v1/chat/completions", {**given, "probes": [probe]})
    (scores,), (same,), (other,) = (reply["choices"][0]["probes"] for reply in (said, direct, plain))
    assert scores["scores"] == pytest.approx(same["scores"], rel=1e-5)
    assert scores["scores"] != pytest.approx(other["scores"], rel=1e-2)
    (row,) = stored(config, "steered").values()
    assert json.loads(row["labels"]["steering"])[0]["scale"] == 2


def test_a_run_without_activations_keeps_nothing(client: TestClient) -> None:
    assert client.post("/v1/runs", json={"id": "short", "defaults": {"max_tokens": 1}}).status_code == 200
    reply = ask(client, "/v1/r/short/a/1/chat/completions", {"messages": HI})
    assert (reply["usage"]["completion_tokens"], "activations" in reply) == (1, False)
    kept = ask(client, "/v1/r/short/a/1/chat/completions", {"messages": HI, "activations": KEEP})
    assert kept["activations"]["session_id"] == "short"


def test_the_same_run_again_is_the_same_and_another_is_refused(client: TestClient) -> None:
    again = client.post("/v1/runs", json=RUN)
    assert again.json() == client.get("/v1/runs/mine").json()
    assert again.json()["path"] == "/v1/r/mine/{problem}/{epoch}"
    assert again.json()["settings"]["activations"]["positions"] == "last"
    other = client.post("/v1/runs", json={**RUN, "defaults": {}})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "run_exists")
    named = client.post("/v1/runs", json={"activations": KEEP}).json()["id"]
    assert {"mine", named} <= {run["id"] for run in client.get("/v1/runs").json()["data"]}


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/v1/r/none/a/1/chat/completions", 404, "there is no run 'none'; create it first: POST /v1/runs"),
        ("/v1/r/mine/a/0/chat/completions", 400, "epoch: '0' is not"),
        ("/v1/r/mine/a/x/chat/completions", 400, "epoch: 'x' is not"),
        ("/v1/r/mine//1/chat/completions", 400, "problem: it has 0 characters"),
        ("/v1/r/mine/%ff/1/chat/completions", 400, "problem: '%ff' is not UTF-8, percent-encoded"),
        ("/v1/r/mi%20ne/a/1/chat/completions", 400, "'mi ne' is not a session id"),
        ("/v1/r/mine/a", 404, "/v1/r/RUN/PROBLEM/EPOCH"),
    ],
)
def test_an_address_that_is_none_is_refused(client: TestClient, path: str, status: int, words: str) -> None:
    assert words in ask(client, path, {"messages": HI}, status)["message"]


def test_an_unknown_run_is_said_on_every_route_and_a_known_one_has_them_all(client: TestClient) -> None:
    assert client.get("/v1/r/none/a/1/models").status_code == 404
    assert client.get("/v1/r/mine/a/1/models").json() == client.get("/v1/models").json()
    assert client.head("/v1/r/mine/a/1/models").status_code == 200


@pytest.mark.parametrize(
    ("own", "param"),
    [
        ({"activations": {"key": {"config_hash": "c", "problem_id": "p"}}}, "activations.key"),
        ({"activations": {"session_id": "s"}}, "activations.session_id"),
        ({"collect_activations": {"layers": [0]}}, "collect_activations"),
        ({"activations": {"layers": [7]}}, "activations.layers"),
    ],
)
def test_a_request_may_not_contradict_its_address(client: TestClient, own: dict[str, Any], param: str) -> None:
    assert ask(client, "/v1/r/mine/a/1/chat/completions", {"messages": HI, **own}, 400)["param"] == param


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"activations": {"layers": "some"}}, "activations.layers", ""),
        ({"activations": {"key": {"config_hash": "c", "problem_id": "p"}}}, "activations.key", "not allowed"),
        ({"defaults": {"temprature": 1}}, "defaults.temprature", "no route has it"),
        ({"defaults": {"temperature": 9}}, "defaults.temperature", "less than or equal to 2"),
        ({"defaults": {"messages": []}}, "defaults.messages", "set it on each request"),
        ({"defaults": {"probes": []}}, "defaults.probes", "set it on the run"),
        ({"defaults": {"max_output_tokens": 1, "max_tokens": 1}}, "defaults", "no single route has all"),
        ({"steering": [{"scale": 1}]}, "steering.0", ""),
        ({"id": ".x"}, "id", "not a session id"),
        ({"layers": [1]}, "layers", "unknown or not supported"),
    ],
)
def test_settings_that_no_request_could_have_are_refused(
    client: TestClient, body: dict[str, Any], param: str, words: str
) -> None:
    reply = client.post("/v1/runs", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_what_a_request_says_goes_before_the_run_s() -> None:
    settings = RunSettings.model_validate(
        {"activations": {**KEEP, "labels": {"a": 1}}, "defaults": {"max_tokens": 9, "seed": 3, "top_p": 0.5}}
    )
    own = {"model": "m", "max_completion_tokens": 2, "seed": None, "top_p": 1, "activations": {"layers": [0]}}
    assert with_settings(own, "r", settings) == {
        "model": "m",
        "max_completion_tokens": 2,
        "seed": 3,
        "top_p": 1,
        "activations": {**KEEP, "layers": [0], "labels": {"a": 1}, "session_id": "r"},
    }
    assert with_settings([1], "r", settings) == [1]


def test_an_explicit_key_still_names_one_rollout() -> None:
    key = {"key": {"config_hash": "c", "problem_id": "p"}}
    with pytest.raises(ValueError, match="a key identifies one rollout"):
        ChatRequest.model_validate({"model": "m", "messages": HI, "n": 2, "activations": key})


def test_a_response_s_chat_may_be_another() -> None:
    request = ResponsesRequest.model_validate({"model": "m", "input": "hi"})
    other = request.chat.model_copy(update={"seed": 5})
    assert (request.asking(other).chat.seed, request.chat.seed) == (5, None)


def test_an_address_is_read_as_it_was_written() -> None:
    assert read_address("/v1/r/a/b%2Fc%20%C3%A9/3/chat/completions") == (
        RunAddress("a", "b/c é", 3),
        "/v1/chat/completions",
    )
    assert read_address("/v1/r/a/b/1//v1/models")[1] == "/v1/models"  # of a base URL that ends in a slash
    with pytest.raises(ApiError, match="200"):
        read_address(f"/v1/r/a/{'x' * 201}/1/models")


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_any_address_is_read_or_refused(path: str) -> None:
    with suppress(ApiError):
        read_address(f"/v1/r/{path}")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200))
def test_any_name_of_a_problem_is_read_as_it_is(name: str) -> None:
    assert read_address(f"/v1/r/a/{quote(name, safe='')}/1/models")[0].problem_id == name


async def test_numbers_are_given_once_also_to_those_who_ask_together(config: ServerConfig) -> None:
    numbers = TurnCounter(config.store)
    given = await asyncio.gather(*(numbers.take("new", "none-yet", "p", 1, 2) for _ in range(20)))
    assert sorted(given) == [*range(0, 40, 2)]
    assert await numbers.take("new", "none-yet", "p", 2, 1) == 0


def test_nobody_without_a_key_learns_which_runs_there_are(
    replica: ModelReplica, config: ServerConfig, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROENTGEN_API_KEY", "secret")
    with opened(replica, config) as locked:
        for run in ("mine", "none"):
            reply = locked.post(f"/v1/r/{run}/a/1/chat/completions", json={"model": "m", "messages": HI})
            assert reply.status_code == 401


def test_the_description_of_the_routes_says_their_addresses(client: TestClient) -> None:
    """What a client made from it would ask: a server's address with its variables filled in, then the path."""
    client.post("/v1/runs", json={**RUN, "id": "described"})
    document = client.get("/openapi.json").json()
    plain, of_run = document["servers"]
    assert plain["url"] == "/"
    values = {name: variable["default"] for name, variable in of_run["variables"].items()}
    address = of_run["url"].format(**{**values, "run": "described"})
    assert "/v1/chat/completions" in document["paths"]
    reply = ask(client, f"{address}/v1/chat/completions", {"messages": HI})
    assert reply["activations"]["session_id"] == "described"
