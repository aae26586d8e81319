"""`roentgen serve --engine vllm` with OpenAI's client: the same replies, the same store."""

import json
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import psutil
import pytest
import torch
from torch.nn.functional import cosine_similarity

from roentgen.store import Session, verify
from serve_app.engines.transformers.loaded_model import load
from serve_app.models.model_source import locate
from tests.conftest import RayHome, Server, clean_up, start_server
from tests.serve_app.engines.subjects import is_core, save_tiny

MODEL = "smollm2-135m"
AT_ONCE, QUEUE = 8, 8
ASKED = {"session_id": "asked", "layers": [0, 15, 29], "hook_points": ["resid_post", "ln_mlp"], "labels": {"n": 1}}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that may be loaded in the place of the one that is served."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def home() -> RayHome:
    return RayHome(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, home: RayHome, other: Path) -> Iterator[Server]:
    try:
        options = ["--engine", "vllm", "--threads", "1", "--max-cache-tokens", "4096", "--allow-model", str(other)]
        options += ["--max-batch", str(AT_ONCE), "--max-queue", str(QUEUE), "--allow-model", MODEL]
        options += ["--taps", "default,resid_mid"]
        # The model is compiled, which waits for whatever else computes.
        running = start_server(tmp_path_factory.mktemp("store"), home, *options, timeout_s=540)
        yield running
        running.process.terminate()
        assert running.process.wait(60) == 0
        assert home.wait_until_gone() == []
    finally:
        clean_up(home)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)


def ask(client: openai.OpenAI, question: str = "What is 2 + 3?", **options: object) -> openai.types.chat.ChatCompletion:
    messages = [{"role": "user", "content": question}]
    settings = {"model": MODEL, "max_tokens": 12, "temperature": 0} | options
    return client.chat.completions.create(messages=messages, **settings)


def test_a_reply_and_its_rows(server: Server, client: openai.OpenAI) -> None:
    reply = ask(client, extra_body={"activations": ASKED})
    assert reply.usage is not None
    stored = reply.model_dump()["activations"]
    n_rows = reply.usage.prompt_tokens + reply.usage.completion_tokens - 1
    assert stored["row_stop"] - stored["row_start"] == n_rows
    session = Session.open(server.store / "asked")
    assert verify(session).ok
    (row,) = session.rollouts().to_dict("records")
    assert (row["n_prompt"], row["n_completion"]) == (reply.usage.prompt_tokens, reply.usage.completion_tokens)
    assert reply.choices[0].message.content in row["text"]
    reference = load(locate(MODEL), "float32", "cpu").observed._module
    with torch.inference_mode():
        states = reference(torch.tensor([row["token_ids"][:-1].tolist()]), output_hidden_states=True).hidden_states
    rows = session.activations("layers.15.resid_post", where=session.rollouts())[0].values
    assert cosine_similarity(torch.tensor(np.asarray(rows)).float(), states[16][0], dim=1).min() > 0.9999


def test_choices_of_a_stream_and_values_in_the_reply(client: openai.OpenAI) -> None:
    asked = {"layers": [3], "hook_points": ["resid_mid"], "positions": "last", "return": "full"}
    stream = ask(client, n=2, stream=True, temperature=1, seed=4, extra_body={"activations": asked})
    chunks = [chunk.model_dump() for chunk in stream]
    rollouts = chunks[-1]["activations"]["rollouts"]
    assert [rollout["choice_index"] for rollout in rollouts] == [0, 1]
    for rollout in rollouts:
        tensor = rollout["tensors"]["layers.3.resid_mid"]
        assert (tensor["format"], tensor["shape"]) == ("complete_tensor", [1, 1, 576])
        assert np.isfinite(tensor["data"]).all()


def test_a_schema_is_followed(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    reply = ask(client, response_format=shape, max_tokens=40, temperature=1, seed=1)
    assert set(json.loads(reply.choices[0].message.content or "")) == {"sum"}


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (
            {"activations": {"hook_points": ["self_attn.q_proj.output"]}},
            "activations.hook_points",
            "q_proj together with",
        ),
        ({"activations": {"hook_points": ["router"]}}, "activations.hook_points", "has no router"),
        ({"activations": {"layers": [30]}}, "activations.layers", "30 is out of range"),
        ({"activations": {"hook_points": ["attn_out"]}}, "activations.hook_points", "start it with --taps default and"),
    ],
)
def test_what_it_does_not_have_is_refused_by_name(
    client: openai.OpenAI, body: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, extra_body=body)
    assert refused.value.param == param
    assert said in str(refused.value)


def test_steering_changes_what_is_said(client: openai.OpenAI) -> None:
    vector = np.random.default_rng(0).normal(size=576).tolist()
    steering = [{"vector": vector, "layer": 15, "scale": 4.0}]
    plain, steered = ask(client), ask(client, extra_body={"steering": steering})
    assert plain.choices[0].message.content != steered.choices[0].message.content
    assert plain.choices[0].message.content == ask(client).choices[0].message.content


