"""Probes and steering through a replica: what requests may name, what replies and stored rollouts say, what is refused."""

import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from roentgen.linear_probe import CARDS, TENSORS, ProbeCard, SavedProbe, load_probe, save_probes
from roentgen.store import Session
from serve_app.openai_api.chat import ChatRequest
from serve_app.openai_api.completions import CompletionRequest
from serve_app.openai_api.errors import from_validation
from serve_app.openai_api.schemas import ChatCompletion, Completion
from serve_app.replica.model_replica import ModelReplica
from tests.serve_app import tiny
from tests.serve_app.replica.test_model_replica import complete, started, streamed

Body = dict[str, Any]

NAME = "layers.1.resid_post@last_prompt"
GATE = "gate/layers.1.mlp.gate_proj.output@last_prompt"
THREE = "correct/layers.0.resid_pre@last_prompt"
VECTOR = torch.linspace(-1, 1, 32).tolist()


def probe(model: str, revision: str, key: str = "layers.1.resid_post", outputs: int = 1, width: int = 32) -> SavedProbe:
    generator = torch.Generator().manual_seed(outputs)
    weight, mean = torch.randn(outputs, width, generator=generator), torch.randn(width, generator=generator)
    scale, bias = torch.rand(width, generator=generator) + 0.5, torch.randn(outputs, generator=generator)
    card = ProbeCard(
        model=model, revision=revision, key=key, positions="last_prompt", kind="logistic", label="correct", target="binary",
        classes=tuple(f"class {i}" for i in range(outputs)) if outputs > 1 else (), strength=1, folds=5, metrics={},
        data_hash="c0ffee", seed=0, roentgen="0.1.0",
    )  # fmt: skip
    return SavedProbe(weight, bias, mean, scale, card)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny.module("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
async def replica(folder: Path, tmp_path: Path) -> AsyncIterator[ModelReplica]:
    shelf = tmp_path / "shelf"
    options = {"model": str(folder), "store": str(tmp_path / "store"), "dtype": "float32", "probes": (str(shelf),)}
    async with started(**options) as replica:
        card = (await replica.status())["model"]
        one = probe(card["id"], card["revision"])
        save_probes(shelf / "correct", [one, probe(card["id"], card["revision"], "layers.0.resid_pre", outputs=3)])
        save_probes(shelf / "other", [probe("m", "r"), probe(card["id"], "r2", "embed")])
        save_probes(shelf / "narrow", [probe(card["id"], card["revision"], width=31)])
        save_probes(shelf / "gate", [probe(card["id"], card["revision"], "layers.1.mlp.gate_proj.output", width=64)])
        save_probes(shelf / "deep", [probe(card["id"], card["revision"], "layers.7.resid_post")])
        save_probes(tmp_path / "outside", [one])
        (shelf / "link").symlink_to(tmp_path / "outside")
        yield replica


async def chat(replica: ModelReplica, **body: Any) -> Body:
    request = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "seed": 1, "temperature": 0} | body
    name = (await replica.status())["model"]["id"]
    return await replica.generate(ChatRequest.model_validate({"model": name, **request}))


