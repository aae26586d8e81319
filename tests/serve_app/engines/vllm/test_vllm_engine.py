"""What only the vLLM engine has: preemption, fused modules, processes of its own, and a server that does not capture."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from roentgen.contract import ActivationRequest, Positions
from serve_app.capture.structure import CaptureRequestError
from serve_app.engines.batching import Batching
from serve_app.engines.protocol import EngineStoppedError, Sampling
from serve_app.engines.vllm.engine import VllmEngine
from serve_app.engines.vllm.neutrality import check_batching
from tests.serve_app.engines.subjects import EVERY_TAP, Subject, save_tiny, subject
from tests.serve_app.engines.test_both_engines import LONG, assert_rows, forward, plan, wait_for
from tests.serve_app.tiny import Call, run


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """An engine whose KV cache has 384 tokens: vLLM preempts when three sequences grow beyond 128."""
    taps = (*EVERY_TAP, "self_attn.qkv_proj.output")
    with subject("vllm", tmp_path_factory.mktemp("cramped"), max_cache_tokens=384, taps=taps) as started:
        yield started


@pytest.fixture(scope="module")
def cramped_eager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """The same, module by module."""
    with subject("vllm eager", tmp_path_factory.mktemp("eager"), max_cache_tokens=384) as started:
        yield started


@contextmanager
def recorded(engine: VllmEngine) -> Iterator[list[Any]]:
    """Record vLLM's output at the end of each request."""
    client, outputs = engine._client, []

    class Listening:
        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        async def generate(self, *args: Any) -> Any:
            async for output in client.generate(*args):
                if output.finished:
                    outputs.append(output)
                yield output

    engine._client = Listening()
    try:
        yield outputs
    finally:
        engine._client = client


def named(name: str) -> set[psutil.Process]:
    """Processes of vLLM's that this one has started, by the name that they give themselves."""
    return {p for p in psutil.Process().children(recursive=True) if name in " ".join(p.cmdline())}


@pytest.mark.parametrize(("mode", "shared"), [("cramped", 0), ("cramped", 150), ("cramped_eager", 0)])
def test_preempted_requests_keep_exactly_their_rows(mode: str, shared: int, request: pytest.FixtureRequest) -> None:
    """Preempted requests compute rows twice and keep them once; some of their shared rows are cached when they return."""
    cramped: Subject = request.getfixturevalue(mode)
    beginning = [(5 * j) % 90 for j in range(shared)]
    prompts = [beginning + [(11 * i + j) % 90 for j in range(100 + i)] for i in range(6)]
    sampling = Sampling(60, temperature=0, logit_bias=dict.fromkeys(range(94, 257), -100.0))
    policies = ("all", "mean_generated", "last", "all", "mean_prompt", "stride:7")
    asked = [plan(cramped, "resid_post", "resid_mid", positions=policy) for policy in policies]
    calls = [Call(p, sampling, one, stream=True) for p, one in zip(prompts, asked, strict=True)]
    with recorded(cramped.engine) as outputs:
        run(cramped.engine, calls)
    assert any(output.metrics.num_preemptions for output in outputs), "nothing was preempted: the test tests nothing"
    if shared:
        assert any(output.num_cached_tokens for output in outputs)
    for policy, call in zip(policies, calls, strict=True):
        fed = call.job.prompt_ids + call.result().token_ids[:-1]
        expected = forward(cramped, fed)[1]
        wanted = list(Positions.parse(policy).select(len(call.job.prompt_ids), len(fed)))
        expected = {key: values[wanted] for key, values in expected.items()}
        if policy.startswith("mean"):
            expected, wanted = {key: values.mean(0, keepdim=True) for key, values in expected.items()}, [-1]
        positions, rows = cramped.rows(call)
        assert positions == wanted
        assert_rows(rows, expected)
    wait_for(lambda: cramped.engine.storage.n_jobs == 0)


def test_what_is_fused_is_refused_by_name(cramped: Subject) -> None:
    with pytest.raises(CaptureRequestError, match="computes q_proj together with others in qkv_proj"):
        plan(cramped, "self_attn.q_proj.output", layers=(0,))
    fused = plan(cramped, "self_attn.qkv_proj.output", "model.layers.1.output", layers=(0,))
    assert list(fused.taps) == ["layers.0.self_attn.qkv_proj.output", "layers.1.resid_post"]
    call = Call(LONG[0], Sampling(3, temperature=0), fused)
    run(cramped.engine, [call])
    assert cramped.rows(call)[1]["layers.0.self_attn.qkv_proj.output"].shape == (5, 128)


def test_nothing_is_held_of_requests_that_nobody_stores(cramped: Subject) -> None:
    calls = [Call(p, Sampling(60, temperature=0), plan(cramped, "resid_post"), stream=True) for p in LONG]
    for call in calls:
        cramped.engine.submit(call.job)
    wait_for(lambda: any(call.events for call in calls))
    for call in calls:
        call.job.cancelled.set()
    wait_for(lambda: cramped.engine.load.running + cramped.engine.load.waiting == 0)
    done = [call for call in calls if call.events and type(call.events[-1]).__name__ == "Finished"]
    for call in done:
        cramped.rows(call)
    wait_for(lambda: cramped.engine.storage.n_jobs == 0)


