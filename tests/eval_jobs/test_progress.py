"""The display before a sample has finished, and the server's token count behind it."""

import io
import time

import pytest
from rich.console import Console

from eval_jobs import progress
from eval_jobs.endpoint import Endpoint
from eval_jobs.progress import Progress, Tally
from eval_jobs.server_token_counter import ServerTokenCounter
from roentgen.runs import Sample
from serve_app.engines.protocol import Load
from serve_app.http.metrics import Metrics
from tests.eval_jobs.stand_in import StandIn


def test_tokens_move_before_the_first_sample_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_BEATS", 0.02)
    monkeypatch.setattr(progress, "SECONDS_OF_SILENCE", 0.1)
    counts = iter(range(0, 100_000, 1200))
    log = io.StringIO()
    with Progress(Console(file=log, width=200), 4, Tally(), lambda: next(counts)) as bar:
        bar.begin("evaluating")
        time.sleep(0.5)
    lines = log.getvalue().splitlines()
    assert lines[0] == "evaluating"
    said = [line for line in lines if "no sample finished yet" in line]
    assert 2 <= len(said) <= 6
    assert said[0].startswith("0/4 done, no sample finished yet, ")
    tokens = [int(line.partition("yet, ")[2].partition(" tokens")[0].replace(",", "")) for line in said]
    assert tokens == sorted(set(tokens))


def test_samples_that_all_failed_have_finished() -> None:
    log = io.StringIO()
    tally = Tally()
    with Progress(Console(file=log, width=200), 1, tally) as bar:
        bar.add(Sample(
            sample_id="p_0001", problem_id="p", config_hash="h", question="q", solution="s", gold="1", error="500: it failed"
        ))  # fmt: skip
    assert "1/1 done, 1 failed, 0:00 so far" in log.getvalue()


def test_a_server_that_says_nothing_leaves_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_BEATS", 0.02)
    monkeypatch.setattr(progress, "SECONDS_OF_SILENCE", 0.1)
    log = io.StringIO()
    with Progress(Console(file=log, width=200), 4, Tally()) as bar:
        bar.begin("evaluating")
        time.sleep(0.3)
    assert "0/4 done, no sample finished yet, 0:00 so far" in log.getvalue()


def test_roentgen_s_own_metrics_are_read(server: StandIn) -> None:
    """With the exact text that the server's registry writes."""
    metrics = Metrics()
    counter = ServerTokenCounter(Endpoint(server.base_url))
    server.metrics = metrics.text(
        {"a": Load(2, 0, {1: 10, 2: 5}), "b": Load(1, 0, {4: 3})}
    ).decode()  # 20 and 12 tokens
    assert counter.tokens() == 0  # of before
    server.metrics = metrics.text({"a": Load(2, 0, {1: 10, 2: 15}), "b": Load(1, 0, {4: 4})}).decode()
    assert counter.tokens() == 24
    counter.close()
    assert counter.tokens() is None


def test_vllm_s_metrics_are_read(server: StandIn) -> None:
    counter = ServerTokenCounter(Endpoint(server.base_url))
    for total, since in (("7.0", 0), ("1.007e+03", 1000)):
        server.metrics = f'# TYPE x counter\nvllm:generation_tokens_total{{engine="0",model_name="m"}} {total}\n'
        assert counter.tokens() == since


def test_a_server_without_metrics_is_asked_once(server: StandIn) -> None:
    counter = ServerTokenCounter(Endpoint(server.base_url))
    assert counter.tokens() is None
    server.metrics = "vllm:generation_tokens_total 7\n"
    assert counter.tokens() is None
