"""Two runs, reports of probes, a run that grows, files, and sources that are damaged or hostile."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import probes
from roentgen.api.run_results import export
from roentgen.runs import Run, RunConfig, Sample, create_run, recording
from roentgen.runs.run_comparison import compare
from roentgen.view.export import answers_of, page_of, url
from roentgen.view.lens import Lens, _load
from roentgen.view.library import Library
from tests.roentgen.view.conftest import HOSTILE, Ask, asker, source_ids


def other_run(folder: Path, run: Run, change: Callable[[Sample], Sample]) -> Run:
    """A run with the samples of another one, changed."""
    other = create_run(folder, RunConfig.model_validate({**run.config.model_dump(), "run_id": folder.name}))
    with recording(other) as record:
        for sample in run.read_samples():
            record.append(change(sample))
    return other


def test_two_runs_differ_where_their_verdicts_do(run: Run, tmp_path: Path) -> None:
    def change(sample: Sample) -> Sample:
        if sample.sample_id not in ("gsm8k_0001", "gsm8k_0004"):
            return sample
        flipped = not sample.correct
        return sample.model_copy(update={"correct_by": {"answer": flipped, "flexible": True}, "correct": flipped})

    other = other_run(tmp_path / "other", run, change)
    ask = asker(run.path, other.path)
    ids = {source["name"]: source["id"] for source in ask("/api/sources")["sources"]}
    found = ask("/api/compare", a=ids["run"], b=ids["other"])
    expected = compare(run, other).difference
    assert found["difference"] == {
        "value": expected.value, "low": expected.low, "high": expected.high, "n": expected.problems,
    }  # fmt: skip
    assert found["mcnemar"] == {"p": expected.p_value, "only_a": 1, "only_b": 1}
    changed = {one["problem"]: (one["a"]["verdict"], one["b"]["verdict"]) for one in found["changed"]}
    assert changed == {"problem-0": ("correct", "wrong"), "problem-3": ("wrong", "correct")}
    assert found["unmatched"] == {"a": 0, "b": 0}
    assert ask("/api/compare", 404, a=ids["run"], b="none")["error"]


def test_a_report_of_probes_and_its_scores(build_run: Callable[..., Run], planted: Callable[..., Any]) -> None:
    keys = ("layers.0.resid_post", "layers.2.resid_post")
    features, correct = planted(keys, keys[1], n=40, d=8)
    run = build_run(features, correct)
    report = probes.train(run.path)
    ask = asker(run.path)
    at = f"/api/sources/{source_ids(ask)['run']}"
    found = ask(f"{at}/probes/correct")
    assert found["best"]["value"] == report.best.estimate.value
    assert [(one["layer"], one["auroc"]["value"]) for one in found["by_candidate"]] == [
        (0, report.results[0].estimate.value), (2, report.results[1].estimate.value),
    ]  # fmt: skip
    assert sum(part["n"] for part in found["reliability"]) == 40
    scores = json.loads((run.path / "probes" / "correct" / "curves.json").read_text())["samples"]
    rows = ask(f"{at}/samples", sort="-score.correct")["rows"]
    assert [row["sample_id"] for row in rows] == sorted(scores, key=lambda name: -scores[name])
    assert ask(f"{at}/samples", where='[["score.correct",">",0]]')["matched"] == sum(one > 0 for one in scores.values())
    (run.path / "probes" / "correct" / "curves.json").unlink()
    assert "train again" in ask(f"{at}/probes/correct")["notes"][-1]
    assert ask(f"{at}/probes/nothing", 404)["error"]


def test_a_run_that_grows_is_told_until_it_is_complete(run: Run) -> None:
    library = Library([str(run.path)])
    (about,) = library.describe()
    assert about["n_samples"] == 8
    with recording(run) as record:
        (about,) = library.describe()
        assert about["live"]
        first = run.read_samples()[0]
        for number in range(3):
            record.append(
                first.model_copy(update={"sample_id": f"gsm8k_{number + 20:04}", "problem_id": f"new-{number}"})
            )
        record.append(first)  # a sample that is there already counts once
        source = library.get(about["id"])
        source.table.refresh()
        assert source.describe()["n_samples"] == 11
    with open(run.record_path, "ab") as file:
        file.write(b'{"sample_id": "gsm8k_0099", "half a li')
    source.table.refresh()
    assert source.table.count() == 11
    assert [row["sample_id"] for row in source.table.page(9, 5)["rows"]] == ["gsm8k_0021", "gsm8k_0022"]


def test_events_tell_of_a_complete_run_once(run: Run, ask: Ask) -> None:
    (run.path / "summary.json").write_text(json.dumps({"samples": 7, "errors": 1, "complete": True}))
    client = asker(run.path).__closure__[0].cell_contents
    at = source_ids(ask)["run"]
    reply = client.get(f"/api/events?token=secret&source={at}&monitor=/correct/layers.3.resid_post@last_prompt")
    (event,) = re.findall(r"event: progress\ndata: (.*)\n\n", reply.text)
    progress = json.loads(event)
    assert (progress["n_samples"], progress["complete"], progress["failures"]) == (8, True, {"the server hung up": 1})
    probe = "probe:correct/layers.3.resid_post@last_prompt"
    names = [f"/api/sources/{at}/samples/gsm8k_{number:04}/values" for number in range(1, 8)]
    values = [ask(name, of=probe)["values"][2] for name in names]
    assert progress["monitor"]["n"] == 7
    assert progress["monitor"]["mean"] == pytest.approx(sum(values) / 7, rel=1e-3)


def test_a_file_holds_what_the_page_would_ask_and_nothing_gets_out_of_it(run: Run, ask: Ask) -> None:
    at = source_ids(ask)["run"]
    library = Library([str(run.path)])
    page = page_of(f"#/run/{at}", answers_of(library, f"#/run/{at}")).decode()
    assert page.count("<script") == 2
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    answers = json.loads(data)["answers"]
    assert answers[f"api/sources/{at}/samples/gsm8k_0007"]["sample"]["response"] == HOSTILE
    assert answers[f"api/sources/{at}/samples"]["rows"] == ask(f"/api/sources/{at}/samples", limit=1000)["rows"]
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page.split("<script", 1)[0])
    one = answers_of(library, f"#/run/{at}/sample/gsm8k_0003?turn=0&token=2")
    assert one[url("sources", at, "samples", "gsm8k_0003", "values", turn=0, of="logprob")]["values"] == [0.0] * 6
    assert f"api/sources/{at}/samples/gsm8k_0003/token/2?turn=0&of=norm" in one


def test_a_run_is_exported_as_a_page(run: Run, tmp_path: Path) -> None:
    done = export(run, tmp_path / "page.html")
    assert done.tables[0].rows == 8
    assert "gsm8k_0003" in (tmp_path / "page.html").read_text()


def test_halves_of_surrogate_pairs_and_huge_answers_are_shown(run: Run, ask: Ask) -> None:
    line = json.loads(run.record_path.read_text().splitlines()[0])
    line |= {"sample_id": "gsm8k_0031", "problem_id": "x", "response": "half \ud83d and " + "word " * 200_000}
    with open(run.record_path, "a") as file:
        file.write(json.dumps(line) + "\n")
    page = asker(run.path)
    at = f"/api/sources/{source_ids(page)['run']}"
    assert page(f"{at}/samples", q="half")["matched"] == 1
    assert page(f"{at}/samples/gsm8k_0031")["sample"]["response"].startswith("half \ufffd and word")


def test_what_is_damaged_is_named_and_the_rest_is_shown(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"config_hash": 1')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    sources = {source["name"]: source for source in asker(tmp_path)("/api/sources")["sources"]}
    assert set(sources) == {"run", "bad"}
    assert "damaged" in sources["bad"]["error"]
    assert sources["run"]["error"] is None


def test_the_lens_is_the_models_own_norm_and_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    model.model.norm.weight.data.uniform_(0.5, 2)
    model.save_pretrained(tmp_path)
    from tests.serve_app import tiny

    tiny.tokenizer().save_pretrained(tmp_path)
    lens = _load(tmp_path)
    assert isinstance(lens, Lens)
    rows = torch.randn(5, 16)
    with torch.no_grad():
        assert torch.allclose(lens.logits(rows), model.lm_head(model.model.norm(rows)), atol=1e-5)
        assert torch.allclose(lens.logits(rows, normed=True), model.lm_head(rows), atol=1e-5)