@pytest.mark.parametrize(("name", "lost"), [("vllm", "VLLM::EngineCore"), ("vllm on two ranks", "VLLM::Worker_TP1")])
def test_a_lost_process_fails_what_runs_and_is_noticed(name: str, lost: str, tmp_path: Path) -> None:
    others = named(lost)
    with subject(name, tmp_path, eager=True) as started:  # eager, because it starts sooner
        call = Call(LONG[1], Sampling(100, temperature=0, min_tokens=100), plan(started, "resid_post"), stream=True)
        started.engine.submit(call.job)
        wait_for(lambda: bool(call.events))
        (process,) = named(lost) - others
        process.kill()
        with pytest.raises(EngineStoppedError):
            call.result()
        wait_for(lambda: not started.engine.alive)
        with pytest.raises(EngineStoppedError):
            started.engine.submit(replace(call.job))


STARTED = """
import sys, time
from pathlib import Path
from serve_app.engines.vllm import loading
from serve_app.models.model_source import ModelSource
from tests.serve_app.engines.subjects import vllm_settings

if __name__ == "__main__":
    source = ModelSource("tiny", sys.argv[1], "0")
    settings = vllm_settings(Path(sys.argv[2]), eager=True, tensor_parallel_size=int(sys.argv[3]))
    model, engine = loading.start(source, settings)
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_replica_that_is_killed_leaves_no_process(ranks: int, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    script = tmp_path / "started.py"
    script.write_text(STARTED)
    command = [sys.executable, str(script), str(tmp_path / "model"), str(tmp_path / "store"), str(ranks)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as replica:
        assert replica.stdout is not None
        assert any(line == "ready\n" for line in replica.stdout)
        processes = psutil.Process(replica.pid).children(recursive=True)
        assert sum("VLLM::" in " ".join(process.cmdline()) for process in processes) == (1 if ranks == 1 else 1 + ranks)
        os.kill(replica.pid, signal.SIGKILL)
    wait_for(
        lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    )


def test_a_server_that_does_not_capture_is_plain_vllm(tmp_path: Path) -> None:
    """With prefix caching: the second time, the prompt comes from the cache."""
    with subject("vllm", tmp_path, capture=False) as started:
        with pytest.raises(CaptureRequestError):
            started.model.structure.resolve(ActivationRequest(layers=(0,), hook_points=("resid_post",)))
        prompt = [(7 * i) % 90 for i in range(200)]
        with recorded(started.engine) as outputs:
            for _ in range(2):
                (result,) = run(started.engine, [Call(prompt, Sampling(5, temperature=0))])
                assert result.token_ids == started.alone(prompt, 5)
        assert [output.num_cached_tokens for output in outputs] == [0, 192]  # whole blocks of the prompt


class Slow(dict[str, Any]):
    """A table that takes its time to be read."""

    def items(self) -> Any:
        for item in super().items():
            time.sleep(0.02)
            yield item

    def values(self) -> Any:
        return (value for _, value in self.items())


def test_requests_may_come_while_others_are_admitted(cramped: Subject) -> None:
    engine = cramped.engine
    assert isinstance(engine, VllmEngine)
    engine._jobs = Slow(engine._jobs)
    try:
        calls = [Call([1 + number, 2, 3], Sampling(8, temperature=0)) for number in range(12)]
        results = run(engine, calls)
        assert [len(result.token_ids) for result in results] == [8] * len(calls)
    finally:
        engine._jobs = dict(engine._jobs)


class Leaking:
    """vLLM's client, with log-probabilities that the neighbors of a request change."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._running = 0

    async def generate(self, *args: Any) -> AsyncIterator[Any]:
        self._running += 1
        neighbors = 0
        async for output in self._client.generate(*args):
            neighbors = max(neighbors, self._running - 1)
            yield SimpleNamespace(
                outputs=output.outputs,
                prompt_logprobs=[
                    found
                    and {token: SimpleNamespace(logprob=one.logprob + 0.01 * neighbors) for token, one in found.items()}
                    for found in output.prompt_logprobs or []
                ],
            )
        self._running -= 1


def test_requests_share_a_forward_where_neighbors_change_nothing(cramped: Subject) -> None:
    engine = cramped.engine
    assert isinstance(engine, VllmEngine)
    assert engine._batching.kind == "any"


def test_a_model_that_lets_neighbors_in_is_found(cramped: Subject) -> None:
    engine = cramped.engine
    assert isinstance(engine, VllmEngine)
    found = engine._loop.run(lambda: check_batching(Leaking(engine._client), 257, 384, torch.float32))
    assert found.kind == "alone"
    assert "differ by 0.0" in found.reason


def test_requests_that_must_run_alone_wait_for_one_another(cramped: Subject) -> None:
    engine = cramped.engine
    assert isinstance(engine, VllmEngine)
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    most = 0
    client = engine._client

    class Counting:
        def __init__(self) -> None:
            self.running = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        async def generate(self, *args: Any) -> AsyncIterator[Any]:
            nonlocal most
            self.running += 1
            most = max(most, self.running)
            async for output in client.generate(*args):
                yield output
            self.running -= 1

    engine._client, engine._batching = Counting(), Batching("alone")
    try:
        results = run(engine, [Call(prompt, Sampling(12, temperature=0)) for prompt in prompts])
    finally:
        engine._client, engine._batching = client, Batching()
    assert most == 1
    assert [one.token_ids for one in results] == [cramped.alone(prompt, 12) for prompt in prompts]
