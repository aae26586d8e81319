"""Hook points in graphs that are replayed: nnsight's taps, vLLM's breakable recording and this observer, without CUDA.

All of it is real but the graph. Where a GPU would launch its kernels again, the operations recorded are run again, into the
tensors that they first gave: to what is around it, that is a CUDA graph. No module's Python runs in a replay.
"""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nnsight import Envoy
from nnsight.modeling.vllm.batching import VLLMBatcher
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture

from roentgen.contract import Positions
from serve_app.capture.rows import CapturePlan, UncapturableError
from serve_app.capture.steering import Addition
from serve_app.capture.structure import Tap
from serve_app.engines.vllm.collecting import Collector
from serve_app.engines.vllm.observer import BatchInterleaver, BatchWorkers, location
from serve_app.engines.vllm.orders import EXTRA, Order, pack

WIDTH, LAYERS, GRAPH_ROWS = 8, 3, 6
STREAM = {f"layers.{i}.resid_post": Tap(f"model.layers.{i}", "output", plus=1) for i in range(LAYERS)}
INNER = {"inner": Tap("model.layers.1.mlp", "output")}


class Recording(TorchDispatchMode):
    """Takes down every operation, with its results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, tree_leaves(results)))
        return results


class Graph:
    """What stands for `torch.cuda.CUDAGraph`."""

    def capture_begin(self, pool: Any = None) -> None:
        self._recording = Recording()
        self._recording.__enter__()

    def capture_end(self) -> None:
        self._recording.__exit__(None, None, None)

    def replay(self) -> None:
        for func, args, kwargs, first in self._recording.operations:
            for old, new in zip(first, tree_leaves(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Layer(nn.Module):
    """As vLLM's are: the stream comes and goes in two parts, and is overwritten by what adds them up and normalizes."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        residual.add_(hidden)
        return self.mlp(rms_norm(residual, (WIDTH,))), residual


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, residual = tokens * 2, torch.zeros_like(tokens)
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return residual.add_(hidden)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)


class Runner:
    """What vLLM's runner and nnsight's do around the observer: a graph recorded at the start, then steps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = Model().requires_grad_(requires_grad=False)
        self.reference = copy.deepcopy(self.module)
        self.model = Envoy(self.module, interleaver=BatchInterleaver([location(tap) for tap in STREAM.values()]))
        self.model.interleaver.batcher = VLLMBatcher(None)
        self.states: dict[str, Any] = {}
        self.collector = Collector()
        self.workers = BatchWorkers(lambda: self.states, self.collector)
        self.buffer = torch.zeros(GRAPH_ROWS, WIDTH)
        with self.model.interleaver as interleaver:
            interleaver.busy = True
            with BreakableCUDAGraphCapture() as self.graph:
                self.output = self.module(self.buffer)
        assert self.graph.num_eager_breaks == LAYERS

    @property
    def calls(self) -> int:
        """How often a layer's Python has run."""
        return self.module.model.layers[0].calls

    def begin(self, name: str, prompt: int, order: Order) -> None:
        """Schedule a request for the first time."""
        params = SimpleNamespace(extra_args={EXTRA: pack(order)})
        self.workers.add([SimpleNamespace(req_id=name, sampling_params=params, prompt_token_ids=[0] * prompt)], {})

    def step(self, tokens: dict[str, Tensor], spans: dict[str, range]) -> dict[str, Tensor]:
        """Run a step of requests' spans: by the graph if it is large enough; returns the model's output."""
        packed = torch.cat([tokens[name][span.start : span.stop] for name, span in spans.items()])
        self.states.update({name: SimpleNamespace(num_computed_tokens=span.start) for name, span in spans.items()})
        lengths = {name: len(span) for name, span in spans.items()}
        self.model.interleaver.mediators = []
        with self.model.interleaver:
            self.workers.scope(self.model, list(lengths.items()))
            self.observed = set(self.model.interleaver.observers)
            if len(packed) <= GRAPH_ROWS:
                self.buffer.fill_(torch.nan)[: len(packed)] = packed
                self.graph.replay()
                output = self.output[: len(packed)].clone()
            else:
                output = self.module(packed)
        self.workers.end_step()
        return dict(zip(lengths, output.split(list(lengths.values())), strict=True))

    def expected(self, tokens: Tensor, add: dict[int, Tensor] | None = None) -> dict[str, Tensor]:
        """Read a request alone, with PyTorch's hooks, adding to some layers' output."""
        seen: dict[str, Tensor] = {}
        hooks = []
        for number, layer in enumerate(self.reference.model.layers):

            def look(_: Any, __: Any, output: tuple[Tensor, Tensor], number: int = number) -> None:
                if add and number in add:
                    output[0].add_(add[number])
                seen[f"layers.{number}.resid_post"] = output[0] + output[1]

            hooks.append(layer.register_forward_hook(look))
        seen["output"] = self.reference(tokens)
        for hook in hooks:
            hook.remove()
        return seen


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return Runner()


