"""A compiled decoding step against the model it was compiled from: tokens, rows, steering, probes, and what disables it."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from roentgen.contract import Positions
from roentgen.linear_probe import LinearProbe
from serve_app.capture.probe_scores import RequestProbe
from serve_app.capture.steering import SteeringVector
from serve_app.engines.protocol import Finished, Sampling
from serve_app.engines.transformers.compiled import compilation
from serve_app.engines.transformers.compiled.graph import NotCompilableError
from serve_app.engines.transformers.compiled.manager import CompiledStepManager
from serve_app.engines.transformers.compiled.step import CompiledStep, observed_modules_of
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.kv_cache import Slots, slots_of
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.engines.transformers.packed_weights import pack_weights
from tests.serve_app import tiny
from tests.serve_app.alone import LLAMA_MODULES, forward_with_hooks, generate_alone, layer_path, plan
from tests.serve_app.tiny import Call, run

PROMPTS = [[5, 6, 7], [10, 11, 12, 13, 14, 15, 16, 17, 18], [40], [3, 1, 4, 1, 5, 9]]
GREEDY = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
PROCESS = "-m serve_app.engines.transformers.compiled "
MORE_ARCHITECTURES = ["qwen3", "gemma3_text", "phi3", "gpt2", "olmo2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of its own, so that the tests use the graphs that they compile."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ROENTGEN_CACHE", str(folder))
        yield folder


def compiled(architecture: str) -> LoadedModel:
    """A tiny model whose step has been compiled by the process that does that, if it was not yet."""
    model = tiny.loaded(architecture)
    module = model.observed._module
    pack_weights(module, 1 << 40)
    wanted = compilation.CompilationSpec.of(module, observed_modules_of(model.structure))
    if not wanted.done:
        process = compilation.Compilation(wanted)
        said = process.wait(300)
        process.end()
        assert wanted.done, said
    return model


@pytest.fixture(scope="module")
def model(cache: Path) -> LoadedModel:
    return compiled("llama")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step had that a graph has run."""
    ran: list[int] = []
    own = CompiledStep.run

    def counted(self: CompiledStep, step: Any, observers: Any) -> torch.Tensor:
        ran.append(len(step.tokens))
        return own(self, step, observers)

    monkeypatch.setattr(CompiledStep, "run", counted)
    return ran


def generated(
    model: LoadedModel, calls: list[Call], before: Callable[[TransformersEngine], None] = lambda _: None
) -> list[Finished]:
    """Run calls on an engine that has its compiled step."""
    engine = TransformersEngine(model, prefix_cache=False)
    try:
        run(engine, [Call([1, 2], replace(GREEDY, max_tokens=3))])
        assert eventually(
            lambda: engine._compiled_steps._loaded is not None or engine._compiled_steps._stopped.is_set()
        )
        run(engine, [Call([1, 2], replace(GREEDY, max_tokens=3))])  # it is checked
        before(engine)
        return run(engine, calls)
    finally:
        engine.close()


def test_tokens_and_rows_are_the_models_own(model: LoadedModel, steps: list[int]) -> None:
    asked = plan(model, "resid_post", "ln_attn", "ln_mlp")
    calls = [Call(prompt, replace(GREEDY, max_tokens=6 + 3 * i), asked) for i, prompt in enumerate(PROMPTS)]
    results = generated(model, calls)
    assert set(steps) >= {1, 2, 3, 4}  # those that finish leave
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == generate_alone(model, prompt, len(result.token_ids))
        assert result.captured is not None
        layers = layer_path(model)
        modules = {
            f"layers.{i}.{name}": (f"{layers}.{i}{LLAMA_MODULES[name][0]}", LLAMA_MODULES[name][1])
            for i in range(3)
            for name in ("resid_post", "ln_attn", "ln_mlp")
        }
        expected = forward_with_hooks(model, prompt + result.token_ids[:-1], modules)
        for key, rows in expected.items():
            torch.testing.assert_close(result.captured.tensors[key], rows, rtol=1e-4, atol=1e-4)


