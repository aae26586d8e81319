"""Throughput, cost of capturing, memory, and bandwidth to the host.

At each concurrency, the engine generates without capture, with two norms of three layers, and with every layer's residual
stream, alternately over several rounds. Each run's throughput is compared with that of the run without capture in the same
round.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median

import psutil
import torch
from torch import Tensor

from benchmarks.gpu_rows import release
from benchmarks.paired_statistics import Interval, ratios
from benchmarks.ways import MeasuredRun, OutOfTimeError, engine_way
from benchmarks.workload import CAPTURES, capture_plan
from serve_app.capture.row_memory import RowMemory
from serve_app.engines.protocol import RequestTooLargeError
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel

PROMPT_TOKENS = (64, 192)
"""The least and the most tokens of a prompt: a GSM8K question in a chat template has about 130."""

WARM_UP_TOKENS = 3
"""Tokens generated per prompt before anything is timed: kernels are loaded, and memory is taken, by the first run."""

COPIES = 8
"""Blocks that are copied in a row."""

COPY_BYTES = (1 << 20, 16 << 20, 256 << 20)
"""Sizes of copied blocks: one decode step's rows with three layers, with every layer, and a prefill's."""


@dataclass(frozen=True)
class SpeedArm:
    """What the engine reached with one capture."""

    capture: str
    """One of `CAPTURES`."""
    rates: tuple[float, ...] = ()
    """Tokens generated per second, by round; reading the prompts is part of the time."""
    ratio: Interval | None = None
    """Of the rates to those without capture; None for those themselves."""
    first_token_s: float = 0.0
    """The median time to a request's first token, in the last round."""
    tokens: int = 0
    """Generated in a round."""
    prompt_tokens: int = 0
    """Tokens of the prompts that are read in a round."""
    rows_per_step: float = 0.0
    """How many requests a step decoded together, on average."""
    captured_bytes: int = 0
    """Rows of a round."""
    device_bytes: int | None = None
    """The most memory of tensors on the GPU, weights included; None on a CPU."""
    pinned_bytes: int | None = None
    """The most pinned memory of the process so far, as torch's allocator holds it; None on a CPU."""
    host_bytes: int = 0
    """The process's resident memory after the last round."""
    skipped: str = ""
    """Why there is nothing of it: "did not fit: …" or "not run: …"."""

    @property
    def rate(self) -> float:
        """The median rate."""
        return median(self.rates) if self.rates else 0.0


@dataclass(frozen=True)
class Group:
    """The arms with one number of requests in flight."""

    model: str
    in_flight: int
    arms: tuple[SpeedArm, ...]


@dataclass(frozen=True)
class Copy:
    """How fast blocks of one size go from the device to the host, in bytes per second."""

    nbytes: int
    """Size of a block."""
    capture: float
    """As the capture sends them: into pinned memory of torch's cache, on a stream of its own."""
    first: float
    """The same the first time, when that memory has to be taken from the system."""
    pinned: float
    """Into pinned memory that is there already, on the stream of the computation."""
    pageable: float
    """With `Tensor.cpu()`."""


class DidNotFitError(Exception):
    """The device's memory, or the host's, was too small."""


@contextmanager
def fitting() -> Iterator[None]:
    """Turn what says that memory was too small into a `DidNotFitError`."""
    try:
        yield
    except (torch.OutOfMemoryError, RequestTooLargeError, MemoryError) as error:
        # Only the words: the error itself holds the frames, and with them the tensors.
        raise DidNotFitError((str(error).splitlines() or [type(error).__name__])[0]) from None


def random_prompts(vocab_size: int, count: int) -> list[list[int]]:
    """Return prompts of random tokens and lengths."""
    source = random.Random(0)
    return [[source.randrange(vocab_size - 1) for _ in range(source.randint(*PROMPT_TOKENS))] for _ in range(count)]


def measure_group(
    model: LoadedModel,
    in_flight: int,
    *,
    max_tokens: int,
    rounds: int,
    more_until: float,
    deadline: float,
    stage: Callable[[str], None],
) -> Group:
    """Measure one number of requests in flight.

    Args:
        model: what generates.
        in_flight: requests at once.
        max_tokens: to generate per prompt.
        rounds: the most rounds.
        more_until: on the monotonic clock: no further round begins that would not end before.
        deadline: on the monotonic clock: what has not ended by then is not run.
        stage: told what is being done.
    """
    release()  # the engine plans with the memory that is free
    prompts = random_prompts(model.vocab_size, in_flight if in_flight > 1 else 3)
    engine = TransformersEngine(model, max_batch=in_flight, max_queue=len(prompts), prefix_cache=False)
    runs: dict[str, list[_Measured]] = {capture: [] for capture in CAPTURES}
    skipped: dict[str, str] = {}
    try:
        for number in range(rounds):
            began = time.monotonic()
            for capture in CAPTURES[:: -1 if number % 2 else 1]:
                if capture in skipped:
                    continue
                try:
                    with fitting():
                        if number == 0:
                            engine_way(engine, model, capture, deadline=deadline)(prompts, WARM_UP_TOKENS, in_flight)
                        runs[capture].append(
                            _measured(engine, model, capture, prompts, max_tokens, in_flight, deadline)
                        )
                except DidNotFitError as error:
                    skipped[capture] = f"did not fit: {error}"
                except OutOfTimeError:
                    skipped[capture] = "not run: the time was over before its first round had ended"
                else:
                    stage(f"{model.source.name}, {in_flight} in flight, {capture}: {runs[capture][-1].run.rate:,.1f}/s")
                _settle(engine, deadline)
            now = time.monotonic()
            if now + (now - began) > more_until:
                break
    finally:
        engine.close()
    # A round that was cut short compares with nothing.
    whole = min((len(found) for found in runs.values() if found), default=0)
    base = [found.run.rate for found in runs["none"][:whole]]
    return Group(
        model.source.name,
        in_flight,
        tuple(_arm(model, capture, runs[capture][:whole], base, skipped.get(capture, "")) for capture in CAPTURES),
    )


