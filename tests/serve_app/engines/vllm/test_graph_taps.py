"""Taps in a compiled graph, tested without vLLM's engine: rows, steering, and the comparison with hooks that finds a wrong
graph.

The model is compiled as vLLM compiles it: one graph for every length. Tests with the engine show that vLLM itself keeps the
taps (`test_both_engines`).
"""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from roentgen.contract import Positions
from serve_app.capture.rows import CapturePlan
from serve_app.capture.steering import SteeringVector
from serve_app.capture.structure import Tap
from serve_app.engines.vllm.collecting import LostRowsError
from serve_app.engines.vllm.graph_runner import GraphBatch
from serve_app.engines.vllm.graph_taps import GraphTaps, Sizes, buffer_bytes
from serve_app.engines.vllm.recorder import RowRecorder
from serve_app.engines.vllm.worker_messages import EXTRA_ARGS_KEY, CaptureRequest, pack

WIDTH, LAYERS, LONGEST, VECTORS = 8, 3, 16, 3
STREAM = {f"layers.{i}.resid_post": Tap(f"model.layers.{i}", "output", plus=1) for i in range(LAYERS)}
BEFORE = {f"layers.{i}.resid_pre": Tap(f"model.layers.{i}", "input", plus=1) for i in range(LAYERS)}
MLP = {"layers.1.mlp_out": Tap("model.layers.1.mlp", "output")}
TAPS = {**STREAM, **BEFORE, **MLP}


class Layer(nn.Module):
    """Like vLLM's modules: the stream is a pair of tensors, which the norms that add them overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else residual.add_(hidden)
        return self.mlp(rms_norm(residual, (WIDTH,))), residual


class Decoder(nn.Module):
    """Compiled when it is called, as vLLM's models are, unless that is switched off."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.do_not_compile = False
        self._compiled = torch.compile(self.forward, backend="aot_eager", dynamic=True, fullgraph=True)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, residual = tokens * 2, None
        for layer in self.layers:
            hidden, residual = layer(torch.arange(len(tokens)), hidden, residual)
        return hidden + residual

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.forward(tokens) if self.do_not_compile else self._compiled(tokens)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()


class Runner:
    """What vLLM's runner does around the taps."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.module = Model().requires_grad_(requires_grad=False)
        self.reference = copy.deepcopy(self.module)
        self.taps = GraphTaps(self.module, TAPS.values(), Sizes(WIDTH, LONGEST, VECTORS))
        self.states: dict[str, Any] = {}
        self.batch = GraphBatch(SimpleNamespace(requests=self.states), self.module, self.taps)

    def begin(self, name: str, prompt: int, *steering: SteeringVector, taps: dict[str, Tap] = TAPS) -> None:
        """Schedule a request for the first time."""
        request = CaptureRequest(f"job {name}", CapturePlan(taps, Positions("all"), "model"), steering)
        params = SimpleNamespace(extra_args={EXTRA_ARGS_KEY: pack(request)})
        self.batch.begin([SimpleNamespace(req_id=name, sampling_params=params, prompt_token_ids=[0] * prompt)])

    def step(self, tokens: dict[str, Tensor], spans: dict[str, range]) -> None:
        self.states.update({name: SimpleNamespace(num_computed_tokens=span.start) for name, span in spans.items()})
        self.batch.scope([(name, len(span)) for name, span in spans.items()])
        self.module.model(torch.cat([tokens[name][span.start : span.stop] for name, span in spans.items()]))
        self.batch.end_step()

    def rows(self, name: str, length: int) -> dict[str, Tensor]:
        rows = self.batch.collector.take(f"job {name}", [0] * length)
        assert rows.position.tolist() == list(range(length))
        return rows.tensors

    def expected(self, tokens: Tensor, added: dict[int, Tensor] | None = None) -> dict[str, Tensor]:
        """Read a request alone in plain PyTorch, adding to the output of some layers' MLP."""
        seen: dict[str, Tensor] = {}
        stream, decoder = tokens * 2, self.reference.model
        for number, layer in enumerate(decoder.layers):
            seen[f"layers.{number}.resid_pre"] = stream
            given = layer.mlp(rms_norm(stream, (WIDTH,))) + (added or {}).get(number, torch.zeros(WIDTH))
            seen[f"layers.{number}.mlp_out"] = given
            stream = seen[f"layers.{number}.resid_post"] = stream + given
        return {key: seen[key] for key in TAPS}


STEPS: list[dict[str, range]] = [
    {"a": range(5), "b": range(4), "other": range(3)},
    {"a": range(5, 6), "other": range(3, 4), "b": range(4, 5)},
    {"b": range(5, 6)},
    {"a": range(6, 7), "b": range(6, 7)},
]
TOKENS = {name: torch.randn(length, WIDTH) for name, length in {"a": 7, "b": 7, "other": 4}.items()}


@pytest.fixture
def runner() -> Runner:
    return Runner()


