"""Probes that act, through a replica: what a request may ask for, what the reply and the stored rollout say."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from pydantic import TypeAdapter, ValidationError

from roentgen.linear_probe import save_probes
from roentgen.store import Session
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.completions import CompletionRequest
from serve_app.openai_api.errors import from_validation
from serve_app.openai_api.schemas import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk
from serve_app.replica.model_replica import ModelReplica
from tests.serve_app import tiny
from tests.serve_app.replica.test_model_replica import complete, started, streamed
from tests.serve_app.requests.test_probes_and_steering import NAME, THREE, VECTOR, Body, chat, probe

KEY = "layers.1.resid_post"
FREE = {"min_tokens": 0, "logit_bias": {str(tiny.EOS): -100}}
EVERY = {"name": "every", "key": KEY, "weight": VECTOR, "bias": 1e6}
"""Its scores are all far above 0."""
THINKS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>"}]
OPEN = {"messages": THINKS, "continue_final_message": True}
CLOSES = {**EVERY, "stop_when": {"above": 0, "for": 3, "then": "close_reasoning"}}


def stops(after: int, **more: Any) -> Body:
    return {**EVERY, "stop_when": {"above": 0, "for": after, **more}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that marks its reasoning."""
    path, words = tmp_path_factory.mktemp("thinks"), tiny.tokenizer()
    words.add_tokens(["<think>", "</think>"])
    torch.manual_seed(0)
    config = tr.AutoConfig.for_model("llama", **{**tiny.GROUPED, "vocab_size": len(words)})
    tr.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    words.save_pretrained(path)
    return path


@pytest.fixture
async def replica(folder: Path, tmp_path: Path) -> AsyncIterator[ModelReplica]:
    shelf = tmp_path / "shelf"
    options = {"model": str(folder), "store": str(tmp_path / "store"), "dtype": "float32", "probes": (str(shelf),)}
    async with started(**options) as replica:
        card = (await replica.status())["model"]
        three = probe(card["id"], card["revision"], "layers.0.resid_pre", outputs=3)
        save_probes(shelf / "correct", [probe(card["id"], card["revision"]), three])
        yield replica


async def test_a_reply_ends_at_the_token_whose_score_says_so(replica: ModelReplica) -> None:
    """Beside a choice of the same request that no score ends, with scores, log-probabilities and the rows of what is kept."""
    asked = {"layers": [1], "hook_points": ["resid_post"], "session_id": "s", "labels": {"mine": 1}}
    body = {**FREE, "max_tokens": 9, "temperature": 1, "logprobs": True, "n": 2}
    whole = (await chat(replica, **body))["reply"]
    reply = (await chat(replica, **body, probes=[stops(4)], activations=asked))["reply"]
    TypeAdapter(ChatCompletion).validate_python(reply, extra="forbid")
    assert reply["usage"]["completion_tokens"] == 8
    for index, (choice, free) in enumerate(zip(reply["choices"], whole["choices"], strict=True)):
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "probe:every")
        assert free["message"]["content"].startswith(choice["message"]["content"])
        assert choice["logprobs"]["content"] == free["logprobs"]["content"][:4]
        (scored,) = choice["probes"]
        n_prompt = scored["n_prompt"]
        assert len(scored["scores"]) == n_prompt + 3
        done = scored["acted"]
        assert (done["then"], done["position"], len(choice["token_ids"])) == ("stop", n_prompt + 3, 4)
        rollout = reply["activations"]["rollouts"][index]
        assert rollout["acted"] == [{"probe": "every", **done}]
        assert rollout["row_stop"] - rollout["row_start"] == n_prompt + 3
    stored = Session.open(reply["activations"]["rollouts"][0]["uri"]).rollouts()
    for labels in stored["labels"]:
        assert labels["mine"] == 1
        (said,) = json.loads(labels["stop_when"])
        assert said["position"] == n_prompt + 3
        assert {said["above"], said["for"], said["where"], said["then"], said["key"]} == {
            0,
            4,
            "generated",
            "stop",
            KEY,
        }
        assert len(said["numbers"]) == 16