async def test_scores_equal_numpy_on_the_stored_activations_of_the_same_request(
    replica: ModelReplica, tmp_path: Path
) -> None:
    inline = {"name": "mine", "key": "layers.2.ln_mlp", "weight": VECTOR, "bias": 0.5, "scale": [2.0] * 32}
    names = [
        f"correct/{NAME}",
        THREE,
        GATE,
    ]
    hooks = ["resid_post", "resid_pre", "ln_mlp", "mlp.gate_proj.output"]
    asked = {"layers": "all", "hook_points": hooks, "session_id": "s"}
    reply = (await chat(replica, probes=[*names, inline], activations=asked))["reply"]
    TypeAdapter(ChatCompletion).validate_python(reply, extra="forbid")
    (choice,) = reply["choices"]
    n_prompt, n_rows = reply["usage"]["prompt_tokens"], reply["usage"]["total_tokens"] - 1
    assert [found["probe"] for found in choice["probes"]] == [*names, "mine"]
    session = Session.open(reply["activations"]["uri"])
    for found in choice["probes"]:
        (rollout,) = session.activations(found["key"])
        assert (found["start"], found["n_prompt"], len(found["scores"])) == (0, n_prompt, n_rows)
        assert rollout.position.tolist() == list(range(n_rows))
        if found["probe"] == "mine":
            expected = rollout.values.double().numpy() @ np.array(VECTOR) / 2 + 0.5
        else:
            saved = load_probe(tmp_path / "shelf" / found["probe"].split("/")[0], found["probe"].split("/")[1])
            weight, bias, mean, scale = (
                getattr(saved, part).double().numpy() for part in ("weight", "bias", "mean", "scale")
            )
            expected = ((rollout.values.double().numpy() - mean) / scale @ weight.T + bias).squeeze(
                -1 if len(weight) == 1 else ()
            )
        np.testing.assert_allclose(found["scores"], expected, rtol=1e-4, atol=1e-4)
    assert choice["probes"][0]["label"] == "correct"
    assert choice["probes"][1]["classes"] == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize("extra", [{}, {"logprobs": True}, {"echo": True, "logprobs": 1}])
async def test_a_streams_scores_join_to_those_of_the_whole_reply(
    replica: ModelReplica, kind: type, extra: Body
) -> None:
    body = {"max_tokens": 7, "seed": 3, "n": 2, "probes": [f"correct/{NAME}", THREE]}
    if kind is ChatRequest:
        body |= {"messages": [{"role": "user", "content": "hi"}], "logprobs": "logprobs" in extra}
    else:
        body |= {"prompt": ["abc", "defgh"], **{key: int(value) for key, value in extra.items()}}
        body |= {"echo": bool(extra.get("echo"))}
    whole = (await (chat if kind is ChatRequest else complete)(replica, temperature=1, **body))["reply"]
    TypeAdapter(ChatCompletion if kind is ChatRequest else Completion).validate_python(whole, extra="forbid")
    chunks = await streamed(replica, kind, **body)
    for index, expected in enumerate(whole["choices"]):
        own = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        pieces = [piece["probes"] for piece in own if "probes" in piece]
        for number in (0, 1):
            joined: list[Any] = []
            for piece in pieces:
                assert piece[number]["start"] == len(joined)
                joined += piece[number]["scores"]
            np.testing.assert_allclose(joined, expected["probes"][number]["scores"], rtol=1e-4, atol=1e-4)
        assert len(pieces) > 1 or extra.get("echo")
        assert {len(p["scores"]) for p in expected["probes"]} == {expected["probes"][0]["n_prompt"] + 6}


async def test_a_steered_rollout_says_so_and_holds_the_steered_stream(replica: ModelReplica, tmp_path: Path) -> None:
    """With max_tokens 1 both rollouts read the same tokens, so their rows differ by what was added."""
    asked = {"layers": [0, 1, 2], "hook_points": ["resid_post"], "session_id": "s", "labels": {"mine": 1}}
    steering = [
        {"probe": f"correct/{NAME}", "scale": 3, "positions": "last_prompt"},
        {"vector": VECTOR, "layer": -2, "scale": -0.5},
    ]
    plain = (await chat(replica, activations=asked, max_tokens=1))["reply"]["activations"]
    steered = (await chat(replica, activations=asked, max_tokens=1, steering=steering))["reply"]["activations"]
    session = Session.open(plain["uri"])
    labels = dict(zip(session.rollouts()["rollout_id"], session.rollouts()["labels"], strict=True))
    assert labels[plain["rollout_id"]] == {"mine": 1}
    said = json.loads(labels[steered["rollout_id"]]["steering"])
    assert said[0] == {"probe": f"correct/{NAME}", "key": "layers.1.resid_post", "scale": 3, "positions": "last_prompt"}
    assert (said[1]["key"], said[1]["positions"], len(said[1]["vector"])) == ("layers.1.resid_post", "all", 16)
    rows = {}
    for key in ("layers.0.resid_post", "layers.1.resid_post"):
        for rollout in session.activations(key):
            rows[rollout.rollout_id, key] = rollout.values
    before, at = (
        rows[steered["rollout_id"], key] - rows[plain["rollout_id"], key]
        for key in ("layers.0.resid_post", "layers.1.resid_post")
    )
    direction = load_probe(tmp_path / "shelf" / "correct", NAME).direction[0]
    expected = (-0.5 * torch.tensor(VECTOR)).repeat(len(at), 1)
    expected[-1] += 3 * direction
    assert not before.any()
    torch.testing.assert_close(at, expected, rtol=1e-4, atol=1e-5)


