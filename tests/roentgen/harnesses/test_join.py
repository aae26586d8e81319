"""Scores of lm-eval's logs, found by what was asked and answered, on stored rollouts."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from roentgen.cli import app
from roentgen.contract import RolloutKey, canonical_hash
from roentgen.harnesses import join as joining
from roentgen.harnesses.join import join, join_scored, open_target
from roentgen.harnesses.scored import LogError, ScoredSample, flat_labels, with_grades
from roentgen.store import CapturedRollout, Session, StoreWriter
from roentgen.tokenized_text import Segment, TokenizedText
from serve_app.config import ServerConfig
from serve_app.http.ingress import Ingress
from tests.roentgen.store.conftest import RolloutFactory
from tests.serve_app.http.test_ingress import NoReplica

HI = [{"role": "user", "content": "hi"}]


def of(prompt: str, completion: str, problem: str) -> CapturedRollout:
    """A rollout of a text, a token a character."""
    made, text = RolloutFactory()(len(prompt), len(completion)), prompt + completion
    segments = [Segment("prompt", 0, len(prompt)), Segment("completion", len(prompt), len(text))]
    tokens = [ord(one) for one in text]
    sequence = TokenizedText(text, tokens, [*range(len(text))], segments, len(prompt))
    return dataclasses.replace(
        made, sequence=sequence, key=RolloutKey(config_hash="run", problem_id=problem), labels={}
    )


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """Two raw texts, one of them asked twice, a choice that was only read, and a conversation."""
    rollouts = [
        of("<s>2 + 3 =", " 5</s>", "a"),
        of("1 + 1 =", " 2", "b"),
        of("1 + 1 =", " 3", "b"),
        of("Capital: Oslo", "\n", "c"),
        of("[user]hi[reply]", "Hello.", canonical_hash(HI)),
    ]
    with StoreWriter(tmp_path / "store", max_wait_s=0) as writer:
        for one in rollouts:
            writer.submit(one).result()
    return Session.open(tmp_path / "store/s")


Log = Callable[..., Path]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    def write(*samples: dict[str, Any]) -> Path:
        file = tmp_path / "out" / "m" / "samples_sums_2026-11-30.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        return file

    return write


def sample(doc: int, prompt: str, answer: str, filtered: str = "none", **scores: Any) -> dict[str, Any]:
    asked = {"gen_args_0": {"arg_0": prompt, "arg_1": {"until": ["\n"]}}}
    said = {"doc_id": doc, "arguments": asked, "resps": [[answer]], "filter": filtered, "metrics": [*scores]}
    return {**said, **scores}


def labels(session: Session) -> dict[str, dict[str, Any]]:
    frame = Session.open(session.uri).rollouts(columns=("labels", "text"), unique=False)
    return dict(zip(frame["text"], frame["labels"], strict=True))


def test_texts_are_found_by_what_was_asked_and_answered(session: Session, log: Log) -> None:
    choice = {
        "gen_args_0": {"arg_0": "Capital:", "arg_1": " Oslo"},
        "gen_args_1": {"arg_0": "Capital:", "arg_1": " Rome"},
    }
    read = {
        "doc_id": 4,
        "arguments": choice,
        "resps": [[["-1.0", "True"]], [["-2.0", "False"]]],
        "metrics": ["acc"],
        "acc": 1,
    }
    file = log(
        sample(1, "2 + 3 =", " 5", "strict", exact_match=1.0),
        sample(1, "2 + 3 =", " 5", "loose", exact_match=0.0),
        sample(2, "1 + 1 =", " 2", exact_match=1.0),
        sample(3, "1 + 1 =", " 3", exact_match=0.0),
        read,
        sample(5, json.dumps(HI), "Hello.", exact_match=0.5, f1={"mean": 0.25, "n": 3}),
        sample(6, "never asked", "", exact_match=0.0),
    )
    report = join(file, session.uri)
    assert (report.samples, report.matched, report.rollouts, report.changed) == (7, 6, 5, 5)
    assert report.unmatched == {"no rollout has its prompts": [f"{file.stem} line 7 (doc 6)"]}
    assert labels(session) == {
        "<s>2 + 3 = 5</s>": {"task": "sums", "doc_id": 1, "exact_match,strict": 1.0, "exact_match,loose": 0.0},
        "1 + 1 = 2": {"task": "sums", "doc_id": 2, "exact_match": 1.0},
        "1 + 1 = 3": {"task": "sums", "doc_id": 3, "exact_match": 0.0},
        "Capital: Oslo\n": {"task": "sums", "doc_id": 4, "acc": 1},
        "[user]hi[reply]Hello.": {"task": "sums", "doc_id": 5, "exact_match": 0.5, "f1.mean": 0.25, "f1.n": 3},
    }
    again = join(file.parents[1], session.uri)  # the folder that lm-eval was given
    assert (again.matched, again.rollouts, again.changed) == (6, 5, 0)
    assert len([*Path(session.uri, "labels").iterdir()]) == 1


def test_scores_that_contradict_each_other_are_not_joined(session: Session, log: Log) -> None:
    file = log(sample(2, "1 + 1 =", " 2", match=1.0), sample(9, "1 + 1 =", " 2", match=0.0))
    report = join(file, session.uri, scorers=["match"])
    assert (report.matched, report.changed) == (0, 0)
    (why,) = report.unmatched
    assert why == "several samples with different scores have the same prompt and answer"
    assert (
        join(log(sample(2, "1 + 1 =", " 2", match=1.0), sample(9, "1 + 1 =", " 2", match=1.0)), session.uri).matched
        == 0
    )
    assert join(file.parent, session.uri, scorers=["match"]).matched == 2  # their documents differ, their scores do not


def test_scores_of_another_model_s_answers_are_not_joined(session: Session, log: Log) -> None:
    file = log(sample(1, "2 + 3 =", " six", match=0.0), sample(2, "1 + 1 =", " 2", match=1.0))
    report = join(file, session.uri)
    assert report.unmatched == {joining.OTHERWISE: [f"{file.stem} line 1 (doc 1)"]}
    assert labels(session)["<s>2 + 3 = 5</s>"] == {}
    thought = log(sample(5, json.dumps(HI), "lo.", match=1.0))  # what was said after some reasoning
    assert join(thought, session.uri).matched == 1


def test_grades_are_numbers_where_all_are_grades() -> None:
    given = [
        ScoredSample("one", {"match": "C", "choice": "C", "note": "nan"}),
        ScoredSample("two", {"match": "N", "choice": "A", "note": None}),
        ScoredSample("three", {"match": 0.5, "choice": "B"}),
    ]
    assert [one.labels for one in with_grades(given)] == [
        {"match": 1.0, "choice": "C", "note": "nan"},
        {"match": 0.0, "choice": "A", "note": None},
        {"match": 0.5, "choice": "B"},
    ]


def test_some_scorers_and_a_prefix(session: Session, log: Log) -> None:
    file = log(sample(2, "1 + 1 =", " 2", "strict", exact_match=1.0, bleu=3.5))
    assert join(file, session.uri, scorers=["exact_match"], prefix="lm.").labels == ("lm.exact_match,strict",)
    assert labels(session)["1 + 1 = 2"] == {"lm.exact_match,strict": 1.0}
    with pytest.raises(LogError, match=r"no scores named acc; it has bleu,strict, doc_id, exact_match,strict, task"):
        join(file, session.uri, scorers=["acc"])


def test_rollouts_that_the_log_names_need_no_prompt(session: Session) -> None:
    ids = list(session.rollouts(unique=False, columns=())["rollout_id"])
    samples = [
        ScoredSample("one", {"match": 1.0}, (ids[0], ids[1])),
        ScoredSample("two", {"match": 0.0}, ("01GONE",)),
        ScoredSample("three", {}, (ids[2],)),
    ]
    report = join_scored(samples, open_target(session.uri, "none"))
    assert (report.matched, report.rollouts) == (1, 2)
    assert report.unmatched == {
        "it has no score": ["three"],
        "the session has none of the rollouts that the log names": ["two"],
    }


def test_a_server_s_session_is_labeled_through_the_server(
    session: Session, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The routes are the real ones; only the wire between them and the client is in memory."""
    monkeypatch.delenv("ROENTGEN_API_KEY", raising=False)
    monkeypatch.setattr(joining, "_AT_ONCE", 2)
    config = ServerConfig(model="m", store=str(tmp_path / "store"))
    ingress = Ingress(NoReplica(), config, lambda choice: None)
    address = "http://testserver/v1/activations/session/s"
    with TestClient(ingress.__serve_build_asgi_app__(), client=("127.0.0.1", 1)) as client:

        def connect(base_url: str, key: str, timeout_s: float) -> TestClient:
            return TestClient(client.app, base_url=f"{base_url}/", client=("127.0.0.1", 1))

        monkeypatch.setattr(joining, "connect", connect)
        monkeypatch.setattr("roentgen.store.pulling.connect", connect)
        file = log(*(sample(n, text, "", match=float(n)) for n, text in enumerate(("2 + 3 =", "1 + 1 ="))))
        report = join(file, address)
        assert (report.matched, report.rollouts, report.changed) == (2, 3, 3)
        assert labels(session)["1 + 1 = 3"] == {"task": "sums", "doc_id": 1, "match": 1.0}
        ids = list(session.rollouts(columns=())["rollout_id"])
        said = client.post(f"{address}/labels", json={"labels": {ids[0]: {"steering": "x"}}}).json()["error"]
        assert (said["param"], "is reserved" in said["message"]) == (f"labels.{ids[0]}", True)
        assert client.post(f"{address}x/labels", json={"labels": {ids[0]: {"a": 1}}}).status_code == 404


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("samples_x.jsonl", "{}", "line 1: not a sample of lm-eval"),
        ("samples_x.jsonl", "[", "line 1: not a sample of lm-eval"),
        ("x.csv", "", "allowed are .eval and .json of inspect_ai"),
        ("other.txt", "", "neither logs of inspect_ai"),
    ],
)
def test_what_is_no_log_is_said(tmp_path: Path, session: Session, name: str, content: str, words: str) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / name).write_text(content)
    place = tmp_path / "logs" if name == "other.txt" else tmp_path / "logs" / name
    with pytest.raises(LogError, match=words):
        join(place, session.uri)


