"""The page's questions, answered on a run whose numbers the tests know."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from roentgen.linear_probe import load_probe
from roentgen.runs import Run
from roentgen.store import Session
from tests.roentgen.view.conftest import HOSTILE, KEYS, Ask, source_ids

PROBE = "layers.3.resid_post@last_prompt"


@pytest.fixture
def run_at(ask: Ask) -> str:
    return f"/api/sources/{source_ids(ask)['run']}"


def test_sources_are_the_run_and_its_session(ask: Ask, run: Run) -> None:
    one, other = sorted(ask("/api/sources")["sources"], key=lambda source: source["kind"])
    assert (one["kind"], one["n_samples"], one["model"], one["error"]) == ("run", 8, None, None)
    share = run.accuracy
    assert one["accuracy"] == {"value": share.value, "low": share.low, "high": share.high, "n": 7}
    assert (other["kind"], other["name"], other["n_samples"], other["model"]) == ("session", "session", 8, "m")


def test_overview_says_what_there_is(ask: Ask, run_at: str) -> None:
    overview = ask(run_at)
    assert [(key["key"], key["layer"], key["width"]) for key in overview["keys"]] == [
        ("layers.1.resid_post", 1, 6), ("layers.3.resid_post", 3, 6), ("final_norm", None, 6),
    ]  # fmt: skip
    assert [probe["name"] for probe in overview["probes"]] == [f"correct/{key}@last_prompt" for key in KEYS[:2]]
    columns = {column["name"]: column for column in overview["columns"]}
    assert columns["verdict"] == {
        "name": "verdict",
        "type": "category",
        "values": ["correct", "failed", "no_answer", "wrong"],
    }
    assert [columns[f"labels.{name}"]["type"] for name in ("difficulty", "topic", "hard")] == [
        "number",
        "category",
        "bool",
    ]
    assert overview["summary"]["verdicts"] == {"correct": 4, "wrong": 2, "no_answer": 1}
    assert overview["summary"]["errors"] == 1


CASES = [
    ('[["verdict","=","correct"]]', "", "", [1, 3, 5, 7]),
    ('[["verdict","!=","correct"]]', "-seconds", "", [6, 4, 2, 8]),
    ('[["verdict","in",["wrong","failed"]]]', "", "", [4, 6, 8]),
    ('[["labels.difficulty",">=",2],["labels.difficulty","<",3]]', "", "", [5, 6]),
    ('[["labels.hard","=",true]]', "", "", [5, 6, 7]),
    ('[["labels.topic","contains","MOR"]]', "-sample_id", "", [7, 6]),
    ('[["disagree","=",true]]', "", "", [2]),
    ('[["error","=",null]]', "seconds", "", [1, 2, 3, 4, 5, 6, 7]),
    ("", "", "IT IS 3", [3]),
    ("", "", "alert(", [7]),
    ("", "", "%", []),
    ('[["problem","=","\' OR 1=1 --"]]', "", "", []),
]


@pytest.mark.parametrize(("where", "sort", "q", "expected"), CASES)
def test_samples_are_filtered_sorted_and_found(
    ask: Ask, run_at: str, where: str, sort: str, q: str, expected: list[int]
) -> None:
    page = ask(f"{run_at}/samples", where=where, sort=sort, q=q)
    assert [row["sample_id"] for row in page["rows"]] == [f"gsm8k_{number:04}" for number in expected]
    assert (page["total"], page["matched"]) == (8, len(expected))


def test_a_window_of_samples_and_the_neighbors_of_one(ask: Ask, run_at: str) -> None:
    matching = {"where": '[["verdict","=","correct"]]', "sort": "-seconds"}
    page = ask(f"{run_at}/samples", offset=1, limit=2, **matching)
    assert [row["sample_id"] for row in page["rows"]] == ["gsm8k_0005", "gsm8k_0003"]
    found = ask(f"{run_at}/samples/gsm8k_0005", **matching)
    assert (found["previous"], found["next"]) == ("gsm8k_0007", "gsm8k_0003")
    found = ask(f"{run_at}/samples/gsm8k_0001", **matching)
    assert (found["previous"], found["next"]) == ("gsm8k_0003", None)


@pytest.mark.parametrize(
    "question",
    [
        {"where": "nonsense"}, {"where": '[["verdict","~","x"]]'}, {"where": '[["nothing","=",1]]'}, {"offset": "x"},
        {"sort": "1; DROP TABLE samples"}, {"where": '[["verdict","in","x"]]'},
    ],
)  # fmt: skip
def test_questions_that_are_not_understood_are_refused_with_a_reason(
    ask: Ask, run_at: str, question: dict[str, str]
) -> None:
    assert ask(f"{run_at}/samples", 400, **question)["error"]


def test_histograms_count_what_matches(ask: Ask, run_at: str) -> None:
    found = ask(f"{run_at}/histogram", column="seconds", by="verdict")
    seconds: dict[str, list[float]] = {"correct": [0, 2, 4, 6], "no_answer": [1], "wrong": [3, 5], "failed": [0]}
    for series in found["series"]:
        expected, _ = np.histogram(seconds[series["name"]], [*found["edges"][:-1], found["edges"][-1] + 1e-9])
        assert series["counts"] == expected.tolist()
    by_value = ask(f"{run_at}/histogram", column="labels.topic", where='[["verdict","=","correct"]]')
    assert by_value == {"edges": [], "values": ["sums", "more"], "series": [{"name": "", "counts": [3, 1]}]}


def test_a_sample_is_what_the_record_says(ask: Ask, run_at: str) -> None:
    found = ask(f"{run_at}/samples/gsm8k_0002")
    sample = found["sample"]
    assert (sample["verdict"], sample["gold"], sample["labels"]["topic"]) == ("no_answer", "2", "sums")
    assert [(one["extractor"], one["start"]) for one in sample["extracted"]] == [("answer", None), ("flexible", None)]
    (rollout,) = found["rollouts"]
    assert (rollout["stored"], rollout["n_prompt"], rollout["n_completion"]) == (True, 3, 3)
    assert rollout["keys"] == list(KEYS)
    marked = ask(f"{run_at}/samples/gsm8k_0003")["sample"]
    assert marked["response"][marked["extracted"][0]["start"] : marked["extracted"][0]["stop"]] == "3"


def test_the_python_that_is_shown_reads_the_rows(ask: Ask, run_at: str, run: Run) -> None:
    names: dict[str, Any] = {}
    exec(ask(f"{run_at}/samples/gsm8k_0003")["python"], names)
    assert torch.equal(names["item"].values, run.activations(KEYS[0])[2].values)


def test_hostile_texts_come_as_they_are(ask: Ask, run_at: str) -> None:
    assert ask(f"{run_at}/samples/gsm8k_0007")["sample"]["response"] == HOSTILE


def test_tokens_and_their_values(ask: Ask, run_at: str, run: Run) -> None:
    at = f"{run_at}/samples/gsm8k_0003"
    tokens = ask(f"{at}/tokens")
    assert (tokens["total"], tokens["n_prompt"], tokens["texts"]) == (6, 3, list("abcdef"))
    assert tokens["segments"] == [{"role": "user", "start": 0, "stop": 3}]
    assert ask(f"{at}/tokens", start=2, stop=4)["texts"] == ["c", "d"]
    rows = run.activations(KEYS[1])[2].values
    probe = load_probe(run.path / "probes" / "correct", PROBE)
    scores = ((rows - probe.mean) / probe.scale) @ probe.weight[0] + probe.bias
    lengths = [float(np.linalg.norm(row)) for row in rows.numpy()]
    found = ask(f"{at}/values", of=f"probe:correct/{PROBE}")
    assert found["values"][:5] == pytest.approx(scores.tolist(), rel=1e-4)
    assert found["values"][5] is None
    assert found["unit"] == "log-odds"
    assert ask(f"{at}/values", of=f"norm:{KEYS[1]}", start=1)["values"] == [
        *(pytest.approx(one, rel=1e-5) for one in lengths[1:]),
        None,
    ]
    direction = (probe.weight[0] / probe.scale).numpy()
    cosines = [float(row @ direction / np.linalg.norm(row) / np.linalg.norm(direction)) for row in rows.numpy()]
    found = ask(f"{at}/values", of=f"cosine:{KEYS[1]}:correct/{PROBE}")
    assert found["values"][:5] == pytest.approx(cosines, abs=1e-5)
    assert ask(f"{at}/values", of="logprob")["values"] == [0.0] * 6


def test_one_token_over_layers_and_hook_points(ask: Ask, run_at: str, run: Run) -> None:
    at = f"{run_at}/samples/gsm8k_0003"
    found = ask(f"{at}/token/2", of="norm")
    assert (found["layers"], found["hook_points"], found["missing"]) == (
        [1, 3, None],
        ["resid_post", "final_norm"],
        None,
    )
    expected = {key: float(run.activations(key)[2].values[2].norm()) for key in KEYS}
    assert found["values"] == [
        [pytest.approx(expected[KEYS[0]], rel=1e-5), None], [pytest.approx(expected[KEYS[1]], rel=1e-5), None],
        [None, pytest.approx(expected["final_norm"], rel=1e-5)],
    ]  # fmt: skip
    probes = ask(f"{at}/token/2", of="probe")["values"]
    scores = ask(f"{at}/values", of=f"probe:correct/{PROBE}")["values"]
    assert probes[1][0] == scores[2]
    assert probes[2] == [None, None]
    assert "no row" in ask(f"{at}/token/5", of="norm")["missing"]
    assert ask(f"{at}/token/6", 404)["error"] == "position 6 is out of range; there are tokens 0 to 5"


@pytest.mark.parametrize(
    "of", ["", "norm:", "norm:layers.9.resid_post", "probe:correct/nothing", "probe:../x", "cosine:embed", "lens:x"]
)
def test_values_that_are_not_there_are_refused(ask: Ask, run_at: str, of: str) -> None:
    reply = ask(f"{run_at}/samples/gsm8k_0003/values", 404 if of.startswith(("norm:l", "probe")) else 400, of=of)
    assert reply["error"]


def test_what_is_not_there_is_404(ask: Ask, run_at: str) -> None:
    for path in ("/api/sources/none", f"{run_at}/samples/none", f"{run_at}/samples/gsm8k_0003/tokens?turn=4"):
        assert ask(path, 404)["error"]


def test_a_session_has_rollouts_and_labels(ask: Ask, run: Run) -> None:
    at = f"/api/sources/{source_ids(ask)['session']}"
    session = Session.open(run.path / "activations" / "session")
    session.add_labels({"rollout-00002": {"grade": 3, "by": "me"}})
    assert ask(at)["summary"] is None
    rows = ask(f"{at}/samples")["rows"]
    assert [row["sample_id"] for row in rows] == [f"rollout-{i:05}" for i in range(8)]
    assert ask(f"{at}/samples/rollout-00002/tokens")["texts"] == list("abcdef")
    assert json.dumps(ask(f"{at}/samples/rollout-00002")["sample"]["labels"])
