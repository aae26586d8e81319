"""Ways to generate the same completions: each is a function of the model, the prompts and the concurrency.

All are greedy and stop where the model stops; each counts the tokens it generated, and records the time from each request's
creation to its first token.
"""

import math
import queue
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import nnsight
import torch
from nnsight.modeling.transformers import TransformersModel
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from benchmarks.workload import capture_plan, capture_request
from roentgen.contract import split_key
from serve_app.capture.probe_scores import RequestProbe
from serve_app.capture.resolver import resolve_structure
from serve_app.capture.rows import CapturePlan
from serve_app.engines.protocol import Engine, Event, Failed, Finished, GenerationJob, Sampling
from serve_app.engines.served_model import ServedModel


@dataclass(frozen=True)
class MeasuredRun:
    """One run of a workload."""

    prompt_tokens: int
    """Tokens of the prompts."""
    tokens: int
    """Generated."""
    seconds: float
    """How long it took."""
    first_token_s: list[float] = field(repr=False)
    """Per request, the seconds until its first token."""
    cached_tokens: int = 0
    """Tokens of the prompts that were found in a prefix cache, where a way tells."""
    between_s: list[float] = field(default_factory=list, repr=False)
    """Per request, the seconds from one token to the next, on average; nothing where a way does not tell."""

    @property
    def rate(self) -> float:
        """Tokens generated per second; reading the prompts is part of the time."""
        return self.tokens / self.seconds


PAGE, BATCH_TOKENS = 256, 512
"""Of transformers' continuous batching: tokens of a page of its cache, and of a forward; the engine's prefills take as many."""

Way = Callable[[list[list[int]], int, int], MeasuredRun]
"""Generates for prompts, at most so many tokens each, with so many in flight."""


class UnavailableError(Exception):
    """A way does not work here; the message says why."""


class OutOfTimeError(Exception):
    """A run was stopped because its deadline had passed."""


Keep = Callable[[list[int], Finished], "Future[Any]"]
"""Stores a prompt's finished completion with its rows; the future completes when both are durable."""


def engine_way(
    engine: Engine,
    model: ServedModel,
    capture: str,
    keep: Keep | None = None,
    deadline: float = math.inf,
    probes: tuple[RequestProbe, ...] = (),
) -> Way:
    """Return one of this project's engines, with one of the captures; whoever finishes makes room for the next.

    Nothing that an earlier run has read is found in the prefix cache: each run has a salt of its own.

    Args:
        engine: which.
        model: what it runs.
        capture: one of `CAPTURES`.
        keep: stores what is captured, within the time that is measured; None leaves it in memory.
        deadline: on the monotonic clock. A run that has not ended by then cancels its requests and raises an
            `OutOfTimeError`; a run that fails cancels them too.
        probes: what every request is scored with.
    """
    plan = capture_plan(model, capture)

    def run(prompts: list[list[int]], max_tokens: int, in_flight: int) -> MeasuredRun:
        events: queue.SimpleQueue[tuple[int, Finished | Failed]] = queue.SimpleQueue()
        made: dict[int, float] = {}
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        jobs: list[GenerationJob] = []

        def submit(number: int) -> None:
            def listen(event: Event) -> None:
                last[number] = time.perf_counter()
                first.setdefault(number, last[number])
                if isinstance(event, Finished | Failed):
                    events.put((number, event))

            made[number] = time.perf_counter()
            sampling = Sampling(max_tokens, temperature=0)
            jobs.append(
                GenerationJob(
                    prompts[number],
                    sampling,
                    listen,
                    plan,
                    stream=True,
                    score_tokens=plan is not None,
                    cache_salt=salt,
                    probes=probes,
                )
            )
            engine.submit(jobs[-1])

        salt = uuid4().hex
        start = time.perf_counter()
        tokens: dict[int, int] = {}
        cached = 0
        kept: list[Future[Any]] = []
        try:
            for number in range(min(in_flight, len(prompts))):
                submit(number)
            for done in range(len(prompts)):
                number, event = _next(events, deadline)
                if isinstance(event, Failed):
                    raise event.error
                if keep is not None and plan is not None:
                    kept.append(keep(prompts[number], event))
                tokens[number] = len(event.token_ids)
                cached += event.cached_tokens
                if done + in_flight < len(prompts):
                    submit(done + in_flight)
        except BaseException:
            for job in jobs:
                job.cancelled.set()  # the engine goes on for whoever runs next
            raise
        for future in kept:
            future.result()
        seconds = time.perf_counter() - start
        return MeasuredRun(
            sum(map(len, prompts)),
            sum(tokens.values()),
            seconds,
            [first[i] - made[i] for i in made],
            cached,
            [(last[i] - first[i]) / max(tokens[i] - 1, 1) for i in made],
        )

    return run


def finish_all(
    engine: Engine,
    requests: Sequence[tuple[list[int], Sampling]],
    plan: CapturePlan | None,
    cache_salt: str | None = None,
) -> list[Finished]:
    """Generate for prompts, all at once, each with settings of its own; returns the results in order.

    Args:
        engine: which.
        requests: prompts and their settings.
        plan: what is captured, None for nothing.
        cache_salt: of all.
    """
    results: list[Future[Finished]] = [Future() for _ in requests]

    def callback(future: "Future[Finished]") -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            if isinstance(event, Finished):
                future.set_result(event)
            elif isinstance(event, Failed):
                future.set_exception(event.error)

        return listen

    for (prompt, sampling), future in zip(requests, results, strict=True):
        engine.submit(GenerationJob(prompt, sampling, callback(future), plan, cache_salt=cache_salt))
    return [future.result() for future in results]