async def test_what_does_not_act_is_recorded_as_well(replica: ModelReplica) -> None:
    asked = {"layers": [1], "hook_points": ["resid_post"], "session_id": "s"}
    named = {"probe": f"correct/{NAME}", "stop_when": {"above": 1e30}}
    reply = (await chat(replica, **FREE, probes=[named, f"{THREE}"], activations=asked))["reply"]
    assert reply["choices"][0]["finish_reason"] == "length"
    assert all("acted" not in one for one in reply["choices"][0]["probes"])
    assert "acted" not in reply["activations"]
    (labels,) = Session.open(reply["activations"]["uri"]).rollouts()["labels"]
    (said,) = json.loads(labels["stop_when"])
    assert (said["probe"], said["position"], said["score"]) == (f"correct/{NAME}", None, None)
    assert "stop_when" not in json.dumps((await chat(replica, probes=[THREE], activations=asked))["reply"])


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
async def test_a_stream_says_what_the_whole_reply_says(replica: ModelReplica, kind: type) -> None:
    body: Body = {**FREE, "max_tokens": 9, "seed": 3, "n": 2, "probes": [stops(5)], "temperature": 1}
    if kind is ChatRequest:
        whole = (await chat(replica, **body, logprobs=True))["reply"]
        body |= {"messages": [{"role": "user", "content": "hi"}], "logprobs": True}
    else:
        body |= {"prompt": "abc", "logprobs": 1}
        whole = (await complete(replica, **body))["reply"]
        TypeAdapter(Completion).validate_python(whole, extra="forbid")
    chunks = await streamed(replica, kind, **body)
    for chunk in chunks:
        TypeAdapter(ChatCompletionChunk if kind is ChatRequest else CompletionChunk).validate_python(
            chunk, extra="forbid"
        )
    for index, expected in enumerate(whole["choices"]):
        own = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert [token for piece in own for token in piece.get("token_ids", ())] == expected["token_ids"]
        assert len(expected["token_ids"]) == 5
        assert (own[-1]["finish_reason"], own[-1]["stop_reason"]) == ("stop", "probe:every")
        assert own[-1]["probes"][0]["acted"] == expected["probes"][0]["acted"]
        joined = [score for piece in own for one in piece.get("probes", ()) for score in one["scores"]]
        assert joined == pytest.approx(expected["probes"][0]["scores"], rel=1e-4)
        text = "".join(p["delta"].get("content", "") if kind is ChatRequest else p["text"] for p in own)
        assert text == (expected["message"]["content"] if kind is ChatRequest else expected["text"])


@pytest.mark.parametrize("extra", [{}, {"response_format": {"type": "json_object"}}])
async def test_the_reasoning_is_closed_and_the_answer_follows(replica: ModelReplica, extra: Body) -> None:
    body = {**FREE, **OPEN, **extra, "max_tokens": 60, "logprobs": True, "top_logprobs": 2, "probes": [CLOSES]}
    asked = {"layers": [1], "hook_points": ["resid_post"], "session_id": "s"}
    reply = (await chat(replica, **body, activations=asked))["reply"]
    TypeAdapter(ChatCompletion).validate_python(reply, extra="forbid")
    (choice,) = reply["choices"]
    assert len(choice["token_ids"]) > 5
    assert choice["token_ids"][3] == 258
    tokens = choice["logprobs"]["content"]
    assert [token["logprob"] is None for token in tokens[:5]] == [False, False, False, True, False]
    assert (tokens[3]["token"], tokens[3]["top_logprobs"]) == ("</think>", [])
    thought = choice["message"]["reasoning_content"]
    assert bytes(byte for token in tokens[:3] for byte in token["bytes"]).decode(errors="replace") == thought
    if extra:
        assert choice["message"]["content"].startswith("{")
    done = choice["probes"][0]["acted"]
    assert (done["then"], done["position"]) == ("close_reasoning", choice["probes"][0]["n_prompt"] + 2)
    assert choice["stop_reason"] is None
    rollout = reply["activations"]
    assert rollout["acted"] == [{"probe": "every", **done}]
    assert rollout["row_stop"] - rollout["row_start"] == reply["usage"]["total_tokens"] - 1