async def test_steering_with_a_completion_and_several_choices(replica: ModelReplica) -> None:
    body = {"prompt": ["abc", "de"], "max_tokens": 5, "temperature": 0, "n": 2, "logprobs": 0}
    steering = [{"vector": VECTOR, "layer": 0, "hook_point": "attn_out", "scale": 2}]

    async def logprobs(steering: list[Body]) -> list[list[float]]:
        choices = (await complete(replica, **body, steering=steering))["reply"]["choices"]
        return [choice["logprobs"]["token_logprobs"] for choice in choices]

    plain, steered, zero = [await logprobs(s) for s in ([], steering, [{**steering[0], "scale": 0}])]
    assert plain == zero
    assert all(a != b for a, b in zip(plain, steered, strict=True))
    assert steered[0] == pytest.approx(steered[1])


NOT_HERE = "no probe .* name it as FOLDER/NAME"
REFUSED: list[tuple[Body, str, str]] = [
    ({"probes": [f"../outside/{NAME}"]}, "probes.0", NOT_HERE),
    ({"probes": [f"link/{NAME}"]}, "probes.0", NOT_HERE),
    ({"probes": ["/etc/passwd"]}, "probes.0", NOT_HERE),
    ({"probes": ["a" * 900 + f"/{NAME}"]}, "probes.0", NOT_HERE),
    ({"probes": ["nothing"]}, "probes.0", NOT_HERE),
    ({"probes": [f"correct/{NAME}", "correct/embed@last"]}, "probes.1", r"has no probe 'embed@last'; it has layers\.1"),
    ({"probes": [f"other/{NAME}"]}, "probes.0", "belongs to model 'm'; this server has"),
    ({"probes": ["other/embed@last_prompt"]}, "probes.0", "belongs to revision 'r2'"),
    ({"probes": [f"narrow/{NAME}"]}, "probes.0", r"has width 31; layers\.1\.resid_post of .* has width 32"),
    ({"probes": ["deep/layers.7.resid_post@last_prompt"]}, "probes.0", "7 is out of range"),
    ({"probes": [{"name": "x", "key": "layers.1.resid_pst", "weight": VECTOR}]}, "probes.0.key", "is not a hook point"),
    ({"probes": [{"name": "x", "key": "layers.1.input_layernorm.output", "weight": VECTOR}]}, "probes.0.key", "stores it as"),
    ({"probes": [{"name": "x", "key": "layers.1.ln_mlp", "weight": [1.0]}]}, "probes.0.weight", "has width 1"),
    ({"probes": [{"name": "x", "key": "layers.1.mlp.gate_proj.output", "weight": [1.0]}]}, "probes", "no row of 1 values"),
    ({"steering": [{"probe": f"other/{NAME}", "scale": 1}]}, "steering.0.probe", "belongs to model 'm'"),
    ({"steering": [{"probe": THREE, "scale": 1}]}, "steering.0.output", r"3 directions, 0 \("),
    ({"steering": [{"probe": f"correct/{NAME}", "output": 1, "scale": 1}]}, "steering.0.output", "1 is out of range"),
    ({"steering": [{"probe": GATE, "scale": 1}]}, "steering.0.hook_point", "cannot be steered"),
    ({"steering": [{"vector": VECTOR, "scale": 1}]}, "steering.0.layer", "required"),
    ({"steering": [{"vector": VECTOR, "layer": 3, "scale": 1}]}, "steering.0", "3 is out of range"),
    ({"steering": [{"vector": VECTOR[:5], "layer": 1, "scale": 1}]}, "steering.0.vector", "has width 5"),
    ({"steering": [{"vector": VECTOR, "layer": 1, "scale": 1e39}]}, "steering.0.scale", "overflows float32"),
    ({"steering": [{"vector": VECTOR, "layer": 1, "scale": 1, "hook_point": "router"}]}, "steering.0.hook_point", "be steered"),
    ({"steering": 2 * [{"vector": VECTOR, "layer": 1, "scale": 3e38}]}, "steering", "use a smaller scale"),
]  # fmt: skip