def _next(events: "queue.SimpleQueue[tuple[int, Finished | Failed]]", deadline: float) -> tuple[int, Finished | Failed]:
    """Wait for the next request that ends.

    Raises:
        OutOfTimeError: if the deadline passes first.
    """
    try:
        return events.get(timeout=None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise OutOfTimeError("the time was over") from None


class _Clock(StoppingCriteria):
    """Notes the time of every step, and stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate_way(module: PreTrainedModel, end: frozenset[int]) -> Way:
    """Return transformers' `generate` in static batches: the next batch begins when the whole of the last has ended."""
    device = next(module.parameters()).device
    pad = min(end, default=0)

    def run(prompts: list[list[int]], max_tokens: int, in_flight: int) -> MeasuredRun:
        start = time.perf_counter()
        tokens, first = 0, []
        for begin in range(0, len(prompts), in_flight):
            batch, clock = prompts[begin : begin + in_flight], _Clock()
            width = max(map(len, batch))
            ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch], device=device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=device)
            with torch.inference_mode():
                output = module.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    pad_token_id=pad,
                    stopping_criteria=StoppingCriteriaList([clock]),
                )
            tokens += sum(_length(row, end) for row in output[:, width:].tolist())
            first += [clock.times[0] - start] * len(batch)
        return MeasuredRun(sum(map(len, prompts)), tokens, time.perf_counter() - start, first)

    return run


def _length(tokens: list[int], end: frozenset[int]) -> int:
    """Return how many tokens a row of a static batch generated before it only waited for the others."""
    return next((i + 1 for i, token in enumerate(tokens) if token in end), len(tokens))


def continuous_way(module: PreTrainedModel, end: frozenset[int]) -> Way:
    """Return transformers' own continuous batching."""

    def run(prompts: list[list[int]], max_tokens: int, in_flight: int) -> MeasuredRun:
        config = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=sorted(end) or None)
        pages = -(-(max(map(len, prompts)) + max_tokens) // PAGE)
        start = time.perf_counter()
        results = module.generate_batch(
            prompts,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(
                max_requests_per_batch=in_flight,
                allow_block_sharing=False,
                # By default it takes nine tenths of the memory that is free.
                page_size=PAGE,
                num_blocks=in_flight * (pages + 1),
                max_batch_tokens=BATCH_TOKENS,
            ),
            record_timestamps=True,
        )
        seconds = time.perf_counter() - start
        failed = [result.error for result in results.values() if result.error is not None]
        if failed or len(results) != len(prompts):
            raise UnavailableError(
                f"generate_batch finished {len(results) - len(failed)} of {len(prompts)} requests: {failed[:1]}"
            )
        done = results.values()
        first = [r.timestamps[0] - start for r in done if r.timestamps]
        return MeasuredRun(sum(map(len, prompts)), sum(len(r.generated_tokens) for r in done), seconds, first)

    return run


def seed_way(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Way:
    """Return the way of the tool that came before: one request at a time through nnsight's `generate`.

    At every step it saves what the engine's capture "3x2" keeps.
    """
    structure = resolve_structure(module, "seed")
    request = capture_request(structure.num_layers, "3x2")
    assert request is not None
    wrapped = TransformersModel(module, tokenizer=tokenizer)
    by_layer = sorted(structure.resolve(request).items(), key=lambda item: split_key(item[0])[1] or 0)
    envoys = [_envoy(wrapped, tap.module) for _, tap in by_layer]  # reads must follow the order of the forward
    device = next(module.parameters()).device

    def run(prompts: list[list[int]], max_tokens: int, in_flight: int) -> MeasuredRun:
        if in_flight != 1:
            raise UnavailableError("one request at a time is all it does")
        start = time.perf_counter()
        tokens, first = 0, []
        # An open loop over the steps ends with this warning, by design.
        warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step")
        for prompt in prompts:
            clock, began = _Clock(), time.perf_counter()
            ids = torch.tensor([prompt], device=device)
            criteria = StoppingCriteriaList([clock])
            with (
                torch.inference_mode(),
                wrapped.generate(ids, max_new_tokens=max_tokens, do_sample=False, stopping_criteria=criteria) as tracer,
            ):
                saved = nnsight.save([])
                for _ in tracer.iter[:]:
                    for envoy in envoys:
                        saved.append(envoy.output)
            if len(saved) != len(clock.times) * len(envoys):
                raise UnavailableError(f"{len(saved)} values were saved in {len(clock.times)} steps")
            tokens += len(clock.times)
            first.append(clock.times[0] - began)
        return MeasuredRun(sum(map(len, prompts)), tokens, time.perf_counter() - start, first)

    return run


def _envoy(wrapped: TransformersModel, path: str) -> Any:
    envoy: Any = wrapped
    for part in path.split("."):
        envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
    return envoy


def end_tokens(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end a completion."""
    found = module.generation_config.eos_token_id
    found = tokenizer.eos_token_id if found is None else found
    return frozenset([found] if isinstance(found, int) else found or [])