async def test_a_completion_tells_no_log_probability_of_a_marker(replica: ModelReplica) -> None:
    body: Body = {**FREE, "prompt": "hi<think>", "max_tokens": 6, "temperature": 0, "logprobs": 2, "probes": [CLOSES]}
    reply = (await complete(replica, **body))["reply"]
    TypeAdapter(Completion).validate_python(reply, extra="forbid")
    scores = reply["choices"][0]["logprobs"]
    assert [score is None for score in scores["token_logprobs"]] == [place == 3 for place in range(6)]
    assert [top is None for top in scores["top_logprobs"]] == [place == 3 for place in range(6)]
    assert scores["tokens"][3] == "</think>"


REFUSED: list[tuple[Body, str, str]] = [
    (
        {"probes": [{"probe": THREE, "stop_when": {"above": 0}}]},
        "probes.0.stop_when",
        "3 outputs; allowed are probes with one",
    ),
    ({"probes": [{"probe": "nothing/x", "stop_when": {"above": 0}}]}, "probes.0.probe", "name it as FOLDER/NAME"),
]


async def test_what_cannot_act_is_refused_by_name(replica: ModelReplica) -> None:
    for body, param, message in REFUSED:
        error = (await chat(replica, **body))["error"]
        assert (error["status"], error["param"]) == (400, param), error
        assert re.search(message, error["message"]), error
    raw: Body = {"prompt": "hi", "probes": [CLOSES], "structured_outputs": {"regex": "a+"}}
    error = (await complete(replica, **raw))["error"]
    assert (error["status"], error["param"]) == (400, "probes.0.stop_when.then")


async def test_a_model_that_does_not_mark_its_reasoning_has_none_to_close(tmp_path: Path) -> None:
    tiny.module("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    async with started(model=str(tmp_path / "model"), store=str(tmp_path / "store"), dtype="float32") as plain:
        for when, field in ((CLOSES["stop_when"], "then"), ({"above": 0, "where": "reasoning"}, "where")):
            error = (await chat(plain, probes=[{**EVERY, "stop_when": when}]))["error"]
            assert (error["status"], error["param"]) == (400, f"probes.0.stop_when.{field}")
            assert "has no tokens <think> and </think>" in error["message"]
        assert (await chat(plain, **FREE, probes=[stops(2)]))["reply"]["usage"]["completion_tokens"] == 2


INVALID: list[tuple[Body, str, str]] = [
    ({"probes": [{"probe": "a/x", "stop_when": {"above": 0, "for": 0}}]}, "probes.0.stop_when.for", "greater than"),
    ({"probes": [{"probe": "a/x", "stop_when": {"above": "high"}}]}, "probes.0.stop_when.above", "valid number"),
    ({"probes": [{"probe": "a/x", "stop_when": {}}]}, "probes.0.stop_when.above", "required"),
    ({"probes": [{**EVERY, "stop_when": {"above": float("nan")}}]}, "probes.0.stop_when.above", "finite"),
    ({"probes": [stops(1, where="prompt")]}, "probes.0.stop_when.where", "'generated' or 'reasoning'"),
    ({"probes": [stops(1, then="close_reasoning", where="generated")]}, "probes.0.stop_when", "must be"),
    ({"probes": [{"probe": "a/x", "when": 1}]}, "probes.0.when", "unknown"),
    ({"probes": ["a/x", {"probe": "a/x"}]}, "probes", "have the same name"),
    ({"activations": {"labels": {"stop_when": "never"}}}, "activations.labels", "is reserved"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "message"), INVALID)
def test_what_is_not_allowed_is_refused_before_it_reaches_a_replica(body: Body, param: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "hi"}], **body})
    error = from_validation(caught.value.errors())
    assert error.param == param, error.message
    assert message in error.message