def test_requests_that_look_elsewhere_take_the_models_own_step(model: LoadedModel, steps: list[int]) -> None:
    (result,) = generated(model, [Call(PROMPTS[1], GREEDY, plan(model, "resid_mid"))], lambda _: steps.clear())
    assert not steps
    path = f"{layer_path(model)}.1{LLAMA_MODULES['resid_mid'][0]}"
    expected = forward_with_hooks(model, PROMPTS[1] + result.token_ids[:-1], {"it": (path, "input")})
    assert result.captured is not None
    torch.testing.assert_close(result.captured.tensors["layers.1.resid_mid"], expected["it"], rtol=1e-4, atol=1e-4)


def test_steering_and_probes_see_what_the_models_own_step_shows(model: LoadedModel, steps: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    ((key, tap),) = plan(model, "resid_post", layers=(1,)).taps.items()
    vector = 2 * torch.randn(32, generator=generator)
    weight = torch.randn(1, 32, generator=generator)
    probe = RequestProbe("p", key, tap, LinearProbe(weight, torch.zeros(1), torch.zeros(32), torch.ones(32)), "")

    def calls() -> list[Call]:
        found = [Call(prompt, GREEDY, plan(model, "resid_post")) for prompt in PROMPTS]
        found[0].job = replace(found[0].job, steering=(SteeringVector(key, tap, vector, Positions.parse("all")),))
        for call in found[:2]:
            call.job = replace(call.job, probes=(probe,))
        return found

    fast = generated(model, calls())
    assert steps
    engine = TransformersEngine(model, prefix_cache=False, eager=True)
    plain = run(engine, calls())
    engine.close()
    unsteered = generate_alone(model, PROMPTS[0], 12)
    assert fast[0].token_ids != unsteered
    for mine, own in zip(fast, plain, strict=True):
        assert mine.token_ids == own.token_ids
        assert mine.captured is not None
        assert own.captured is not None
        for name, rows in own.captured.tensors.items():
            torch.testing.assert_close(mine.captured.tensors[name], rows, rtol=1e-4, atol=1e-4)
        for scores, expected in zip(mine.probed, own.probed, strict=True):
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_graph_that_gives_something_else_is_not_used(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    own = CompiledStep.load.__func__

    def mixed_up(cls: type, folder: Path, module: Any, observed_modules: Any) -> CompiledStep:
        step: CompiledStep = own(cls, folder, module, observed_modules)
        linears = list(step.linears)
        linears[0], linears[7] = linears[7], linears[0]  # the queries of two layers
        return replace(step, linears=tuple(linears))

    monkeypatch.setattr(CompiledStep, "load", classmethod(mixed_up))
    monkeypatch.setattr("serve_app.engines.transformers.compiled.manager.shutil.rmtree", lambda *_, **__: None)
    with caplog.at_level(logging.WARNING):
        results = generated(model, [Call(prompt, GREEDY) for prompt in PROMPTS])
    assert "differ by" in caplog.text
    assert [one.token_ids for one in results] == [generate_alone(model, prompt, 12) for prompt in PROMPTS]


def test_a_step_that_fails_is_run_again_by_the_model(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def broken(engine: TransformersEngine) -> None:
        def too_few(cache: Any) -> Slots:
            there = slots_of(cache)
            return replace(there, keys=[keys[:0] for keys in there.keys])

        monkeypatch.setattr("serve_app.engines.transformers.compiled.step.slots_of", too_few)

    with caplog.at_level(logging.WARNING):
        results = generated(model, [Call(prompt, GREEDY) for prompt in PROMPTS], broken)
    assert "a step has failed" in caplog.text
    assert "the slots of layer 0 have another shape" in caplog.text
    assert [one.token_ids for one in results] == [generate_alone(model, prompt, 12) for prompt in PROMPTS]


def test_it_ends_when_weights_may_change(cache: Path, model: LoadedModel, steps: list[int]) -> None:
    fresh = compiled("llama")

    def hand_out(engine: TransformersEngine) -> None:
        assert steps
        steps.clear()
        engine.expect_changed_weights()

    results = generated(fresh, [Call(PROMPTS[0], GREEDY)], hand_out)
    assert not steps
    assert results[0].token_ids == generate_alone(fresh, PROMPTS[0], 12)


def test_a_second_start_compiles_nothing(model: LoadedModel, monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    monkeypatch.setattr(compilation, "Compilation", lambda wanted: pytest.fail("it was compiled already"))
    generated(model, [Call(PROMPTS[0], GREEDY)])
    assert steps


def test_an_engine_can_wait_for_its_graphs(model: LoadedModel, steps: list[int]) -> None:
    engine = TransformersEngine(model, compile_first=True)
    try:
        (result,) = run(engine, [Call(PROMPTS[0], GREEDY)])
    finally:
        engine.close()
    assert steps[:2] == [3, 1]  # the comparison with the model
    assert steps[2:] == [1] * (len(result.token_ids) - 1)  # the first token is the prefill's
    assert result.token_ids == generate_alone(model, PROMPTS[0], 12)


def test_an_engine_that_is_closed_ends_the_process_that_compiles(cache: Path) -> None:
    supply = CompiledStepManager(tiny_packed("mistral"), after_s=0)
    supply.decoded(0.1)
    assert supply.step() is None
    mine = psutil.Process()
    assert eventually(lambda: any(PROCESS in " ".join(child.cmdline()) for child in mine.children()))
    supply.step()  # the engine decodes: what compiles is stopped
    assert eventually(lambda: any(c.status() == psutil.STATUS_STOPPED for c in mine.children()))
    assert eventually(lambda: all(c.status() != psutil.STATUS_STOPPED for c in mine.children()))  # and goes on
    supply.stop()
    assert eventually(lambda: not list((cache / "compiled").glob("*.*/")))  # nor is anything unfinished left
    assert eventually(lambda: not mine.children() or not any(PROCESS in " ".join(c.cmdline()) for c in mine.children()))


def test_a_model_that_cannot_be_exported_says_so_and_runs(cache: Path, caplog: Any) -> None:
    model = tiny_packed("llama")
    object.__setattr__(model.observed._module.config, "hidden_act", "no such activation")
    supply = CompiledStepManager(model, after_s=0)
    supply.decoded(0.1)
    with caplog.at_level(logging.WARNING):
        supply.step()
        assert eventually(lambda: "decoding steps are not compiled" in caplog.text)
    assert supply.step() is None


@pytest.mark.rotating
@pytest.mark.parametrize("architecture", MORE_ARCHITECTURES)
def test_other_architectures_give_the_models_own_values(
    cache: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, options = tiny.CONFIGS[architecture]
    wide = {"head_dim": 16} if "head_dim" in options else {}
    monkeypatch.setitem(tiny.CONFIGS, architecture, (kind, {**options, **wide}))
    model = compiled(architecture)
    module = model.observed._module
    observed_modules = observed_modules_of(model.structure)
    step = CompiledStep.load(compilation.CompilationSpec.of(module, observed_modules).folder, module, observed_modules)
    with torch.inference_mode():
        step.check(module, torch.float32)
        step_wrong = replace(step, linears=step.linears[::-1])
        if len(step.linears) > 1:
            with pytest.raises((NotCompilableError, RuntimeError)):
                step_wrong.check(module, torch.float32)


def tiny_packed(architecture: str) -> LoadedModel:
    model = tiny.loaded(architecture)
    pack_weights(model.observed._module, 1 << 40)
    return model


def eventually(found: Callable[[], bool], within_s: float = 60) -> bool:
    end = time.monotonic() + within_s
    while not found() and time.monotonic() < end:
        time.sleep(0.1)
    return found()