def test_the_command_says_what_matched(session: Session, log: Log) -> None:
    file = log(sample(2, "1 + 1 =", " 2", match=1.0), sample(6, "never asked", "", match=0.0))
    done = CliRunner().invoke(app, ["join", str(file), session.uri])
    assert done.exit_code == 0, done.output
    assert (
        "1 of 2 samples matched; 1 rollouts have their scores as labels, new in 1: doc_id, match, task" in done.output
    )
    assert "not matched, no rollout has its prompts: samples_sums_2026-11-30 line 2 (doc 6)" in done.output
    nothing = CliRunner().invoke(app, ["join", str(log(sample(6, "never asked", "", match=0.0))), session.uri])
    assert nothing.exit_code == 1
    missing = CliRunner().invoke(app, ["join", "nowhere.eval", session.uri])
    assert (missing.exit_code, "nowhere.eval does not exist" in missing.output) == (2, True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("C", {"s": "C"}),
        ("blue", {"s": "blue"}),
        (True, {"s": True}),
        (None, {"s": None}),
        (float("nan"), {"s": None}),
        (float("inf"), {"s": "inf"}),
        ({"a": "C", "b": [1, 2]}, {"s.a": "C", "s.b.0": 1, "s.b.1": 2}),
    ],
)
def test_scores_of_any_kind_are_labels(value: Any, expected: dict[str, Any]) -> None:
    assert flat_labels("s", value) == expected
