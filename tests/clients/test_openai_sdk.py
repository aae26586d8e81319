"""The openai SDK as people use it: sync, async, streamed, raw, its errors, and activations with each."""

import subprocess
import sys

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.clients.conftest import Documentation
from tests.conftest import Server

pytestmark = pytest.mark.integration
MODEL = "smollm2-135m"
QUESTION = [{"role": "user", "content": "What is 2 + 3? Answer briefly."}]
ASK = {"model": MODEL, "messages": QUESTION, "max_tokens": 16, "temperature": 0}
KEEP = {"activations": {"session_id": "sdk-tests", "layers": [3], "hook_points": ["resid_post"]}}
KEY = "layers.3.resid_post"


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    (listed,) = client.models.list()
    assert client.models.retrieve(listed.id) == listed
    assert (listed.id, listed.object) == (MODEL, "model")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


async def test_sync_async_and_streams_say_the_same(client: OpenAI, server: Server) -> None:
    whole = client.chat.completions.create(**ASK)
    streamed = "".join(
        chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**ASK, stream=True)
    )
    async with AsyncOpenAI(base_url=server.base_url, api_key="none") as other:
        asynchronous = await other.chat.completions.create(**ASK)
        stream = await other.chat.completions.create(**ASK, stream=True)
        async_streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    text = whole.choices[0].message.content
    assert text
    assert [streamed, asynchronous.choices[0].message.content, async_streamed] == [text] * 3


def test_usage_in_a_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(**ASK)
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert (
        chunks[-1].usage.model_copy(update={"prompt_tokens_details": whole.usage.prompt_tokens_details}) == whole.usage
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_raw_responses_have_request_ids(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**ASK)
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    assert len(raw.headers.get_list("x-request-id")) == 1
    assert raw.parse().choices[0].message.content
    mine = client.chat.completions.with_raw_response.create(**ASK, extra_headers={"X-Request-Id": "mine-1"})
    assert (mine.headers["x-request-id"], mine.parse()._request_id) == ("mine-1", "mine-1")
    with client.chat.completions.with_streaming_response.create(**ASK) as streamed:
        assert streamed.headers["x-request-id"]
        assert streamed.parse().choices


def test_completions_whole_streamed_and_echoed(client: OpenAI) -> None:
    ask = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    text = client.completions.create(**ask).choices[0].text
    assert "Paris" in text
    assert "".join(c.choices[0].text for c in client.completions.create(**ask, stream=True)) == text
    scored = client.completions.create(**ask, logprobs=2, echo=True).choices[0]
    assert scored.text == ask["prompt"] + text
    assert scored.logprobs is not None
    assert "".join(scored.logprobs.tokens or []) == scored.text
    assert (scored.logprobs.token_logprobs or [])[0] is None
    only_read = client.completions.create(**{**ask, "max_tokens": 0}, logprobs=1, echo=True).choices[0]
    assert only_read.text == ask["prompt"]
    several = client.completions.create(**{**ask, "prompt": ["One, two,", "Red, green,"]}, n=2).choices
    assert [choice.index for choice in several] == [0, 1, 2, 3]


def test_choices_seeds_and_logprobs(client: OpenAI) -> None:
    hot = {**ASK, "temperature": 1.5, "n": 3, "logprobs": True, "top_logprobs": 2}
    first, again, other = (client.chat.completions.create(**hot, seed=seed) for seed in (7, 7, 8))
    texts = [[choice.message.content for choice in reply.choices] for reply in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) > 1
    for choice in first.choices:
        assert choice.logprobs is not None
        tokens = choice.logprobs.content or []
        assert "".join(token.token for token in tokens) == choice.message.content
        assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("extra", "kind", "param"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError, "model"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"max_tokens": 9000}, openai.BadRequestError, "messages"),
        ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"extra_body": {"store": True}}, openai.BadRequestError, "store"),
        ({"extra_body": {"activations": {"layers": [40]}}}, openai.BadRequestError, "activations.layers"),
    ],
)
def test_errors_are_the_sdks_classes_and_name_the_parameter(
    client: OpenAI, extra: dict[str, object], kind: type[openai.APIStatusError], param: str, stream: bool
) -> None:
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{**ASK, **extra}, stream=stream)
    assert caught.value.param == param
    assert caught.value.request_id


def test_activations_whole_streamed_and_of_several_choices(client: OpenAI) -> None:
    whole = client.chat.completions.create(**ASK, extra_body=KEEP)
    rows = whole.activations["tensors"][KEY]["shape"][0]
    assert whole.usage is not None
    assert rows == whole.usage.total_tokens - 1
    *before, last = client.chat.completions.create(**ASK, stream=True, extra_body=KEEP)
    assert not any("activations" in (chunk.model_extra or {}) for chunk in before)
    assert last.activations["tensors"][KEY]["shape"][0] == rows
    several = client.chat.completions.create(**{**ASK, "temperature": 1}, n=2, extra_body=KEEP)
    assert [r["choice_index"] for r in several.activations["rollouts"]] == [0, 1]
    raw = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=2, extra_body=KEEP)
    assert raw.activations["tensors"][KEY]["shape"][1] == 576


def test_the_documented_script_runs(docs: Documentation) -> None:
    done = subprocess.run([sys.executable, docs.folder / "sdk.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(", 576]")
