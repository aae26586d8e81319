"""lm-evaluation-harness, unmodified: its API models against this server, and its own `hf` model on the same weights."""

import json
from typing import Any

import pytest

from roentgen.store import Session
from tests.clients.conftest import Documentation
from tests.conftest import Server

pytestmark = pytest.mark.integration

N_ITEMS = {"gsm8k_local": 6, "capitals_local": 4}


def samples(docs: Documentation, output: str, task: str) -> list[dict[str, Any]]:
    """Return what lm-eval logged of a task, in the order of its items."""
    (file,) = (docs.folder / output).rglob(f"samples_{task}_*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == N_ITEMS[task]
    return sorted(found, key=lambda sample: sample["doc_id"])


@pytest.fixture(scope="module")
def both(docs: Documentation) -> Documentation:
    """The documentation after lm-eval has measured the server and the weights."""
    docs.run("lm-eval-completions")
    docs.run("lm-eval-hf")
    return docs


def test_greedy_texts_and_scores_equal_the_hf_models(both: Documentation) -> None:
    served, reference = (samples(both, output, "gsm8k_local") for output in ("completions", "hf"))
    assert [s["resps"] for s in served] == [s["resps"] for s in reference]
    assert [s["filtered_resps"] for s in served] == [s["filtered_resps"] for s in reference]
    assert [s["exact_match"] for s in served] == [s["exact_match"] for s in reference]
    assert all(s["resps"][0][0] for s in served)


def test_loglikelihoods_equal_the_hf_models(both: Documentation) -> None:
    served, reference = (samples(both, output, "capitals_local") for output in ("completions", "hf"))
    for ours, theirs in zip(served, reference, strict=True):
        for (choice,), (expected,) in zip(ours["resps"], theirs["resps"], strict=True):
            assert float(choice[0]) == pytest.approx(float(expected[0]), abs=1e-3)
            assert str(choice[1]) == str(expected[1])  # whether it is what greedy decoding would say
        assert (ours["acc"], ours["acc_norm"]) == (theirs["acc"], theirs["acc_norm"])
    assert sum(s["acc"] for s in served) >= 3  # the model knows some, so the task measures something


def test_chat_runs_and_scores(docs: Documentation) -> None:
    docs.run("lm-eval-chat")
    chat = samples(docs, "chat", "gsm8k_local")
    assert all(s["resps"][0][0].strip() for s in chat)
    assert all(s["exact_match"] in (0, 1) for s in chat)


@pytest.mark.rotating
def test_scores_are_joined_to_what_was_kept(docs: Documentation, server: Server) -> None:
    """As docs/clients.md has it: through a run's address, unmodified, raw texts, choices and conversations."""
    said = docs.run("lm-eval-kept")
    assert "8 of 8 samples matched; 20 rollouts have their scores as labels, new in 20" in said
    assert "2 of 2 samples matched; 2 rollouts have their scores as labels, new in 2" in said
    frame = Session.open(str(server.store / "lm")).rollouts(columns=("labels", "text"))
    assert len(frame) == 4 + 4 * 4 + 2
    assert set(frame["config_hash"]) == {"lm"}
    logged = {}
    for folder, task in (("kept", "gsm8k_local"), ("kept", "capitals_local"), ("kept-chat", "gsm8k_local")):
        (file,) = (docs.folder / folder).rglob(f"samples_{task}_*.jsonl")
        for line in file.read_text().splitlines():
            sample = json.loads(line)
            logged[folder, task, sample["doc_id"]] = sample
    for row in frame.to_dict("records"):
        choice = row["text"].startswith("The capital of")
        folder = "kept-chat" if "<|im_start|>" in row["text"] else "kept"
        sample = logged[folder, "capitals_local" if choice else "gsm8k_local", row["labels"]["doc_id"]]
        asked = sample["doc"]["country"] if choice else sample["doc"]["question"]
        assert asked in row["text"]
        scores = {"acc", "acc_norm"} if choice else {"exact_match,flexible-extract"}
        assert {name: row["labels"][name] for name in scores} == {n: sample[n.partition(",")[0]] for n in scores}