def plan(taps: dict[str, Tap]) -> CapturePlan:
    return CapturePlan(taps, Positions("all"), "model")


STEPS: list[dict[str, range]] = [
    {"a": range(5), "b": range(4), "other": range(3)},  # larger than the graph: eager
    {"a": range(5, 6), "other": range(3, 4), "b": range(4, 5)},
    {"b": range(5, 6)},
    {"a": range(6, 7), "b": range(6, 7)},
    {"c": range(5)},  # a prompt in the graph
    {"c": range(5, 6), "a": range(7, 8)},
]
LENGTHS = {"a": 8, "b": 7, "c": 6, "other": 4}


def test_rows_of_replayed_steps_are_those_of_a_forward_of_each_request(runner: Runner) -> None:
    tokens = {name: torch.randn(length, WIDTH) for name, length in LENGTHS.items()}
    said: dict[str, list[Tensor]] = {name: [] for name in LENGTHS}
    for name, prompt in (("a", 5), ("b", 4), ("c", 5)):
        runner.begin(name, prompt, Order(f"job {name}", plan(STREAM)))
    calls = runner.calls
    for spans in STEPS:
        for name, output in runner.step(tokens, spans).items():
            said[name].append(output)
    assert runner.calls == calls + 1, "more than the first step ran the model's Python: nothing is tested of replays"
    for name, length in LENGTHS.items():
        expected = runner.expected(tokens[name])
        torch.testing.assert_close(torch.cat(said[name]), expected["output"])
        if name != "other":
            rows = runner.collector.take(f"job {name}", length)
            assert rows.position.tolist() == list(range(length))
            for key in STREAM:
                torch.testing.assert_close(rows.tensors[key], expected[key])


def test_what_is_added_at_a_tap_reaches_what_follows_in_the_graph(runner: Runner) -> None:
    tokens = {name: torch.randn(length, WIDTH) for name, length in LENGTHS.items()}
    vector = torch.randn(WIDTH)
    key = "layers.0.resid_post"
    steering = (Addition(key, STREAM[key], vector, Positions("all")),)
    for name, prompt in (("a", 5), ("b", 4)):
        runner.begin(name, prompt, Order(f"job {name}", plan(STREAM), steering if name == "b" else ()))
    said: dict[str, list[Tensor]] = {name: [] for name in LENGTHS}
    for spans in STEPS[:4]:
        for name, output in runner.step(tokens, spans).items():
            said[name].append(output)
    for name, length, add in (("a", 7, None), ("b", 7, {0: vector})):
        expected = runner.expected(tokens[name][:length], add)
        torch.testing.assert_close(torch.cat(said[name]), expected["output"])
        rows = runner.collector.take(f"job {name}", length)
        for key in STREAM:
            torch.testing.assert_close(rows.tensors[key], expected[key])


def test_a_rank_that_keeps_nothing_sees_and_steers_as_the_others(runner: Runner) -> None:
    """It must come to every tap, to gather there with the others; no copy is made of what it sees."""
    tokens = {name: torch.randn(length, WIDTH) for name, length in LENGTHS.items()}
    vector, key = torch.randn(WIDTH), "layers.1.resid_post"
    runner.begin("a", 5, Order("job a", plan(STREAM), (Addition(key, STREAM[key], vector, Positions("all")),)))
    runner.workers.keeps = False
    expected = runner.expected(tokens["a"][:6], {1: vector})["output"]
    for span in (range(5), range(5, 6)):
        said = runner.step(tokens, {"a": span})["a"]
        torch.testing.assert_close(said, expected[span.start : span.stop])
        assert runner.observed == {location(tap) for tap in STREAM.values()}
    with pytest.raises(UncapturableError):
        runner.collector.take("job a", 6)


def test_what_is_no_tap_is_read_nowhere_and_fails_who_asked_alone(runner: Runner) -> None:
    """Neither in a replay nor in an eager step: a request must not have the rows of some of its steps."""
    tokens = {name: torch.randn(length, WIDTH) for name, length in LENGTHS.items()}
    runner.begin("a", 5, Order("job a", plan(STREAM)))
    runner.begin("b", 4, Order("job b", plan({**STREAM, **INNER})))
    for spans in STEPS[:3]:
        runner.step(tokens, spans)
    rows = runner.collector.take("job a", 6)
    for key, values in runner.expected(tokens["a"][:6]).items():
        if key in STREAM:
            torch.testing.assert_close(rows.tensors[key], values)
    with pytest.raises(UncapturableError, match="inner"):
        runner.collector.take("job b", 6)
