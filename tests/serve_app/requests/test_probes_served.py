"""Probes and steering as users meet them: real Serve, real HTTP, the unmodified openai client, SmolLM2-135M."""

import asyncio
from typing import Any

import numpy as np
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI

from roentgen.linear_probe import ProbeCard, SavedProbe, save_probes
from roentgen.store import Session
from tests.conftest import Server
from tests.reference import smollm2, worst_error

pytestmark = pytest.mark.integration
MODEL = "smollm2-135m"
NAME = "layers.15.resid_post@last_prompt"
QUESTION = [{"role": "user", "content": "What is 2 + 3? Answer briefly."}]
ASKED = {"layers": [15, 20], "hook_points": ["resid_post"], "session_id": "steered"}


@pytest.fixture
def probe(server: Server) -> SavedProbe:
    model = OpenAI(base_url=server.base_url, api_key="none").models.list().data[0]
    generator = torch.Generator().manual_seed(0)
    weight, mean, scale = (torch.randn(shape, generator=generator) for shape in ((1, 576), 576, 576))
    card = ProbeCard(
        model=MODEL, revision=model.revision, key="layers.15.resid_post", positions="last_prompt", kind="logistic",
        label="correct", target="binary", strength=1, folds=5, metrics={}, data_hash="c0ffee", seed=0, roentgen="0.1.0",
    )  # fmt: skip
    saved = SavedProbe(weight, torch.tensor([0.3]), mean, scale.abs() + 0.5, card)
    save_probes(server.probes / "mine", [saved])
    return saved


async def test_one_of_two_that_run_together_is_steered_and_both_are_scored(server: Server, probe: SavedProbe) -> None:
    client = AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0)

    async def ask(**extra: Any) -> openai.types.chat.ChatCompletion:
        extra = {"probes": [f"mine/{NAME}"], "activations": ASKED, **extra}
        return await client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=12, temperature=0, logprobs=True, extra_body=extra
        )

    steering = [{"probe": f"mine/{NAME}", "scale": 60, "positions": "all"}]
    alone = await ask()
    plain, steered = await asyncio.gather(ask(), ask(steering=steering))

    def logprobs(reply: openai.types.chat.ChatCompletion) -> list[float]:
        return [token.logprob for token in reply.choices[0].logprobs.content]

    assert plain.choices[0].message.content == alone.choices[0].message.content
    assert logprobs(plain) == pytest.approx(logprobs(alone), abs=1e-4)
    assert steered.choices[0].message.content != plain.choices[0].message.content

    for reply in (plain, steered):
        rollouts = Session.open(reply.activations["uri"]).rollouts()
        mine = rollouts[rollouts["rollout_id"] == reply.activations["rollout_id"]]
        assert ("steering" in mine["labels"].iloc[0]) == (reply is steered)
        session = Session.open(reply.activations["uri"])
        stored = {
            f"layers.{i}.resid_post": session.activations(f"layers.{i}.resid_post", where=mine)[0].values
            for i in (15, 20)
        }
        (found,) = reply.choices[0].probes
        weight, bias, mean, scale = (
            getattr(probe, part).double().numpy() for part in ("weight", "bias", "mean", "scale")
        )
        expected = (stored["layers.15.resid_post"].double().numpy() - mean) / scale @ weight[0] + bias
        np.testing.assert_allclose(found["scores"], expected, rtol=1e-4, atol=1e-3)
        tokens = list(mine["token_ids"].iloc[0])[: len(expected)]
        by_hand = _forward(tokens, 60 * probe.direction[0] if reply is steered else torch.zeros(576))
        for key, rows in stored.items():
            assert worst_error(rows, by_hand[key]) <= 1e-4, key


def _forward(tokens: list[int], vector: torch.Tensor) -> dict[str, torch.Tensor]:
    """Read the outputs of layers 15 and 20 in a lone forward of plain transformers, with a vector added to layer 15's."""
    seen: dict[str, torch.Tensor] = {}

    def add(module: Any, args: Any, output: Any) -> Any:
        seen["layers.15.resid_post"] = (output + vector)[0]
        return output + vector

    def keep(module: Any, args: Any, output: Any) -> None:
        seen["layers.20.resid_post"] = output[0]

    layers = smollm2().model.layers
    handles = [layers[15].register_forward_hook(add), layers[20].register_forward_hook(keep)]
    with torch.inference_mode():
        smollm2()(input_ids=torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_scores_come_with_a_stream(server: Server, probe: SavedProbe) -> None:
    client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    body: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    extra = {"probes": [f"mine/{NAME}"]}
    (whole,) = client.chat.completions.create(**body, extra_body=extra).choices[0].probes
    scores: list[float] = []
    starts = []
    for chunk in client.chat.completions.create(**body, stream=True, extra_body=extra):
        for choice in chunk.choices:
            for piece in (choice.model_extra or {}).get("probes", []):
                starts.append((piece["start"], len(scores)))
                scores += piece["scores"]
    assert all(start == before for start, before in starts)
    assert len(starts) > 3
    assert scores == pytest.approx(whole["scores"], rel=1e-3, abs=1e-3)


def test_a_probe_outside_the_folder_is_refused(server: Server, probe: SavedProbe) -> None:
    client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="no probe"):
        client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body={"probes": [f"../mine/{NAME}"]})


def test_a_score_ends_a_reply_on_every_route(server: Server, probe: SavedProbe) -> None:
    """The same five tokens, whole and streamed, in a chat and in a response, beside one that goes on."""
    client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    stops = [{"probe": f"mine/{NAME}", "stop_when": {"above": -1e9, "for": 5}}]
    body: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    free = client.chat.completions.create(**body, extra_body={"return_token_ids": True}).choices[0]
    whole = client.chat.completions.create(**body, extra_body={"probes": stops, "activations": ASKED})
    choice = whole.choices[0]
    assert choice.token_ids == free.token_ids[:5]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", f"probe:mine/{NAME}")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 5
    (acted,) = whole.activations["acted"]
    assert acted["position"] == whole.usage.prompt_tokens + 4
    streamed = [
        chunk.choices[0]
        for chunk in client.chat.completions.create(**body, stream=True, extra_body={"probes": stops})
        if chunk.choices
    ]
    assert "".join(piece.delta.content or "" for piece in streamed) == choice.message.content
    assert streamed[-1].probes[0]["acted"]["position"] == acted["position"]
    response = client.responses.create(
        model=MODEL,
        input=QUESTION,
        max_output_tokens=12,
        temperature=0,
        extra_body={"probes": stops},
    )
    assert response.output_text == choice.message.content
    assert response.status == "completed"
    assert response.probes[0]["acted"]["position"] == acted["position"]