def assert_rows(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, values in found.items():
        torch.testing.assert_close(values, expected[key], msg=key)


def test_rows_are_those_of_a_forward_of_each_request(runner: Runner) -> None:
    runner.begin("a", 5)
    runner.begin("b", 4)
    for spans in STEPS:
        runner.step(TOKENS, spans)
    for name in ("a", "b"):
        assert_rows(runner.rows(name, 7), runner.expected(TOKENS[name]))


def test_requests_that_name_hook_points_in_another_order_have_their_own_rows(runner: Runner) -> None:
    """Also when the one that was first in the steps has ended."""
    runner.begin("a", 5)
    runner.begin("b", 4, taps=dict(reversed(TAPS.items())))
    for spans in STEPS:
        runner.step(TOKENS, spans)
    rows = runner.rows("b", 7)
    assert list(rows) == list(reversed(TAPS))
    assert_rows(rows, runner.expected(TOKENS["b"]))


def test_what_is_added_reaches_what_follows_and_nobody_else(runner: Runner) -> None:
    """Two vectors at one hook point, at different tokens; a later step without steering adds nothing."""
    first, second = torch.randn(WIDTH), torch.randn(WIDTH)
    key, tap = "layers.1.mlp_out", MLP["layers.1.mlp_out"]
    steering = [
        SteeringVector(key, tap, first, Positions("all")),
        SteeringVector(key, tap, second, Positions("generated")),
    ]
    runner.begin("a", 5)
    runner.begin("b", 4, *steering)
    for spans in STEPS:
        runner.step(TOKENS, spans)
    added = torch.stack([first] * 4 + [first + second] * 3)
    assert_rows(runner.rows("a", 7), runner.expected(TOKENS["a"]))
    assert_rows(runner.rows("b", 7), runner.expected(TOKENS["b"], {1: added}))
    runner.begin("c", 5)
    runner.step({"c": TOKENS["a"]}, {"c": range(5)})
    assert_rows(runner.rows("c", 5), runner.expected(TOKENS["a"][:5]))


def test_more_vectors_than_there_is_room_for_fail_their_step_only(runner: Runner) -> None:
    key, tap = "layers.1.mlp_out", MLP["layers.1.mlp_out"]
    names = [str(number) for number in range(VECTORS + 1)]
    for name in names:
        runner.begin(name, 2, SteeringVector(key, tap, torch.randn(WIDTH), Positions("all")))
    runner.step(dict.fromkeys(names, TOKENS["a"]), dict.fromkeys(names, range(2)))
    for name in names:
        with pytest.raises(LostRowsError, match="4 different vectors are too many; there is room for 3"):
            runner.rows(name, 2)
    runner.begin("fine", 2)
    runner.step({"fine": TOKENS["a"]}, {"fine": range(2)})
    assert_rows(runner.rows("fine", 2), runner.expected(TOKENS["a"][:2]))


def compare(runner: Runner) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Run the same tokens under hooks, and in two steps in the graph; returns the rows of hooks and the errors of taps."""
    runner.batch.start_recording([RowRecorder(TAPS)])
    runner.step(TOKENS, {"a": range(5)})
    (seen,) = runner.batch.stop_recording()
    runner.step(TOKENS, {"a": range(4)})
    runner.step(TOKENS, {"a": range(4, 5)})
    return seen.seen(), runner.batch.errors()


def test_taps_show_what_hooks_do(runner: Runner) -> None:
    seen, errors = compare(runner)
    assert_rows(seen, runner.expected(TOKENS["a"][:5]))
    assert errors.keys() == {str(tap) for tap in TAPS.values()}
    assert max(errors.values()) < 1e-5
    assert runner.module.model.do_not_compile is False
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in runner.module.modules())


@pytest.mark.parametrize("wrong", ["stale", "of another token"])
def test_a_graph_that_writes_elsewhere_is_found(runner: Runner, wrong: str) -> None:
    """The control of the test before: one tap's buffer is not the one that the graph fills, or lies shifted by a row."""
    layer = runner.module.model.layers[1]
    runner.step(TOKENS, {"a": range(5)})  # compiled: from here on the graph fills the buffer that it has now
    name = next(name for name in layer._buffers if name.startswith("roentgen_rows"))
    filled = layer._buffers[name]
    (tap,) = (tap for tap in TAPS.values() if runner.taps.rows(tap, 1).data_ptr() == filled.data_ptr())
    show = runner.taps.rows
    elsewhere = {"stale": torch.zeros(LONGEST, WIDTH), "of another token": filled.roll(1, 0)}[wrong]
    runner.taps.rows = lambda at, n: (elsewhere if at == tap else show(at, n))[:n]
    _, errors = compare(runner)
    assert errors.pop(str(tap)) > 0.5
    assert max(errors.values()) < 1e-5


def test_what_the_buffers_take_is_told(runner: Runner) -> None:
    held = {buffer.data_ptr(): buffer for buffer in runner.module.buffers() if buffer.is_floating_point()}
    told = buffer_bytes(runner.module, TAPS.values(), Sizes(WIDTH, LONGEST, VECTORS))
    assert told == sum(buffer.nbytes for buffer in held.values()) == (len(TAPS) * LONGEST + VECTORS + 1) * WIDTH * 4
