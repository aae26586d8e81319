"""`roentgen show` prints what is in the record, in the store and in the run's probes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from eval_jobs.hashed_config import ServedModelInfo
from eval_jobs.resume import open_run
from eval_jobs.settings import check_settings
from probes.report import ProbeReport
from roentgen.atomic_files import write_json
from roentgen.cli import app
from roentgen.linear_probe import ProbeCard, SavedProbe, save_probes
from roentgen.runs import RunError, Sample, recording
from roentgen.workflows.sample_details import find_sample
from tests.eval_jobs.conftest import take
from tests.eval_jobs.test_outputs import sample
from tests.probes.conftest import N_ROWS, build_run, planted, report
from tests.roentgen.workflows.conftest import MakeRun, make_run, rollout

__all__ = ["build_run", "make_run", "planted", "report", "rollout"]  # fixtures

KEY = "layers.10.resid_post"
"""That of the probe which the report calls the best."""


def show(*arguments: str) -> str:
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["show", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_sample_is_printed_whole(make_run: MakeRun) -> None:
    kept = make_run()
    said = show(str(kept.run.path), "3")
    recorded = next(s for s in kept.run.read_samples() if s.sample_id == "gsm8k_0003")
    assert recorded.question in said
    assert "Answer: 6 (see step 3)" in said
    assert f"gold answer: {recorded.gold}" in said
    lines = {tuple(line.replace("│", " ").split()) for line in said.splitlines()}
    assert ("→", "answer", "6", "correct") in lines
    assert ("flexible", "3", "wrong") in lines
    made = kept.rollouts["gsm8k_0003", 0]
    assert made.rollout_id in said
    assert f"positions 0–{made.n_rows - 1}, bfloat16" in said
    assert f"[{made.n_rows}, 8]: {', '.join(made.spec.keys)}" in said


def test_every_turn_has_its_rows(make_run: MakeRun) -> None:
    kept = make_run(positions="stride:2")
    found = json.loads(show(str(kept.run.path), "gsm8k_0002", "--json"))
    assert [stored["turn"] for stored in found["stored"]] == [0, 1]
    for stored in found["stored"]:
        made = kept.rollouts["gsm8k_0002", stored["turn"]]
        assert stored["positions"] == made.position.tolist()
        assert stored["rows"][1] - stored["rows"][0] == len(made.position)
        assert stored["rollout_id"] == made.rollout_id


def test_failed_and_unstored_samples_say_so(make_run: MakeRun, tmp_path: Path) -> None:
    kept = make_run()
    said = show(str(kept.run.path), "5")
    assert "error: 500: <b>poisoned</b>" in said
    assert "rows: none were stored" in said
    (tmp_path / "store/s/session.json").unlink()
    assert "is not a session" in show(str(kept.run.path), "3")


def test_probes_say_what_they_read(build_run: Any, planted: Any, report: ProbeReport) -> None:
    features, correct = planted([KEY], KEY)
    run = build_run(features, correct)
    folder = run.path / "probes/correct"
    card = ProbeCard(
        model="m", revision="r", key=KEY, positions="last_prompt", kind="logistic", label="correct", target="binary",
        unit="log_odds", strength=1, folds=5, metrics={}, data_hash="0", seed=0, roentgen="0",
    )  # fmt: skip
    width = features[KEY].shape[1]
    probe = SavedProbe(torch.randn(1, width), torch.randn(1), torch.randn(width), torch.rand(width) + 1, card)
    save_probes(folder, [probe])
    write_json(folder / "results.json", report.to_json())
    expected = float(probe.scores(features[KEY][6:7])[0, 0])
    found = json.loads(show(str(run.path), "7", "--json"))
    (score,) = found["scores"]
    assert (score["name"], score["unit"]) == (f"{KEY}@last_prompt", "log_odds")
    assert score["scores"] == [pytest.approx(expected, rel=1e-4)]
    assert score["probability"] == pytest.approx(torch.tensor(expected).sigmoid().item(), rel=1e-4)
    assert found["stored"][0]["positions"] == list(range(N_ROWS))
    assert f"probe correct: {KEY}@last_prompt: {expected:+.3f} (log-odds" in show(str(run.path), "7")
    other = dataclasses.replace(probe, card=card.model_copy(update={"revision": "other"}))
    save_probes(folder, [other])
    assert "not scored: it reads m (other), and the rows are of m (r)" in show(str(run.path), "7")
    (folder / "probes.json").unlink()
    assert "holds no probes" in show(str(run.path), "7")


def test_samples_are_found_by_what_people_call_them(tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text("plain: ''\ncalm: No hurry.\n")
    settings = check_settings(samples=12, output=tmp_path / "run", variants=str(tmp_path / "v.yaml"), epochs=2)
    problems = take("arithmetic", 12)
    run = open_run(settings, problems, ServedModelInfo("m", "r"), "http://h:1/v1")
    with recording(run) as record:
        for problem in problems:
            for variant in run.config.variants:
                for epoch in (1, 2):
                    one = sample(problem, "Answer: 1", "stop", rollouts=False).model_dump()
                    suffix = f"_e{epoch}" * (epoch > 1) + f"_v-{variant}"
                    one |= {
                        "sample_id": f"arithmetic_{problem.number:04}{suffix}", "epoch": epoch, "variant": variant,
                        "config_hash": run.config.variants[variant]["config_hash"],
                    }  # fmt: skip
                    record.append(Sample.model_validate(one))
    found = find_sample(run, 1)
    assert found.sample.sample_id == "arithmetic_0001_v-plain"
    assert found.others == ["arithmetic_0001_v-calm", "arithmetic_0001_e2_v-plain", "arithmetic_0001_e2_v-calm"]
    assert find_sample(run, "12", epoch=2, variant="calm").sample.sample_id == "arithmetic_0012_e2_v-calm"
    assert find_sample(run, "arithmetic_0003_v-calm").others == []
    assert find_sample(run, problems[3].problem_id, epoch=2).sample.sample_id == "arithmetic_0004_e2_v-plain"
    with pytest.raises(RunError, match="'7' has no sample of epoch 3; there are arithmetic_0007_v-plain, "):
        find_sample(run, 7, epoch=3)
    with pytest.raises(RunError, match="has no sample '13'; name one of its 48 samples"):
        find_sample(run, 13)
