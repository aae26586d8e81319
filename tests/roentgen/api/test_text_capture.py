"""Texts that exist already: rows are those of plain hooks, in the order of the texts, in memory or in a store."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr

import roentgen
from roentgen.api import text_capture
from roentgen.transcripts import TranscriptError
from serve_app.teacher_forcing.tokens import UnreadableTextError
from tests.roentgen.api.test_model import hooked

SAID = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TEXTS: list[Any] = [
    "to be",
    SAID,
    {"prompt": "2 + 2 =", "completion": " 4", "labels": {"right": True}},
    "a longer text",
]


def test_rows_come_back_in_the_order_of_the_texts(
    model: roentgen.Model, reference: tr.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_capture, "AT_ONCE", 3)
    taken: list[Any] = []

    def texts() -> Any:
        for text in TEXTS:
            taken.append(text)
            yield text

    outs = model.capture(texts(), layers=[0, 2], hook_points="resid_post", positions="all")
    first = next(outs)
    assert len(taken) == 3  # no more than a group is in memory
    found = [first, *outs]
    assert [out.prompt for out in found] == ["to be", SAID[:1], "2 + 2 =", "a longer text"]
    assert [out.text for out in found] == ["", "hello<eos>", " 4", ""]
    assert found[2].labels == {"right": True}
    for out in found:
        fed = (out.prompt_ids + out.token_ids)[: len(out.tokens)]
        assert out.positions == list(range(len(fed)))
        for layer in (0, 2):
            torch.testing.assert_close(
                out[f"layers.{layer}.resid_post"], hooked(reference, fed, layer), rtol=1e-4, atol=1e-4
            )
        with torch.inference_mode():
            logits = reference(input_ids=torch.tensor([fed])).logits[0].log_softmax(-1)
        own = [logits[len(out.prompt_ids) - 1 + i, token].item() for i, token in enumerate(out.token_ids)]
        assert out.logprobs == pytest.approx(own, abs=1e-4)


def test_a_store_has_them_and_is_continued(
    model: roentgen.Model, reference: tr.PreTrainedModel, tmp_path: Path
) -> None:
    report = model.capture(TEXTS[:2], layers=[1], positions="last", store=tmp_path, session="mine", progress=False)
    assert (report.stored, report.held, report.failures) == (2, 0, [])
    again = model.capture(
        [*TEXTS, "x" * 600], layers=[1], positions="last", store=tmp_path, session="mine", progress=False
    )
    assert (again.stored, again.held, len(again.failures)) == (2, 2, 1)
    assert "601 tokens" in again.failures[0][1] or "600 tokens" in again.failures[0][1]
    session = roentgen.Session.open(again.session)
    rollouts = session.rollouts()
    rows = session.activations("layers.1.resid_post", where=rollouts).stack()
    assert len(rollouts) == len(TEXTS)
    assert [labels for labels in rollouts["labels"] if labels] == [{"right": True}]
    for row, (_, rollout) in zip(rows, rollouts.iterrows(), strict=True):
        n_rows = rollout["n_prompt"] + max(rollout["n_completion"] - 1, 0)
        expected = hooked(reference, list(rollout["token_ids"])[:n_rows], 1)[-1]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


def test_int8_rows_are_those_that_a_reader_gets(model: roentgen.Model, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"layers": [1], "positions": "all", "progress": False}
    whole = [out["layers.1.resid_post"] for out in model.capture(TEXTS[:2], **asked)]
    there = [out["layers.1.resid_post"] for out in model.capture(TEXTS[:2], dtype="int8", **asked)]
    report = model.capture(TEXTS[:2], dtype="int8", store=tmp_path, session="mine", **asked)
    session = roentgen.Session.open(report.session)
    assert {session.spec(shard).dtype for shard in session.shard_files()} == {"torch.int8"}
    stored = {item.values.numpy().tobytes() for item in session.activations("layers.1.resid_post")}
    assert stored == {rows.numpy().tobytes() for rows in there}
    for rows, rounded in zip(whole, there, strict=True):
        assert not torch.equal(rows, rounded)
        largest = rows.abs().amax(1, keepdim=True)
        assert ((rows - rounded).abs() <= largest / 254 * 1.001).all()
    kept = {"layers": [1], "hook_points": ["resid_post"]}
    exact, rounded = (
        model.generate("to be", max_tokens=3, capture=one)[0]["layers.1.resid_post"]
        for one in (kept, {**kept, "dtype": "int8"})
    )
    assert 0 < float(((exact - rounded).abs() / exact.abs().amax(1, keepdim=True)).max()) <= 1.001 / 254
    # Again: what is there already is found to be the same capture.
    assert model.capture(TEXTS[:2], dtype="int8", store=tmp_path, session="mine", **asked).held == 2


def test_what_cannot_be_read_is_refused_by_name(model: roentgen.Model) -> None:
    with pytest.raises(roentgen.RequestError, match=r"capture\.layers: 7 is out of range"):
        model.capture(["a"], layers=[7])
    with pytest.raises(roentgen.RequestError, match=r"capture\.positions: 'first' is not a position policy"):
        model.capture(["a"], positions="first")
    with pytest.raises(roentgen.RequestError, match=r"session: 'a/b' is not a session id; allowed are"):
        model.capture(["a"], store="unused", session="a/b")
    with pytest.raises(roentgen.RequestError, match=r"chunk_size: 0 is not allowed; allowed are integers from 1"):
        model.capture(["a"], chunk_size=0)
    with pytest.raises(TypeError, match=r"texts: 3 \(int\) is not a text; allowed are a text, a list of messages"):
        list(model.capture([3]))
    with pytest.raises(TranscriptError, match=r"text 2: role: Input should be 'system'|text 2: messages"):
        list(model.capture(["a", [{"role": "nobody", "content": "b"}]]))
    with pytest.raises(UnreadableTextError, match="the context of tiny is 512"):
        list(model.capture(["x" * 600]))