async def test_what_cannot_be_is_refused_by_name(replica: ModelReplica) -> None:
    for body, param, message in REFUSED:
        error = (await chat(replica, **body))["error"]
        assert (error["status"], error["param"]) == (400, param), error
        assert re.search(message, error["message"]), error


async def test_a_server_without_folders_takes_numbers_only(replica: ModelReplica) -> None:
    replica._config = replica._config.model_copy(update={"probes": ()})
    error = (await chat(replica, probes=[f"correct/{NAME}"]))["error"]
    assert "no folder of saved probes" in error["message"]
    assert "reply" in await chat(replica, probes=[{"name": "x", "key": "embed", "weight": VECTOR}])


async def test_a_damaged_probe_and_one_that_is_trained_anew(replica: ModelReplica, tmp_path: Path) -> None:
    folder = tmp_path / "shelf" / "correct"
    first = (await chat(replica, probes=[f"correct/{NAME}"]))["reply"]["choices"][0]["probes"][0]["scores"]
    saved = load_probe(folder, NAME)
    save_probes(folder, [SavedProbe(2 * saved.weight, 2 * saved.bias, saved.mean, saved.scale, saved.card)])
    again = (await chat(replica, probes=[f"correct/{NAME}"]))["reply"]["choices"][0]["probes"][0]["scores"]
    np.testing.assert_allclose(again, 2 * np.array(first), rtol=1e-4, atol=1e-4)
    save_probes(folder, [SavedProbe(saved.weight * torch.nan, saved.bias, saved.mean, saved.scale, saved.card)])
    assert "non-finite" in (await chat(replica, probes=[f"correct/{NAME}"]))["error"]["message"]
    (folder / TENSORS).write_bytes(b"torn")
    os.utime(folder / CARDS, (1, 1))
    assert "damaged" in (await chat(replica, probes=[f"correct/{NAME}"]))["error"]["message"]


INVALID: list[tuple[Body, str, str]] = [
    ({"probes": [f"{i}/x" for i in range(17)]}, "probes", "at most 16"),
    ({"probes": ["a/x", "a/x"]}, "probes", "have the same name"),
    ({"probes": ["a\0/x"]}, "probes.0", "pattern"),
    ({"probes": [{"name": "x", "key": "embed", "weight": [float("nan")]}]}, "probes.0.weight.0", "finite"),
    ({"probes": [{"name": "x", "key": "embed", "weight": [1], "mean": [1, 2]}]}, "probes.0", "mean: has 2 numbers"),
    ({"probes": [{"name": "x", "key": "embed", "weight": [1], "scale": [0]}]}, "probes.0", "0 is not allowed"),
    ({"steering": [{"scale": 1}]}, "steering.0", "exactly one of probe and vector"),
    ({"steering": [{"scale": 1, "probe": "x", "vector": [1]}]}, "steering.0", "exactly one of probe and vector"),
    ({"steering": [{"scale": float("inf"), "vector": [1]}]}, "steering.0.scale", "finite"),
    ({"steering": [{"scale": 1, "vector": [1], "positions": "last"}]}, "steering.0.positions", "is not known while"),
    ({"steering": [{"scale": 1, "vector": [1], "positions": "mean_prompt"}]}, "steering.0.positions", "is not known while"),
    ({"steering": [{"scale": 1, "vector": [1] * 65_537}]}, "steering.0.vector", "at most 65536"),
    ({"steering": [{"scale": 1, "vector": [1], "when": "now"}]}, "steering.0.when", "unknown"),
    ({"activations": {"labels": {"steering": "none"}}}, "activations.labels", "is reserved"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "message"), INVALID)
def test_what_does_not_fit_together_is_refused_before_it_reaches_a_replica(
    body: Body, param: str, message: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "hi"}], **body})
    error = from_validation(caught.value.errors())
    assert error.param == param, error.message
    assert message in error.message
