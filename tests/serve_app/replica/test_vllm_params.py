"""Parameters that are vLLM's, through one replica: what each adds to a reply, checked against transformers alone."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.completions import CompletionRequest
from serve_app.openai_api.tokenize import TokenizeRequest, bad_word_tokens
from serve_app.replica.model_replica import ModelReplica
from tests.serve_app import tiny
from tests.serve_app.replica.test_model_replica import chat, complete, folder, started, streamed

__all__ = ["folder"]

END = tiny.EOS
NO_END = {str(END): -100}
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def logprobs() -> Any:
    module = tiny.module("llama")

    def of(token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return module(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].log_softmax(-1)

    return of


@pytest.fixture
async def replica(folder: Path, tmp_path: Path) -> AsyncIterator[ModelReplica]:
    async with started(model=str(folder), store=str(tmp_path / "store"), dtype="float32") as replica:
        yield replica


def spoken(template: str) -> list[int]:
    """Return the tokens of a text in the tiny tokenizer, by its own vocabulary."""
    return list(tiny.tokenizer()(template)["input_ids"])


async def test_prompt_logprobs_are_those_of_a_teacher_forced_forward(replica: ModelReplica, logprobs: Any) -> None:
    prompt = spoken("abcab")
    text = (await complete(replica, prompt="abcab", max_tokens=1, prompt_logprobs=3, echo=True, logprobs=1))["reply"]
    (choice,) = text["choices"]
    talk = (await chat(replica, prompt_logprobs=0, return_token_ids=True))["reply"]
    for token_ids, found, top in (
        (prompt, choice["prompt_logprobs"], 3),
        (talk["prompt_token_ids"], talk["prompt_logprobs"], 0),
    ):
        expected = logprobs(token_ids)
        assert found[0] is None
        assert len(found) == len(token_ids)
        for at, (token, told) in enumerate(zip(token_ids[1:], found[1:], strict=True)):
            order = expected[at].argsort(descending=True).tolist()
            assert set(told) == {str(other) for other in (token, *order[:top])}
            for other, said in told.items():
                assert said["rank"] == 1 + order.index(int(other))
                assert said["logprob"] == pytest.approx(expected[at, int(other)].item(), abs=1e-4)
                assert said["decoded_token"] == tiny.tokenizer().decode([int(other)])
    # What `logprobs` asks for is as many as before.
    assert {len(top) for top in choice["logprobs"]["top_logprobs"][1:-1]} <= {1, 2}


async def test_token_ids_are_told_whole_and_in_pieces(replica: ModelReplica) -> None:
    asked = {"return_token_ids": True, "max_tokens": 5, "seed": 3, "temperature": 2.0}
    for kind, body in ((ChatRequest, {"messages": [USER], "n": 2}), (CompletionRequest, {"prompt": ["ab", "c"]})):
        reply = (await (chat if kind is ChatRequest else complete)(replica, **asked, **body))["reply"]
        chunks = await streamed(replica, kind, **asked, **body)
        pieces: dict[int, list[int]] = {0: [], 1: []}
        prompts: dict[int, list[int]] = {}
        for place, chunk in enumerate(chunks):
            if prompt := chunk.get("prompt_token_ids"):
                assert place == 0
                prompts = {0: prompt, 1: prompt}
            for choice in chunk["choices"]:
                pieces[choice["index"]] += choice.get("token_ids", [])
                if prompt := choice.get("prompt_token_ids"):
                    assert choice["index"] not in prompts
                    prompts[choice["index"]] = prompt
        for choice in reply["choices"]:
            assert len(choice["token_ids"]) == 5
            assert pieces[choice["index"]] == choice["token_ids"]
            own = choice.get("prompt_token_ids") or reply["prompt_token_ids"]
            assert prompts[choice["index"]] == own
        assert [prompts[0], prompts[1]] == (
            [spoken("[user]hi[reply]")] * 2 if kind is ChatRequest else [spoken("ab"), spoken("c")]
        )


async def test_the_token_that_ends_a_reply_is_among_its_ids(replica: ModelReplica) -> None:
    body = {"logit_bias": {str(END): 100}, "return_token_ids": True}
    (choice,) = (await chat(replica, **body))["reply"]["choices"]
    assert (choice["token_ids"], choice["message"]["content"], choice["stop_reason"]) == ([END], "", None)
    chunks = await streamed(replica, ChatRequest, messages=[USER], **body)
    assert [choice["token_ids"] for chunk in chunks for choice in chunk["choices"] if choice.get("token_ids")] == [
        [END]
    ]


@pytest.mark.parametrize(
    "body",
    [
        {"probes": [{"name": "p", "key": "layers.1.resid_post", "weight": [1.0] * 32}]},
        {"activations": {"layers": [1], "hook_points": ["resid_post"], "return": "full"}},
    ],
)
async def test_rows_and_scores_come_with_the_ids_of_their_tokens(replica: ModelReplica, body: dict[str, Any]) -> None:
    reply = (await chat(replica, **body, logit_bias=NO_END))["reply"]
    (choice,) = reply["choices"]
    n_rows = len(reply["prompt_token_ids"]) + len(choice["token_ids"]) - 1
    if "probes" in body:
        assert len(choice["probes"][0]["scores"]) == n_rows
    else:
        assert reply["activations"]["tensors"]["layers.1.resid_post"]["shape"][1] == n_rows
    assert (await chat(replica, **body, return_token_ids=False))["reply"]["prompt_token_ids"] is None
    assert (await chat(replica))["reply"]["choices"][0]["token_ids"] is None


async def test_tokens_are_spelled_by_their_ids_if_that_is_asked(replica: ModelReplica) -> None:
    asked = {"return_tokens_as_token_ids": True, "return_token_ids": True, "max_tokens": 4, "seed": 1}
    (text,) = (await complete(replica, prompt="ab", logprobs=2, **asked))["reply"]["choices"]
    assert text["logprobs"]["tokens"] == [f"token_id:{token}" for token in text["token_ids"]]
    assert all(len(top) in (2, 3) for top in text["logprobs"]["top_logprobs"])
    (talk,) = (await chat(replica, logprobs=True, top_logprobs=2, **asked))["reply"]["choices"]
    assert [one["token"] for one in talk["logprobs"]["content"]] == [f"token_id:{token}" for token in talk["token_ids"]]


async def test_every_chunk_counts_if_that_is_asked(replica: ModelReplica) -> None:
    body = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "logit_bias": NO_END, "n": 2}
    for kind, asked in ((ChatRequest, {"messages": [USER]}), (CompletionRequest, {"prompt": "ab"})):
        chunks = await streamed(replica, kind, **body, **asked, max_tokens=5, return_token_ids=True)
        told = 0
        for chunk in chunks:
            told += sum(len(choice.get("token_ids", [])) for choice in chunk["choices"])
            assert chunk["usage"]["completion_tokens"] == told
            assert chunk["usage"]["prompt_tokens"] == len(
                spoken("ab" if kind is CompletionRequest else "[user]hi[reply]")
            )
        assert told == 10
        assert not any("usage" in chunk for chunk in (await streamed(replica, kind, **asked, max_tokens=2)))


@pytest.mark.parametrize(("keep", "side", "left"), [(3, "left", "cde"), (3, "right", "abc"), (9, "left", "abcde")])
async def test_a_prompt_is_cut_to_so_many_tokens(replica: ModelReplica, keep: int, side: str, left: str) -> None:
    cut = {"truncate_prompt_tokens": keep, "truncation_side": side, "echo": True, "max_tokens": 2}
    for prompt in ("abcde", spoken("abcde")):
        (choice,) = (await complete(replica, prompt=prompt, return_token_ids=True, **cut))["reply"]["choices"]
        assert choice["prompt_token_ids"] == spoken(left)
        assert choice["text"].startswith(left)
        (plain,) = (await complete(replica, prompt=left, max_tokens=2, echo=True))["reply"]["choices"]
        assert choice["text"] == plain["text"]


async def test_minus_one_keeps_as_many_tokens_as_fit(replica: ModelReplica) -> None:
    card = (await replica.status())["model"]
    context = card["context_length"]
    assert card["max_model_len"] == context
    asked = {"prompt": "a" * (context + 50), "max_tokens": 7, "return_token_ids": True}
    assert (await complete(replica, **asked))["error"]["code"] == "context_length_exceeded"
    (choice,) = (await complete(replica, **asked, truncate_prompt_tokens=-1))["reply"]["choices"]
    assert len(choice["prompt_token_ids"]) == context - 7
    asked |= {"truncate_prompt_tokens": -1, "max_tokens": context + 1}
    assert (await complete(replica, **asked))["error"]["code"] == "context_length_exceeded"


async def test_a_cut_conversation_is_stored_as_the_model_saw_it(replica: ModelReplica) -> None:
    kept = {"layers": [1], "hook_points": ["resid_post"], "return": "full"}
    body = {"messages": [USER, {"role": "assistant", "content": "yo"}, USER], "activations": kept, "logit_bias": NO_END}
    reply = (await chat(replica, **body, truncate_prompt_tokens=12, max_tokens=2))["reply"]
    assert reply["prompt_token_ids"] == spoken("[user]hi[assistant]yo[user]hi[reply]")[-12:]
    assert reply["activations"]["tensors"]["layers.1.resid_post"]["shape"][1] == 13


async def test_a_reply_goes_on_from_what_the_assistant_has_said(replica: ModelReplica) -> None:
    talk = {"messages": [USER, {"role": "assistant", "content": "Well, "}], "continue_final_message": True}
    asked = {**talk, "temperature": 0, "max_tokens": 4, "return_token_ids": True}
    reply = (await chat(replica, **asked))["reply"]
    assert reply["prompt_token_ids"] == spoken("[user]hi[assistant]Well, ")
    (plain,) = (await complete(replica, prompt="[user]hi[assistant]Well, ", temperature=0, max_tokens=4))["reply"][
        "choices"
    ]
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == plain["text"]
    (echoed,) = (await chat(replica, **asked, echo=True, add_generation_prompt=False))["reply"]["choices"]
    assert echoed["message"]["content"] == "Well, " + plain["text"]
    chunks = await streamed(replica, ChatRequest, **asked, echo=True)
    said = [piece["choices"][0]["delta"].get("content", "") for piece in chunks if piece["choices"]]
    assert "".join(said) == "Well, " + plain["text"]


async def test_constraints_hold_on_both_routes(replica: ModelReplica) -> None:
    for outputs in ({"structured_outputs": {"choice": ["north", "south"]}}, {"guided_regex": "north|south"}):
        asked = {**outputs, "temperature": 2, "max_tokens": 9}
        (talk,) = (await chat(replica, **asked))["reply"]["choices"]
        (text,) = (await complete(replica, prompt="Go ", **asked))["reply"]["choices"]
        assert {talk["message"]["content"], text["text"]} <= {"north", "south"}
    error = (await complete(replica, prompt="Go ", structured_outputs={"regex": "[.*"}))["error"]
    assert (error["status"], error["param"], error["code"]) == (400, "structured_outputs.regex", "unsupported_schema")


async def test_tokens_that_the_model_does_not_have_are_refused(replica: ModelReplica) -> None:
    for param, value in (("allowed_token_ids", [5, 999]), ("logprob_token_ids", [999]), ("stop_token_ids", [999])):
        error = (await complete(replica, prompt="a", logprobs=1, **{param: value}))["error"]
        assert (error["status"], error["param"]) == (400, param)
        assert "999" in error["message"]


async def test_a_conversation_is_tokenized_as_it_would_be_rendered(replica: ModelReplica) -> None:
    talk = [USER, {"role": "assistant", "content": "yo"}]
    for extra, text in (
        ({}, "[user]hi[assistant]yo[reply]"),
        ({"add_generation_prompt": False}, "[user]hi[assistant]yo"),
        ({"add_generation_prompt": False, "continue_final_message": True}, "[user]hi[assistant]yo"),
    ):
        reply = (await replica.tokenize(TokenizeRequest.model_validate({"messages": talk, **extra})))["reply"]
        assert reply["tokens"] == spoken(text)
        assert reply["token_strs"] is None


async def test_the_tokenizer_is_described(replica: ModelReplica) -> None:
    told, words = (await replica.tokenizer_info())["reply"], tiny.tokenizer()
    assert (told["eos_token"], told["bos_token"], told["chat_template"]) == ("<eos>", None, words.chat_template)
    assert told["vocab_size"] == len(words)
    assert told["added_tokens_decoder"] == {str(END): "<eos>"}


def test_a_bad_word_has_the_tokens_that_vllm_gives_it() -> None:
    words = tiny.tokenizer()
    # Of bytes alone, a word behind a space has a token more, so only its own spelling counts.
    assert bad_word_tokens(words, ["ab", " ab", "c"]) == (tuple(spoken("ab")), tuple(spoken("c")))
