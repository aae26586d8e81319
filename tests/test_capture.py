"""`roentgen capture` as a user runs it: real processes, SmolLM2-135M, a file of texts and a run directory."""

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from roentgen.cli import app
from roentgen.contract import RolloutKey
from roentgen.runs import RunConfig, Sample, create_run, recording
from roentgen.store import Session, verify
from tests.conftest import ROENTGEN
from tests.reference import teacher_forced, worst_error

QUESTION = {"role": "user", "content": "Say something about the sea."}
LINES = [
    {
        "id": f"{side}-{pair}",
        "messages": [QUESTION, {"role": "assistant", "content": f"The sea is {word}."}],
        "labels": {"side": side, "pair": pair},
    }
    for pair, words in enumerate([("calm", "cruel"), ("a wide and quiet home", "a cold and hungry grave")])
    for side, word in zip(("positive", "negative"), words, strict=True)
]
OTHERS = [
    {"text": "The capital of France is Paris."},
    {"id": "long", "text": "and on " * 8000},
    {"prompt": "2 + 2 =", "completion": " 4"},
]


def roentgen(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROENTGEN, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.integration
def test_contrastive_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "sea.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*LINES, *OTHERS]))
    command = ["capture", "sea.jsonl", "--session", "sea", "--layers", "0,29", "--hook-points", "resid_post"]
    command += ["--chunk-size", "1", "--dtype", "float32"]
    done = roentgen(tmp_path, *command)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not captured: long: it has 16001 tokens; the context of smollm2-135m is 8192" in done.stderr
    assert "6 texts captured" in done.stdout
    assert f"activations: {tmp_path}/activations/sea" in done.stdout

    session = Session.open(tmp_path / "activations" / "sea")
    rollouts = session.rollouts().set_index("problem_id", drop=False)
    assert set(rollouts.index) == {"positive-0", "negative-0", "positive-1", "negative-1", "5", "7"}
    for row in rollouts.to_dict("records"):
        where = rollouts.loc[[row["problem_id"]]]
        fed = list(row["token_ids"][: row["row_stop"] - row["row_start"]])
        expected = teacher_forced(fed, [0, 29])
        for key in ("layers.0.resid_post", "layers.29.resid_post"):
            assert worst_error(session.activations(key, where=where)[0].values, expected[key]) <= 1e-4
    sea = rollouts.loc["positive-1"]
    assert sea["labels"] == {"side": "positive", "pair": 1}
    assert sea["text"].endswith("<|im_start|>assistant\nThe sea is a wide and quiet home.<|im_end|>")
    assert rollouts.loc["7"]["text"] == "2 + 2 = 4"
    assert verify(session).ok

    again = roentgen(tmp_path, *command)
    assert again.returncode == 1
    assert "6 of 6 texts are in the session already" in again.stderr
    assert "0 texts captured (0 tokens in 0.0 s), 6 already captured, 1 failed" in again.stdout


@pytest.mark.integration
def test_new_layers_for_an_old_run_and_probes_on_them(tmp_path: Path) -> None:
    """The run kept no activations; its answers are read again, and its own labels tell what to probe for."""
    run = create_run(tmp_path / "run", RunConfig(
        run_id="run", created="2025-01-01T00:00:00Z", config_hash="c0ffee",
        hashed={"model": "smollm2-135m", "dtype": "float32"}, problems={}, settings={}, prompt={}, versions={},
    ))  # fmt: skip
    with recording(run) as record:
        for i in range(16):
            right = i % 2 == 0
            messages = [
                {"role": "user", "content": f"What is {i} + {'2' if right else '345'}?"},
                {"role": "assistant", "content": f"Answer: {i + 2}"},
            ]
            record.append(Sample(
                sample_id=f"gsm8k_{i:04}", problem_id=f"p{i}", epoch=2, config_hash="c0ffee", question="?",
                solution="!", gold=str(i + 2), messages=messages, correct=right, finish_reason="stop",
            ))  # fmt: skip
    done = roentgen(tmp_path, "capture", "run", "--layers", "8,16", "--hook-points", "resid_post", "--session", "new")
    assert done.returncode == 0, done.stdout + done.stderr
    session = tmp_path / "activations" / "new"
    assert f"next: roentgen probe train {run.path} --session {session}" in done.stdout
    rollouts = Session.open(session).rollouts()
    keys = [
        RolloutKey(config_hash="c0ffee", problem_id=f"p{i}", epoch=2).model_dump() for i in range(16)
    ]  # fmt: skip
    columns = ["config_hash", "problem_id", "epoch", "turn"]
    assert sorted(rollouts[columns].to_dict("records"), key=str) == sorted(keys, key=str)
    assert [labels["correct"] for labels in rollouts["labels"]].count(True) == 8

    probed = roentgen(tmp_path, *done.stdout.split("next: roentgen ")[1].split())
    assert probed.returncode == 0, probed.stdout + probed.stderr
    assert "correct read by logistic at last_prompt in new: 16 samples of 16 problems" in probed.stdout
    results = json.loads((run.path / "probes" / "correct@new" / "results.json").read_text())
    assert [key["layer"] for key in results["keys"]] == [8, 16]
    assert results["best"]["auroc"] > 0.9


@pytest.mark.parametrize(
    ("line", "options", "words"),
    [
        (None, [], "texts.jsonl is neither a run directory nor a file"),
        ("", [], "texts.jsonl has no lines"),
        ('{"text": 1}', [], "texts.jsonl, line 1: text: Input should be a valid string (given: 1)"),
        ('{"text": "a"}', ["--layers", "eight"], "--layers: 'eight' is not a list of layers"),
        ('{"text": "a"}', ["--positions", "some"], "'some' is not a position policy"),
        ('{"text": "a"}', ["--session", "../x"], "'../x' is not a session id"),
        ('{"text": "a"}', ["--chunk-size", "0"], "--chunk-size: input should be greater than or equal to 1"),
        ('{"text": "a"}', ["--dtype", "float8"], "--dtype"),
        ('{"text": "a"}', ["--model", "./nowhere"], "no such folder"),
        ('{"text": "a"}', ["--store", "/proc/nowhere"], "not writable"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str | None, options: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if line is not None:
        (tmp_path / "texts.jsonl").write_text(line)
    done = CliRunner().invoke(app, ["capture", "texts.jsonl", *options])
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert "loading" not in done.stderr.replace("loading libraries", "")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["capture", str(tmp_path)])
    assert done.exit_code == 2
    assert "is not a run directory" in done.stderr