def test_probes_score_whole_replies_and_streams(server: Server, client: openai.OpenAI) -> None:
    weight = np.random.default_rng(0).normal(size=576)
    extra = {"probes": [{"name": "p", "key": "layers.15.resid_post", "weight": weight.tolist()}]}
    reply = ask(client, extra_body=extra | {"activations": ASKED | {"session_id": "probed"}})
    (whole,) = reply.choices[0].model_dump()["probes"]
    rows = Session.open(server.store / "probed").activations("layers.15.resid_post")[0].values
    np.testing.assert_allclose(whole["scores"], np.asarray(rows, dtype=np.float64) @ weight, rtol=1e-3, atol=1e-2)
    told: list[float] = []
    for chunk in ask(client, stream=True, extra_body=extra):
        for piece in [piece for choice in chunk.choices for piece in choice.model_dump().get("probes") or []]:
            assert piece["start"] == len(told)
            told += piece["scores"]
    assert told == pytest.approx(whole["scores"], rel=1e-3, abs=1e-2)


def test_the_server_says_what_runs(server: Server) -> None:
    with urllib.request.urlopen(f"{server.root}/health", timeout=10) as response:
        assert json.load(response)["status"] == "ok"
    with urllib.request.urlopen(f"{server.base_url}/model/structure", timeout=10) as response:
        structure = json.load(response)
    assert structure["verified_on"] == "weights, as vLLM runs them"
    assert structure["hook_points"]["resid_mid"] == "model.layers.0.post_attention_layernorm.input[0] + [1]"


def test_a_full_queue_is_refused_and_the_rest_is_answered(client: openai.OpenAI) -> None:
    def one(number: int) -> int | str | None:
        try:
            reply = ask(client, f"Count to {number}.", max_tokens=60, extra_body={"activations": {"layers": [7]}})
            return reply.usage.completion_tokens if reply.usage else None
        except openai.RateLimitError as refused:
            return refused.response.headers["retry-after"]

    with ThreadPoolExecutor(3 * (AT_ONCE + QUEUE)) as pool:
        said = list(pool.map(one, range(3 * (AT_ONCE + QUEUE))))
    answered = [tokens for tokens in said if isinstance(tokens, int)]
    assert len(answered) >= AT_ONCE + QUEUE
    assert set(said) - set(answered) == {"2"}


@pytest.mark.timeout(1500)
def test_another_model_takes_its_place_when_what_runs_has_ended(
    server: Server, home: RayHome, client: openai.OpenAI, other: Path
) -> None:
    """Its core ends, another begins, and `/health` answers all the while."""
    # A table that is read while processes change may lack one; a restart would take longer.
    before = core(home, within_s=3)
    stages: list[str | None] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            stages.append(httpx2.get(f"{server.root}/health", timeout=10).json().get("stage"))

    def load_model(model: str) -> httpx2.Response:
        return httpx2.post(f"{server.base_url}/models/load", json={"model_id": model}, timeout=600)  # it is compiled

    with ThreadPoolExecutor() as pool:
        stream = ask(client, max_tokens=60, stream=True, extra_body={"activations": ASKED | {"session_id": "swapped"}})
        next(iter(stream))  # it runs
        swap, watching = pool.submit(load_model, str(other)), pool.submit(watch)
        chunks = [chunk.model_dump() for chunk in stream]
        assert swap.result().status_code == 200, swap.result().text
        done.set()
        watching.result()
    assert chunks[-1]["activations"]["session_id"] == "swapped"
    assert verify(Session.open(server.store / "swapped")).ok
    assert {stage.split(" ")[0] for stage in stages if stage} >= {"loading"}
    assert core(home) != before  # at once: the old one has ended before the new one is served
    asked = {"layers": [0], "hook_points": ["resid_post"], "return": "full"}
    reply = ask(client, model="tiny", extra_body={"activations": asked})
    (values,) = reply.model_dump()["activations"]["tensors"].values()
    assert values["shape"][2] == json.loads((other / "config.json").read_text())["hidden_size"]
    assert load_model(MODEL).status_code == 200
    assert ask(client).choices[0].message.content
    assert core(home).is_running()


def core(home: RayHome, within_s: float = 0) -> psutil.Process:
    """Return the one core that there is, now or within some seconds."""
    deadline = time.monotonic() + within_s
    while len(found := cores(home)) != 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(found) == 1, f"{found}\n{home.told()}"
    return found[0]


def cores(home: RayHome) -> list[psutil.Process]:
    """Return the cores of vLLM's that the home's replicas have started."""
    started = {child for process in home.processes() for child in process.children(recursive=True)}
    return [process for process in started if is_core(process)]
