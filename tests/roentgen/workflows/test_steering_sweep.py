"""`roentgen probe steer` against the served SmolLM2-135M: what is asked, what is left on disk, what is refused."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from roentgen.linear_probe import ProbeCard, SavedProbe, SavedProbeError, find_probe, save_probes
from roentgen.runs import RunConfig, RunError, Sample, create_run, recording
from roentgen.workflows.command_settings import SteerSettings
from roentgen.workflows.steering_sweep import steer
from tests.conftest import ROENTGEN, Server

MODEL = "smollm2-135m"
NAMES = ("layers.10.resid_post@last_prompt", "layers.20.resid_post@last_prompt")
PROMPT = "What is {} + 3? End with a line Answer: [number]."


def make_run(folder: Path, revision: str = "r", mode: str = "no-tools") -> Path:
    """A run of three problems, one of them twice, with two probes, of which most folds chose the second."""
    hashed = {"sampling": {"max_tokens": 12, "temperature": 0.0}, "mode": mode}
    run = create_run(folder, RunConfig(
        run_id="run", created="2025-01-01T00:00:00Z", config_hash="c0ffee", hashed=hashed, problems={},
        settings={"extractor": "answer_line"}, prompt={}, versions={},
    ))  # fmt: skip
    with recording(run) as record:
        for number, epoch in ((1, 1), (2, 1), (2, 2), (3, 1)):
            asked = {"role": "user", "content": PROMPT.format(number)}
            record.append(Sample(
                sample_id=f"gsm8k_{number:04}" + ("_e2" if epoch > 1 else ""), problem_id=f"p{number}", epoch=epoch,
                config_hash="c0ffee", question="?", solution="!", gold=str(number + 3),
                messages=[asked, {"role": "assistant", "content": "…"}],
            ))  # fmt: skip
    probes: list[Any] = []
    for name in NAMES:
        key, _, positions = name.partition("@")
        card = ProbeCard(
            model=MODEL, revision=revision, key=key, positions=positions, kind="logistic", label="correct", target="binary",
            strength=1, folds=5, metrics={}, data_hash="c0ffee", seed=0, roentgen="0.1.0",
        )  # fmt: skip
        weight = torch.randn(1, 576, generator=torch.Generator().manual_seed(len(probes)))
        probes.append(SavedProbe(weight, torch.zeros(1), torch.zeros(576), torch.ones(576), card))
    save_probes(folder / "probes" / "correct", probes)
    best = {"best": {"keys": [NAMES[1], NAMES[0], NAMES[1]]}}
    (folder / "probes" / "correct" / "results.json").write_text(json.dumps(best))
    return folder


def test_of_a_run_the_probe_that_most_folds_chose_is_taken(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path, probe = find_probe(run, "correct")
    assert (path, probe.card.key) == (run / "probes" / "correct" / NAMES[1], "layers.20.resid_post")
    assert find_probe(run / "probes" / "correct" / NAMES[0], "correct")[1].card.key == "layers.10.resid_post"
    with pytest.raises(SavedProbeError, match="no saved probes of 'steps'"):
        find_probe(run, "steps")


def command(run: Path, server: Server, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [ROENTGEN, "probe", "steer", str(run), "--base-url", server.base_url, *options],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.integration
def test_a_sweep_through_the_server(server: Server, tmp_path: Path) -> None:
    client = OpenAI(base_url=server.base_url, api_key="none")
    revision = client.models.list().data[0].revision
    run = make_run(tmp_path / "run", revision)
    done = command(run, server, "--scales=-4,4", "--controls", "1", "--samples", "2", "--positions", "all")
    assert done.returncode == 0, done.stderr
    assert "14 of 14 answered" in done.stderr
    folder = run / "probes" / "correct" / "steering" / NAMES[1]
    assert sorted(path.name for path in folder.iterdir()) == ["outcomes.jsonl", "steering.json", "steering.png"]
    report: dict[str, Any] = json.loads((folder / "steering.json").read_text())
    outcomes = [json.loads(line) for line in (folder / "outcomes.jsonl").read_text().splitlines()]

    assert (report["key"], report["problems"], report["seen"]) == ("layers.20.resid_post", 2, True)
    assert report["unit"] == pytest.approx(24)  # √576: each of the features varies by 1
    arms = [(finding["along"], finding["scale"]) for finding in report["findings"]]
    assert arms == [
        ("nothing", 0),
        *((along, scale) for along in ("probe", "random", "orthogonal") for scale in (-4, 4)),
    ]
    assert len(outcomes) == 2 * 7
    assert {outcome["problem_id"] for outcome in outcomes} == {"p1", "p2"}
    assert "orthogonal" in done.stdout

    for outcome in outcomes:  # without steering the answer is what anyone gets who asks
        if outcome["along"] == "nothing":
            asked: Any = [{"role": "user", "content": PROMPT.format(outcome["problem_id"][1:])}]
            reply = client.chat.completions.create(model=MODEL, messages=asked, max_tokens=12, temperature=0)
            assert reply.choices[0].message.content == outcome["text"]
    pushed = {o["text"] for o in outcomes if o["along"] == "probe" and o["problem_id"] == "p1"}
    assert len(pushed | {o["text"] for o in outcomes if o["along"] == "nothing" and o["problem_id"] == "p1"}) == 3


@pytest.mark.integration
@pytest.mark.parametrize(
    ("made", "options", "said"),
    [
        ({"mode": "with-tools", "revision": "served"}, (), "used tools"),
        ({"revision": "other"}, (), "the probe belongs to smollm2-135m (other)"),
        ({"revision": "served"}, ("--positions", "last"), "is not known while tokens are generated"),
        ({"revision": "served"}, ("--scales", "1,inf"), "not a comma-separated list of numbers"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    server: Server, tmp_path: Path, made: dict[str, str], options: tuple[str, ...], said: str
) -> None:
    revision = OpenAI(base_url=server.base_url, api_key="none").models.list().data[0].revision
    if made["revision"] == "served":
        made = {**made, "revision": revision}
    done = command(make_run(tmp_path / "run", **made), server, *options)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_run_is_needed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.json").rename(run / "gone.json")
    with pytest.raises(RunError, match="is not a run directory"):
        steer(SteerSettings(probe=run / "probes" / "correct" / NAMES[0], base_url="http://127.0.0.1:9/v1"))