@dataclass(frozen=True)
class _Measured:
    run: MeasuredRun
    rows_per_step: float
    device_bytes: int | None
    pinned_bytes: int | None
    host_bytes: int


def _measured(
    engine: TransformersEngine,
    model: LoadedModel,
    capture: str,
    prompts: list[list[int]],
    max_tokens: int,
    in_flight: int,
    deadline: float,
) -> _Measured:
    """Run once, and read the memory."""
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
    before = engine.load.steps
    run = engine_way(engine, model, capture, deadline=deadline)(prompts, max_tokens, in_flight)
    steps = {size: count - before.get(size, 0) for size, count in engine.load.steps.items()}
    return _Measured(
        run=run,
        rows_per_step=sum(size * count for size, count in steps.items()) / max(1, sum(steps.values())),
        device_bytes=torch.cuda.max_memory_allocated(model.device) if cuda else None,
        pinned_bytes=torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) if cuda else None,
        host_bytes=psutil.Process().memory_info().rss,
    )


def _arm(model: LoadedModel, capture: str, found: list[_Measured], base: list[float], skipped: str) -> SpeedArm:
    if not found:
        return SpeedArm(capture, skipped=skipped or "not run: the time was over")
    plan, last = capture_plan(model, capture), found[-1]
    rates = tuple(measured.run.rate for measured in found)
    fed = last.run.prompt_tokens + last.run.tokens - len(last.run.first_token_s)
    row_bytes = model.structure.d_model * model.dtype.itemsize
    return SpeedArm(
        capture=capture,
        rates=rates,
        ratio=ratios(rates, base) if capture != "none" and len(base) == len(rates) else None,
        first_token_s=median(last.run.first_token_s),
        tokens=last.run.tokens,
        prompt_tokens=last.run.prompt_tokens,
        rows_per_step=last.rows_per_step,
        captured_bytes=fed * len(plan.taps) * row_bytes if plan else 0,
        device_bytes=last.device_bytes,
        pinned_bytes=last.pinned_bytes,
        host_bytes=last.host_bytes,
    )


def _settle(engine: TransformersEngine, deadline: float) -> None:
    """Wait until a run's last requests have left the engine."""
    while (engine.load.running or engine.load.waiting) and time.monotonic() < deadline:
        time.sleep(0.01)


def measure_copies(device: torch.device, sizes: tuple[int, ...] = COPY_BYTES) -> list[Copy]:
    """Measure copies from a GPU to the host, and check that what arrives is what was sent.

    Raises:
        ValueError: if a copy is not what was sent.
        DidNotFitError: if a block does not fit.
    """
    with fitting():
        return [_copies(device, size) for size in sizes]


def _copies(device: torch.device, nbytes: int) -> Copy:
    memory = RowMemory()
    blocks = [torch.randint(-100, 100, (nbytes // 4,), dtype=torch.int32, device=device) for _ in range(COPIES)]
    there = [torch.empty(block.shape, dtype=block.dtype, pin_memory=True) for block in blocks]

    def as_captured() -> list[Tensor]:
        sent = [memory.to_host(block) for block in blocks]
        for _, copied in sent:
            if copied is not None:
                copied.synchronize()
        return [host for host, _ in sent]

    def pinned() -> list[Tensor]:
        for host, block in zip(there, blocks, strict=True):
            host.copy_(block, non_blocking=True)
        torch.cuda.synchronize(device)
        return there

    def timed(copy: Callable[[], list[Tensor]]) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        arrived = copy()
        seconds = time.perf_counter() - start
        for host, block in zip(arrived, blocks, strict=True):
            if not torch.equal(host, block.cpu()):
                raise ValueError(f"a block of {nbytes:,} bytes did not arrive as it was sent")
        return len(blocks) * nbytes / seconds

    first = timed(as_captured)
    return Copy(
        nbytes=nbytes,
        capture=max(timed(as_captured) for _ in range(3)),
        first=first,
        pinned=max(timed(pinned) for _ in range(3)),
        pageable=max(timed(lambda: [block.cpu() for block in blocks]) for _ in range(3)),
    )


def group_json(group: Group) -> dict[str, object]:
    """Return a group for a JSON file, with each arm's median rate."""
    arms = [asdict(arm) | {"rate": arm.rate} for arm in group.arms]
    return {"in_flight": group.in_flight, "arms": arms}
