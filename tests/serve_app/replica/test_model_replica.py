"""One replica without Serve around it: what each parameter does to the reply, and what is refused."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from roentgen.contract import ActivationRequest, RolloutKey
from roentgen.store import Session
from serve_app.config import ServerConfig
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.completions import CompletionRequest
from serve_app.openai_api.messages import Message
from serve_app.openai_api.tokenize import DetokenizeRequest, TokenizeRequest
from serve_app.replica.model_replica import ModelReplica
from tests.serve_app import tiny

Body = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny.module("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@asynccontextmanager
async def started(**options: Any) -> AsyncIterator[ModelReplica]:
    """A replica that has loaded its model."""
    config = ServerConfig(**options)
    replica = ModelReplica(config)
    replica.reconfigure(config.choice.model_dump())  # as Serve does
    while (await replica.status())["status"] == "loading":
        await asyncio.sleep(0.01)
    yield replica
    replica.close()


@pytest.fixture
async def replica(folder: Path, tmp_path: Path) -> AsyncIterator[ModelReplica]:
    async with started(model=str(folder), store=str(tmp_path / "store"), dtype="float32") as replica:
        yield replica


async def test_a_folder_is_asked_for_by_its_name_or_its_path(replica: ModelReplica, folder: Path) -> None:
    assert (await replica.status())["model"]["root"] == str(folder)
    for name in (folder.name, str(folder), f"{folder}/"):
        assert "reply" in await chat(replica, model=name)
    assert (await chat(replica, model=f"{folder}x"))["error"]["code"] == "model_not_found"


async def chat(replica: ModelReplica, **body: Any) -> Body:
    request = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "seed": 1} | body
    name = (await replica.status())["model"]["id"]
    return await replica.generate(ChatRequest.model_validate({"model": name, **request}))


async def complete(replica: ModelReplica, **body: Any) -> Body:
    name = (await replica.status())["model"]["id"]
    return await replica.generate(CompletionRequest.model_validate({"model": name, "seed": 1, **body}))


async def streamed(replica: ModelReplica, kind: type, **body: Any) -> list[Body]:
    name = (await replica.status())["model"]["id"]
    pieces = replica.generate_stream(kind.model_validate({"model": name, "stream": True, **body}))
    return [chunk async for chunks in pieces for chunk in chunks if "stats" not in chunk]


async def test_choices_have_streams_of_their_own_and_the_first_is_that_of_one(replica: ModelReplica) -> None:
    one = (await chat(replica))["reply"]
    three = (await chat(replica, n=3))["reply"]
    texts = [choice["message"]["content"] for choice in three["choices"]]
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert texts[0] == one["choices"][0]["message"]["content"]
    assert len(set(texts)) == 3
    assert three["usage"]["completion_tokens"] == 18
    assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]


async def test_chat_logprobs_name_every_token_of_the_content(replica: ModelReplica) -> None:
    reply = (await chat(replica, logprobs=True, top_logprobs=2, temperature=0))["reply"]
    (choice,) = reply["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 6
    raw = bytes(byte for token in content for byte in token["bytes"])
    # The text ends with its last whole character.
    assert raw.decode("utf-8", "replace").startswith(choice["message"]["content"])
    for token in content:
        assert len(token["top_logprobs"]) == 2
        assert token["top_logprobs"][0]["logprob"] == token["logprob"]  # greedy


async def test_a_stream_says_the_same_as_a_whole_reply(replica: ModelReplica) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "seed": 3, "n": 2, "logprobs": True}
    whole = (await chat(replica, **body))["reply"]
    chunks = await streamed(replica, ChatRequest, **body, stream_options={"include_usage": True})
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        text = "".join(piece["delta"].get("content") or "" for piece in own)
        assert text == whole["choices"][index]["message"]["content"]
        tokens = [t for piece in own if piece["logprobs"] for t in piece["logprobs"]["content"]]
        assert [t["logprob"] for t in tokens] == pytest.approx(
            [t["logprob"] for t in whole["choices"][index]["logprobs"]["content"]], rel=1e-4
        )
        assert [piece["finish_reason"] for piece in own if piece["finish_reason"]] == ["length"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert {c["id"] for c in chunks} == {chunks[0]["id"]}


async def test_an_echoed_prompt_is_scored_like_a_lone_forward(replica: ModelReplica, folder: Path) -> None:
    prompts = [[10, 20, 30, 40, 50], [7, 7, 8]]
    reply = (await complete(replica, prompt=prompts, echo=True, logprobs=1, max_tokens=0))["reply"]
    for prompt, choice in zip(prompts, reply["choices"], strict=True):
        with torch.inference_mode():
            logits = tiny.module("llama")(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        expected = logits[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        assert logprobs["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
        best = [max(top.values()) for top in logprobs["top_logprobs"][1:]]
        assert best == pytest.approx(logits[:-1].max(-1).values.tolist(), abs=1e-4)
        assert logprobs["text_offset"][0] == 0
    assert reply["usage"] == {
        "prompt_tokens": 8, "completion_tokens": 0, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 0}
    }  # fmt: skip


@pytest.mark.parametrize("top", [0, 2])
async def test_a_completions_alternatives_hold_the_token_that_came(replica: ModelReplica, top: int) -> None:
    body = {"prompt": "ab", "max_tokens": 12, "temperature": 2, "logprobs": top, "echo": True}
    (whole,) = (await complete(replica, **body))["reply"]["choices"]
    chunks = await streamed(replica, CompletionRequest, seed=1, **body)
    pieces = [c["choices"][0]["logprobs"] for c in chunks if c["choices"] and c["choices"][0]["logprobs"]]
    joined = {key: [value for piece in pieces for value in piece[key]] for key in pieces[0]}
    for logprobs in (whole["logprobs"], joined):
        rows = list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))
        assert len(rows) == 2 + 12
        assert rows[0][1:] == (None, None)  # nothing predicts the first token
        for token, logprob, best in rows[1:]:
            assert best[token] == logprob
            assert logprob <= max(best.values())
            assert 1 <= len(best) <= top + 1
        if top:
            assert any(len(best) == top + 1 for _, _, best in rows[1:]), (
                "the control: some token was none of the likeliest"
            )
    assert joined["tokens"] == whole["logprobs"]["tokens"]


async def test_a_chats_logprobs_have_as_many_alternatives_as_asked_for(replica: ModelReplica) -> None:
    for top, given in ((None, 0), (0, 0), (3, 3)):
        body = {"logprobs": True, "temperature": 2} | ({} if top is None else {"top_logprobs": top})
        (choice,) = (await chat(replica, **body))["reply"]["choices"]
        assert [len(token["top_logprobs"]) for token in choice["logprobs"]["content"]] == [given] * 6


async def test_prompts_of_every_shape_and_their_choices_in_order(replica: ModelReplica) -> None:
    alone = (await complete(replica, prompt="ab", max_tokens=4))["reply"]["choices"][0]["text"]
    tokens = (await replica.tokenize(TokenizeRequest(model=alone_name(replica), prompt="ab")))["reply"]["tokens"]
    assert (await complete(replica, prompt=tokens, max_tokens=4))["reply"]["choices"][0]["text"] == alone
    several = (await complete(replica, prompt=["ab", "cd"], n=2, max_tokens=4, echo=True))["reply"]["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2, 3]
    assert [choice["text"][:2] for choice in several] == ["ab", "ab", "cd", "cd"]
    assert several[0]["text"] == "ab" + alone


def alone_name(replica: ModelReplica) -> str:
    assert replica._slot.served is not None
    return replica._slot.served.model.source.name


async def test_a_streamed_echo_gives_the_prompt_first(replica: ModelReplica) -> None:
    whole = (await complete(replica, prompt="ab", max_tokens=4, echo=True, logprobs=0))["reply"]["choices"][0]
    for logprobs in (None, 0):
        extra = {} if logprobs is None else {"logprobs": logprobs}
        chunks = await streamed(replica, CompletionRequest, prompt="ab", max_tokens=4, echo=True, seed=1, **extra)
        assert "".join(c["choices"][0]["text"] for c in chunks) == whole["text"]
    assert chunks[-1]["choices"][0]["logprobs"]["tokens"] == whole["logprobs"]["tokens"]


async def test_each_choice_keeps_a_rollout(replica: ModelReplica) -> None:
    asked = {"session_id": "s", "layers": [1], "hook_points": ["resid_post"], "labels": {"a": 1}}
    reply = (await chat(replica, n=3, activations=asked))["reply"]
    rollouts = reply["activations"]["rollouts"]
    assert [r["choice_index"] for r in rollouts] == [0, 1, 2]
    session = Session.open(rollouts[0]["uri"])
    index = session.rollouts().set_index("rollout_id")
    for rollout, choice in zip(rollouts, reply["choices"], strict=True):
        row = index.loc[rollout["rollout_id"]]
        assert row["text"].endswith(choice["message"]["content"])
        assert rollout["row_stop"] - rollout["row_start"] == row["n_prompt"] + row["n_completion"] - 1
    single = (await complete(replica, prompt="abc", max_tokens=3, activations=asked))["reply"]["activations"]
    assert single["session_id"] == "s"
    assert single["tensors"]["layers.1.resid_post"]["shape"] == [5, 32]


async def test_a_prompt_that_is_only_read_keeps_its_rows(replica: ModelReplica) -> None:
    asked = {"layers": [1], "hook_points": ["resid_post"], "session_id": "read"}
    sent = (await complete(replica, prompt="abc", max_tokens=0, echo=True, activations=asked))["reply"]["activations"]
    assert sent["tensors"]["layers.1.resid_post"]["shape"] == [3, 32]
    assert Session.open(sent["uri"]).rollouts()["n_completion"].tolist() == [0]


async def test_values_inline_are_the_stored_ones(replica: ModelReplica) -> None:
    for delivery, kind in (("sample", "sampled_tensor"), ("full", "complete_tensor")):
        asked = {"layers": [1], "hook_points": ["resid_post"], "return": delivery}
        sent = (await chat(replica, activations=asked))["reply"]["activations"]
        tensor = sent["tensors"]["layers.1.resid_post"]
        assert (tensor["format"], tensor.get("sample_info")) == (
            kind,
            "first_50_features" if delivery == "sample" else None,
        )
        (stored,) = Session.open(sent["uri"]).activations("layers.1.resid_post")[-1:]
        values = np.array(tensor["data"])
        assert tensor["shape"] == [1, *stored.values.shape]
        np.testing.assert_allclose(values[0], stored.values[:, :50], rtol=1e-6)
        json.dumps(tensor)


async def test_the_older_spelling_has_the_older_keys(replica: ModelReplica) -> None:
    older = {"layers": [0, 2], "hook_points": ["input_layernorm.output"], "return_activations": True}
    tensors = (await chat(replica, collect_activations=older))["reply"]["activations"]["tensors"]
    assert list(tensors) == ["layer_0_input_layernorm_output", "layer_2_input_layernorm_output"]
    assert tensors["layer_0_input_layernorm_output"]["format"] == "sampled_tensor"


async def test_a_later_turn_keeps_only_what_is_new(replica: ModelReplica) -> None:
    talk = [{"role": "user", "content": "hi"}]
    asked = {"layers": [1], "hook_points": ["resid_post"], "session_id": "t"}
    first = (await chat(replica, messages=talk, activations=asked))["reply"]
    talk += [first["choices"][0]["message"] | {"content": "yes"}, {"role": "user", "content": "go on"}]
    second = (await chat(replica, messages=talk, activations={**asked, "since": "turn"}))["reply"]["activations"]
    rows = Session.open(second["uri"]).activations("layers.1.resid_post")
    last = rows[len(rows) - 1 :]
    (item,) = last
    n_prompt = int(last.rollouts["n_prompt"].iloc[0])
    # The prompt is "[user]hi[assistant]yes[user]go on[reply]", a token a byte: from the "s" of "yes" on it is new.
    assert item.position[0] == len("[user]hi[assistant]ye")
    assert item.position[-1] == n_prompt + 4


SUM = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"type": "boolean"}},
            "required": ["a", "b"],
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
async def test_a_random_model_calls_a_tool_validly_when_it_must(replica: ModelReplica, choice: Any) -> None:
    body = {"tools": [SUM], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 90, "temperature": 2}
    # The tools' description would fill this model's context; it is random, and reads nothing anyway.
    replica._slot.served.model.tokenizer.chat_template = "{{ '?' if messages else '' }}"
    (reply,) = (await chat(replica, **body))["reply"]["choices"]
    (call,) = reply["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert (call["function"]["name"], reply["message"]["content"]) == ("add", None)
    assert isinstance(arguments["a"], int)
    assert isinstance(arguments["b"], bool)
    assert reply["finish_reason"] == "tool_calls"
    chunks = await streamed(replica, ChatRequest, messages=[{"role": "user", "content": "hi"}], seed=1, **body)
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", [])]
    assert "".join(piece["function"].get("arguments", "") for piece in pieces) == call["function"]["arguments"]
    assert {piece["index"] for piece in pieces} == {0}


async def test_a_random_model_writes_the_json_that_is_asked_for(replica: ModelReplica) -> None:
    schema = SUM["function"]["parameters"]
    shape = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema, "strict": True}}
    reply = (await chat(replica, response_format=shape, max_tokens=60, temperature=2))["reply"]["choices"][0]
    assert set(json.loads(reply["message"]["content"])) == {"a", "b"}
    assert reply["finish_reason"] == "stop"
    broken = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
    error = (await chat(replica, response_format=broken))["error"]
    assert (error["status"], error["param"]) == (400, "response_format.json_schema.schema")


async def test_a_random_model_calls_a_tool_or_answers_in_the_form_asked_for(replica: ModelReplica) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SUM["function"]["parameters"]}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [SUM]}}
    tools = {"tools": [SUM, {"type": "function", "function": {"name": "never"}}], "tool_choice": choice}
    body = {
        **tools,
        "response_format": shape,
        "max_tokens": 100,
        "temperature": 2,
        "n": 6,
        "parallel_tool_calls": False,
    }
    replica._slot.served.model.tokenizer.chat_template = "{{ '?' if messages else '' }}"
    choices = (await chat(replica, **body))["reply"]["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"tool_calls", "stop"}
    chunks = await streamed(replica, ChatRequest, messages=[{"role": "user", "content": "hi"}], seed=1, **body)
    for choice in choices:
        message = choice["message"]
        deltas = [
            c["choices"][0]["delta"] for c in chunks if c["choices"] and c["choices"][0]["index"] == choice["index"]
        ]
        pieces = [piece["function"] for delta in deltas for piece in delta.get("tool_calls", [])]
        if choice["finish_reason"] == "tool_calls":
            assert message["content"] is None
            (call,) = (call["function"] for call in message["tool_calls"])
            assert (pieces[0]["name"], "".join(piece["arguments"] for piece in pieces)) == ("add", call["arguments"])
            said = call["arguments"]
        else:
            said = message["content"]
            assert "".join(delta.get("content") or "" for delta in deltas) == said
            assert not pieces
        assert set(json.loads(said)) == {"a", "b"}


async def test_a_schema_that_cannot_end_is_refused_wherever_it_stands(replica: ModelReplica) -> None:
    endless = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": endless}}
    for body, param in (
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": endless}}},
         "response_format.json_schema.schema"),
        ({"tools": [SUM, tool], "tool_choice": "required"}, "tools.1.function.parameters"),
    ):  # fmt: skip
        # The tools' description would fill this model's context.
        replica._slot.served.model.tokenizer.chat_template = "{{ '?' if messages else '' }}"
        error = (await chat(replica, **body))["error"]
        assert (error["status"], error["param"]) == (400, param)
        assert error["message"] == f"{param}: no value matches it: something that it requires contains itself"


REFUSED = [
    ({"max_tokens": 500}, 400, "messages",
     r"This model's maximum context length is 128 tokens\. However, you requested 5\d\d tokens \(\d+ in the messages, 500 in "
     r"the completion\)\. Please reduce the length of the messages or completion\.$"),
    ({"messages": [{"role": "user", "content": "long " * 30}], "max_tokens": None}, 400, "messages",
     r"This model's maximum context length is 128 tokens\. However, your messages resulted in 1\d\d tokens\. Please reduce"),
    ({"logit_bias": {"9999": 1}}, 400, "logit_bias", "9999 is out of vocabulary"),
    ({"logit_bias": {"9999": 1, "3": 1, "300": 1}}, 400, "logit_bias",
     "9999, 300 are out of vocabulary; the model has 257 tokens, 0–256"),
    ({"stop_token_ids": [257]}, 400, "stop_token_ids", "257 is out of vocabulary"),
    ({"activations": {"layers": [7]}}, 400, "activations.layers", "out of range"),
    ({"activations": {"layers": [1], "return": "full"}, "max_tokens": 100}, 400, "activations.return", "limit is 0 MB"),
    ({"activations": {"layers": []}}, 400, "activations.layers", "nothing to capture"),
    ({"model": "other"}, 404, "model", "not served here"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "param", "message"), REFUSED)
async def test_what_cannot_be_is_refused_by_name(
    replica: ModelReplica, body: Body, status: int, param: str, message: str
) -> None:
    replica._config = replica._config.model_copy(update={"max_inline_bytes": 1000})
    error = (await chat(replica, **body))["error"]
    assert (error["status"], error["param"]) == (status, param)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error["message"])


async def test_a_request_that_takes_too_long_is_ended(replica: ModelReplica) -> None:
    replica._config = replica._config.model_copy(update={"request_timeout_s": 1e-6})
    assert (await chat(replica))["error"]["status"] == 408


async def test_tokens_there_and_back(replica: ModelReplica) -> None:
    name = alone_name(replica)
    reply = (await replica.tokenize(TokenizeRequest(model=name, prompt="é!", return_token_strs=True)))["reply"]
    assert (reply["count"], reply["max_model_len"], len(reply["token_strs"])) == (3, 128, 3)
    back = await replica.detokenize(DetokenizeRequest(model=name, tokens=reply["tokens"]))
    assert back == {"reply": {"prompt": "é!"}}
    assert (await replica.detokenize(DetokenizeRequest(model=name, tokens=[999])))["error"]["param"] == "tokens"
    rendered = await replica.tokenize(TokenizeRequest(model=name, messages=[{"role": "user", "content": "x"}]))
    assert rendered["reply"]["count"] == len("[user]x[reply]")


def bypassing(**body: Any) -> ChatRequest:
    """Return a request that holds what the wire would have refused."""
    request = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    )
    return request.model_copy(update=body)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_nobody_expected_is_500_with_its_reason(replica: ModelReplica, stream: bool) -> None:
    half = [Message.model_construct(role="user", content="\ud83d", tool_calls=[])]
    request = bypassing(model=alone_name(replica), messages=half)
    if stream:
        ((reply,),) = [chunks async for chunks in replica.generate_stream(request)]
    else:
        reply = await replica.generate(request)
    assert (reply["error"]["status"], reply["error"]["code"]) == (500, "internal_error")
    assert "TypeError" in reply["error"]["message"]
    prompt = TokenizeRequest.model_construct(model=alone_name(replica), prompt="\ud83d")
    assert (await replica.tokenize(prompt))["error"]["code"] == "internal_error"
    tokens = DetokenizeRequest.model_construct(model=alone_name(replica), tokens=["x"])
    assert (await replica.detokenize(tokens))["error"]["code"] == "internal_error"
    assert (await chat(replica))["reply"]["choices"]  # and the next is answered


async def test_a_rollout_that_cannot_be_stored_does_not_fail_those_beside_it(replica: ModelReplica) -> None:
    asked = ActivationRequest(layers=(1,), hook_points=("resid_post",), session_id="beside")
    keys = [RolloutKey.model_construct(config_hash="c", problem_id=f"p{i}", epoch=1, turn=0) for i in range(6)]
    keys[2] = keys[2].model_copy(update={"turn": 2**31})
    name = alone_name(replica)
    requests = [bypassing(model=name, activations=asked.model_copy(update={"key": key})) for key in keys]
    replies = await asyncio.gather(*(replica.generate(request) for request in requests))
    assert [number for number, reply in enumerate(replies) if "error" in reply] == [2]
    error = replies[2]["error"]
    assert (error["status"], error["code"], "turn" in error["message"]) == (500, "activations_not_stored", True)
    uri = replies[0]["reply"]["activations"]["uri"]
    assert sorted(Session.open(uri).rollouts()["problem_id"]) == ["p0", "p1", "p3", "p4", "p5"]


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages[9].content.x.y }}", "{% for i in range(10 ** 9) %}{% endfor %}"]
)
async def test_a_template_that_fails_on_a_conversation_refuses_it(replica: ModelReplica, template: str) -> None:
    replica._slot.served.model.tokenizer.chat_template = template
    error = (await chat(replica))["error"]
    assert (error["status"], error["param"]) == (400, "messages")


HUGE = 10**30


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": HUGE}, "messages"),
        ({"logit_bias": {str(HUGE): 1}}, "logit_bias"),
        ({"stop_token_ids": [HUGE]}, "stop_token_ids"),
        ({"activations": {"layers": [HUGE]}}, "activations.layers"),
        ({"activations": {"layers": [-HUGE]}}, "activations.layers"),
        ({"steering": [{"vector": [0.0] * 32, "layer": HUGE, "scale": 1}]}, "steering.0"),
        ({"steering": [{"vector": [1e300] * 32, "layer": 1, "scale": 1e300}]}, "steering.0.scale"),
        ({"top_k": HUGE, "temperature": 1}, None),
        ({"min_tokens": HUGE}, None),
        ({"activations": {"layers": [1], "positions": "stride:2147483647"}}, None),
        ({"seed": 2**63 - 1, "temperature": 1, "n": 3}, None),
    ],
)
async def test_huge_numbers_are_refused_or_mean_what_they_say(
    replica: ModelReplica, body: Body, param: str | None
) -> None:
    reply, beside = await asyncio.gather(chat(replica, **body), chat(replica))
    assert "reply" in beside
    if param is None:
        assert "reply" in reply
    else:
        assert (reply["error"]["status"], reply["error"]["param"]) == (400, param)


async def test_an_effort_turns_thinking_off_unless_the_template_s_own_variable_says_otherwise(
    replica: ModelReplica,
) -> None:
    words = replica._slot.served.model.tokenizer
    words.chat_template = "{{ '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}"

    async def prompt_of(**body: Any) -> str:
        return words.decode((await chat(replica, return_token_ids=True, **body))["reply"]["prompt_token_ids"])

    assert await prompt_of(reasoning_effort="none") == "</think>"
    assert await prompt_of(reasoning_effort="medium") == "<think>"
    assert await prompt_of(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True}) == "<think>"
    assert (await chat(replica, reasoning_effort="high"))["error"]["param"] == "reasoning_effort"
