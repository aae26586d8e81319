"""An extended run equals a run created at that size, and only new attempts are made."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from eval_jobs.command import evaluate as command
from eval_jobs.hashed_config import ServedModelInfo
from eval_jobs.resume import OtherConfigurationError, check_output, open_run, set_name
from eval_jobs.selection import load_problems
from eval_jobs.settings import check_settings
from eval_jobs.variants import Attempt, attempts_of
from roentgen.atomic_files import write_json
from roentgen.runs import Run, write_config
from tests.eval_jobs.conftest import take
from tests.eval_jobs.stand_in import StandIn
from tests.eval_jobs.test_driver import evaluate

SERVED = ServedModelInfo("tiny", "r", "float32", 30, 8)
PREFIXES = {"plain": "", "calm": "No hurry.", "quick": "Hurry!"}


@pytest.fixture(autouse=True)
def _work_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def opened(output: Path, **values: Any) -> tuple[Run, list[Attempt]]:
    """A run as opened by an evaluation, written to disk, and its attempts."""
    settings = check_settings(output=output, **values)
    problems = take(settings.problems, settings.samples)
    run = open_run(settings, problems, SERVED, "http://h:1/v1")
    write_config(run)
    return run, attempts_of(run.config, problems)


def variants_file(folder: Path, count: int) -> Path:
    file = folder / f"variants-{count}.yaml"
    file.write_text("\n".join(f"{name}: '{prefix}'" for name, prefix in list(PREFIXES.items())[:count]))
    return file


steps = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=4)


@given(steps=steps, varied=st.booleans())
@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_grown_in_steps_does_what_a_fresh_one_of_that_size_does(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, int]], varied: bool
) -> None:
    folder = tmp_path_factory.mktemp("growth")
    samples, epochs, variants = 1, 1, 2
    done: list[Attempt] = []
    for more_samples, more_epochs, more_variants in [(0, 0, 0), *steps]:
        samples, epochs, variants = samples + more_samples, epochs + more_epochs, min(3, variants + more_variants)
        values = {"samples": samples, "epochs": epochs}
        if varied:
            values["variants"] = variants_file(folder, variants)
        grown, attempts = opened(folder / "grown", **values)
        fresh, expected = opened(folder / f"fresh-{samples}-{epochs}-{variants}", **values)
        assert [(a.identity, a.sample_id) for a in attempts] == [(a.identity, a.sample_id) for a in expected]
        assert set(done) <= set(attempts)  # what was asked stays, under the same name and the same hash
        assert (grown.config.problems, grown.config.variants) == (fresh.config.problems, fresh.config.variants)
        assert grown.config.config_hash == fresh.config.config_hash
        done = attempts


@pytest.mark.usefixtures("local_ray")
def test_only_what_is_new_is_asked_and_the_result_is_that_of_a_fresh_run(server: StandIn, tmp_path: Path) -> None:
    evaluate(server, samples=4, variants=variants_file(tmp_path, 2))
    assert len(server.requests) == 8
    server.requests.clear()
    larger = {"samples": 6, "epochs": 2, "variants": variants_file(tmp_path, 3)}
    run, shown = evaluate(server, **larger)
    assert "the run grows from 8 to 36 samples" in shown
    assert len(server.requests) == 28
    fresh, _ = evaluate(server, output="fresh", **larger)
    times = dict.fromkeys(("timing", "request_seconds", "run_id"))
    summaries = [{**(one.summary() or {}), **times} for one in (run, fresh)]
    assert summaries[0] == summaries[1]
    assert {s.sample_id: s.answers for s in run.read_samples()} == {
        s.sample_id: s.answers for s in fresh.read_samples()
    }
    server.requests.clear()
    again, shown = evaluate(server, **larger)
    assert (server.requests, "grows" in shown) == ([], False)
    assert again.config == run.config


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"samples": 2}, r"problems\.samples: 3 in the folder, 2 requested"),
        ({"epochs": 1}, r"problems\.epochs: 2 in the folder, 1 requested"),
        ({"offset": 1, "samples": 5}, r"problems\.offset: 0 in the folder, 1 requested"),
        ({"shuffle": True}, r"problems\.(hash|shuffle)"),
        ({"max_tokens": 7}, r"sampling\.max_tokens: 512 in the folder, 7 requested"),
        ({"variants": "two"}, r"variants: None in the folder, \['plain', 'calm'\] requested"),
    ],
)
def test_what_is_no_growth_is_refused_with_what_differs(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    lines = [f'{{"question": "1 + {number}?", "answer": "#### 2"}}\n' for number in range(8)]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    begun: dict[str, Any] = {"problems": "p.jsonl", "samples": 3, "epochs": 2}
    if "variants" in changed:
        changed = {"variants": variants_file(tmp_path, 2)}

    def open_it(**values: Any) -> Run:
        settings = check_settings(output="out", **values)
        problems = load_problems(settings.selection)
        check_output(settings, problems)
        return open_run(settings, problems, SERVED, "http://h:1/v1")

    run = open_it(**begun)
    before = (run.path / "config.json").read_text()
    with pytest.raises(OtherConfigurationError, match=said):
        open_it(**{**begun, **changed})
    assert (run.path / "config.json").read_text() == before
    assert open_it(**{**begun, "samples": 8}).config.problems["samples"] == 8


def test_a_file_that_was_only_added_to_is_the_same_problems_and_an_edited_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    lines = [f'{{"question": "1 + {number}?", "answer": "#### 2"}}\n' for number in range(3)]
    file.write_text("".join(lines))

    def open_it() -> Run:
        settings = check_settings(output="out", problems="p.jsonl", samples=10)
        run = open_run(settings, load_problems(settings.selection), SERVED, "http://h:1/v1")
        write_config(run)
        return run

    assert open_it().config.problems["samples"] == 3
    file.write_text("".join(lines) + lines[0].replace("1 +", "7 +"))
    assert open_it().config.problems["samples"] == 4
    file.write_text("".join(lines[:2]) + lines[2].replace("#### 2", "#### 3") + lines[0].replace("1 +", "7 +"))
    with pytest.raises(OtherConfigurationError, match=r"problems\.hash"):
        open_it()


def test_an_older_run_keeps_the_names_of_its_samples(tmp_path: Path) -> None:
    run, _ = opened(tmp_path / "old", samples=2)
    config = run.config.model_dump()
    del config["problems"]["name"]
    write_json(run.path / "config.json", config)
    grown, attempts = opened(tmp_path / "old", samples=3)
    assert [attempt.sample_id for attempt in attempts] == ["gsm8k_0001", "gsm8k_0002", "gsm8k_0003"]
    assert grown.config.set_name == "gsm8k"


@pytest.mark.parametrize(
    ("source", "name"),
    [("gsm8k", "gsm8k"), ("gsm8k-train", "gsm8k-train"), ("/data/My set_v-2.jsonl", "My-set-v-2"), ("…", "problems")],
)
def test_samples_are_called_after_their_problems(source: str, name: str) -> None:
    assert set_name(source) == name


def test_another_configuration_is_refused_before_a_server_is_started(tmp_path: Path) -> None:
    opened(tmp_path / "out", samples=2)

    @contextmanager
    def factory(settings: object) -> Iterator[str]:
        raise AssertionError("started")
        yield ""  # type: ignore[unreachable]

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, ["--output", str(tmp_path / "out"), "--seed", "5", "--samples", "2"], obj=factory)
    assert done.exit_code == 2
    assert "sampling.seed: 0 in the folder, 5 requested" in done.stderr
