"""Checks the engine's rows of a changing batch against a teacher-forced forward pass on the same device.

Requests of different lengths, with sampling and different position policies, join and leave a batch that is smaller than
their number; one is canceled. The tokens of each finished request are then fed alone through the same weights, recreated
from the same seed: one sequence, no cache, no padding, transformers' own attention, plain PyTorch hooks at modules listed
here. That forward pass runs twice, in the model's dtype and in float32.

In bfloat16 two correct implementations differ, and neither is a reference for the other. So the float32 pass is the
reference: the error of an engine's row may be at most `MARGIN` times the largest error of the plain pass in the model's
dtype at the same hook point, and the mean error of a hook point at most `MEAN_MARGIN` times the plain mean. A row of
another position has a larger error than that. How much larger is measured too, and a check that could not distinguish such
a row from rounding fails, because it would prove nothing.
"""

import gc
import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from benchmarks.ways import OutOfTimeError
from benchmarks.workload import Workload
from roentgen.contract import Positions, stored_key
from serve_app.capture.rows import CapturePlan
from serve_app.engines.protocol import Event, Failed, Finished, GenerationJob, Sampling
from serve_app.engines.served_model import ServedModel
from serve_app.engines.transformers.engine import TransformersEngine

IN_LAYER = {
    "resid_pre": ("", "input"),
    "ln_attn": ("input_layernorm", "output"),
    "attn_out": ("self_attn", "output"),
    "resid_mid": ("post_attention_layernorm", "input"),
    "ln_mlp": ("post_attention_layernorm", "output"),
    "mlp_out": ("mlp", "output"),
    "resid_post": ("", "output"),
}
"""Where a Llama layer has its hook points: a module within the layer, and its side."""

IN_MODEL = {"embed": ("model.embed_tokens", "output"), "final_norm": ("model.norm", "output")}

MARGIN, MEAN_MARGIN = 3.0, 1.5
"""How many times the plain forward's error the engine's may be: at worst, and on average over a key's rows."""

FLOOR = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""The least error that is allowed: 1e-4 as everywhere in the tests, two machine epsilons in half precision."""

PROMPTS = (24, 5, 90, 300, 1, 33, 150, 2, 64, 260, 7, 41, 12, 75, 3, 128)
COMPLETIONS = (16, 40, 3, 12, 24, 1, 9, 33, 20, 5, 28, 7, 14, 2, 36, 11)
"""Tokens of the requests' prompts, and the most of their completions."""

POSITIONS = ("all", "all", "generated", "all", "mean_generated", "all", "mean_prompt", "all", "last", "all", "stride:3")
"""Which rows the requests keep, in turn; every fifth one from the third on keeps nothing."""

CANCELED = 7
"""The request that is canceled after its second token."""

FOR_MEANS = 30
"""Rows from which their average error is judged."""

MAX_BATCH = 6
PREFILL_TOKENS = 128
"""Smaller than usual, so that a long prompt is read in pieces while others generate."""

LISTED = 20
"""Wrong rows are listed by request and key, at most so many."""


@dataclass(frozen=True)
class RowRequest:
    """One request of the batch; `plan` is what it captures, None for nothing."""

    number: int
    prompt_ids: list[int]
    sampling: Sampling
    plan: CapturePlan | None


@dataclass(frozen=True)
class KeyErrors:
    """What the rows of one key differ by, relative to their length."""

    key: str
    """The stored key."""
    pooled: bool
    """Whether the rows are averages over positions."""
    rows: int
    """How many were compared."""
    engine: float
    """The engine's from the float32 forward's, at worst."""
    plain: float
    """Those of the plain forward in the model's dtype from the float32 forward's, at worst."""
    apart: float
    """The engine's from those of the plain forward, at worst."""
    allowed: float
    """What `engine` may be."""
    engine_mean: float
    """The engine's from the float32 forward's, on average."""
    plain_mean: float
    """Those of the plain forward, on average."""
    cosine: float
    """The smallest of a row to the float32 forward's."""
    plain_cosine: float
    """The smallest of the plain forward's."""
    neighbor: float | None
    """The row of the position before, where another token was fed, from the row itself, in the median; None where there is
    none."""


@dataclass(frozen=True)
class WrongRows:
    """Rows of one request and key that are further off than is allowed; a pooled row's position is -1."""

    request: int
    key: str
    positions: list[int]
    of: int
    error: float
    allowed: float

    def __str__(self) -> str:
        return (
            f"request {self.request}, {self.key}: {len(self.positions)} of {self.of} rows are wrong, at positions "
            f"{_spans(self.positions)}; off by up to {self.error:.2e} where {self.allowed:.1e} is allowed"
        )


@dataclass(frozen=True)
class RowCheck:
    """What was found."""

    model: str
    """Its name."""
    dtype: str
    """What it computes in."""
    requests: int
    """How many finished and were compared."""
    rows: int
    """How many were compared, over all keys."""
    steps: dict[int, int]
    """How many steps decoded how many requests together."""
    keys: list[KeyErrors]
    """Per key, what its rows differ by."""
    logprob_error: float
    """The engine's log-probabilities from the float32 forward's, at worst."""
    logprob_allowed: float
    """What that may be."""
    wrong: list[WrongRows]
    """Rows that are wrong."""
    problems: list[str]
    """Everything that is wrong, in words."""


def check_rows(workload: Workload, deadline: float) -> RowCheck:
    """Run the batch and compare its rows; the model is made twice, and gone in between.

    Args:
        workload: a Llama with random weights, and where to run it.
        deadline: on the monotonic clock.

    Raises:
        OutOfTimeError: if the deadline passes first.
    """
    torch.set_float32_matmul_precision("highest")  # the judge must not compute in TensorFloat-32
    device, dtype = workload.place()
    requests, finished, steps, problems = _generate(workload, deadline)
    release()
    module, _ = workload.load_plain()
    comparison = RowComparison(dtype, problems)
    for request in requests:
        if time.monotonic() > deadline:
            raise OutOfTimeError("the time was over")
        if request.number in finished:
            comparison.add(request, finished.pop(request.number), module, device)
    if len([size for size in steps if steps[size]]) < 3:
        comparison.problems.append(f"the batch did not shift: its steps decoded {dict(steps)} (requests: steps)")
    return comparison.judge(workload.random_weights, steps)


def make_requests(model: ServedModel) -> list[RowRequest]:
    """Make the batch's requests; their prompts are random tokens."""
    keys = checked_keys(model.structure.num_layers)
    taps = {key: model.structure.taps[key] for key in keys}
    random = torch.Generator().manual_seed(1)
    requests = []
    for number, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids = torch.randint(model.vocab_size - 1, (prompt,), generator=random).tolist()
        positions = POSITIONS[number % len(POSITIONS)]
        plan = None if number % 5 == 2 else CapturePlan(taps, Positions.parse(positions), "model")
        # Sampled: a model with random weights, left to its most likely token, says the same one again and again.
        sampling = Sampling(completion, min_tokens=completion, temperature=1.0, seed=number)
        requests.append(RowRequest(number, ids, sampling, plan))
    return requests


def checked_keys(num_layers: int) -> list[str]:
    """Return the keys that are compared: all of three layers and of the model, and every layer's residual stream."""
    chosen = {num_layers * part // 4 for part in (1, 2, 3)}
    keys = [
        stored_key(name, layer)
        for layer in range(num_layers)
        for name in IN_LAYER
        if name == "resid_post" or layer in chosen
    ]
    return [*keys, *IN_MODEL]


def release() -> None:
    """Give the device's unused memory back, so that what comes next can have it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if hasattr(torch.accelerator, "empty_host_cache"):
            torch.accelerator.empty_host_cache()  # pinned memory, which would count as used when the next engine plans


def _generate(
    workload: Workload, deadline: float
) -> tuple[list[RowRequest], dict[int, Finished], dict[int, int], list[str]]:
    """Run the batch: the requests, what they gave, the sizes of the steps, and what went wrong."""
    model = workload.load()
    requests = make_requests(model)
    engine = TransformersEngine(model, max_batch=MAX_BATCH, max_queue=len(requests), max_prefill_tokens=PREFILL_TOKENS)
    ends: list[Future[Finished | Failed]] = [Future() for _ in requests]
    finished: dict[int, Finished] = {}
    problems = []
    try:
        for request, end in zip(requests, ends, strict=True):
            engine.submit(_job(request, end))
        for number, end in enumerate(ends):
            if number == CANCELED:
                continue
            try:
                event = end.result(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise OutOfTimeError("the time was over") from None
            if isinstance(event, Failed):
                problems.append(f"request {number} failed: {event.error}")
            else:
                finished[number] = event
        if ends[CANCELED].done():  # the others take longer than it would
            problems.append(f"request {CANCELED} was canceled, and {type(ends[CANCELED].result()).__name__.lower()}")
        steps = dict(engine.load.steps)
    finally:
        engine.close()
    return requests, finished, steps, problems


def _job(request: RowRequest, end: "Future[Finished | Failed]") -> GenerationJob:
    canceled = threading.Event()

    def listen(event: Event) -> None:
        if request.number == CANCELED:
            canceled.set()
        if isinstance(event, Finished | Failed):
            end.set_result(event)

    stream = request.number == CANCELED
    return GenerationJob(request.prompt_ids, request.sampling, listen, request.plan, stream=stream, cancelled=canceled)


class _Rows(NamedTuple):
    """One request's rows of one key: their positions, and how far each is off."""

    request: int
    positions: list[int]
    engine: list[float]
    plain: list[float]
    apart: list[float]
    neighbor: list[float]
    cosine: list[float]
    plain_cosine: list[float]


class RowComparison:
    """Gathers requests, one by one, and judges."""

    def __init__(self, dtype: torch.dtype, problems: list[str]) -> None:
        """Begin without requests; `problems` are those that are known."""
        self._dtype = dtype
        self.problems = problems
        self._rows: dict[tuple[str, bool], list[_Rows]] = defaultdict(list)
        self._logprobs: list[tuple[int, float, float]] = []  # request, the engine's error, the plain forward's
        self._requests = 0

    def add(self, request: RowRequest, finished: Finished, module: nn.Module, device: torch.device) -> None:
        """Compare one request with what its tokens give alone."""
        self._requests += 1
        n_prompt, ids = len(request.prompt_ids), finished.token_ids
        if len(ids) != request.sampling.max_tokens:
            self.problems.append(f"request {request.number} has {len(ids)} tokens, not {request.sampling.max_tokens}")
        fed = request.prompt_ids + ids[:-1]  # the last token was chosen, but never went through the model
        keys = list(request.plan.taps) if request.plan else []
        plain, plain_logits = read_alone(module, fed, keys, device)
        with in_float32(module):
            exact, exact_logits = read_alone(module, fed, keys, device)
        index = torch.tensor(ids, device=device)[:, None]
        right, rounded = (
            logits[n_prompt - 1 :].float().log_softmax(-1).gather(-1, index)[:, 0].tolist()
            for logits in (exact_logits, plain_logits)
        )
        for score, want, near in zip(finished.scores, right, rounded, strict=True):
            self._logprobs.append((request.number, abs(score.logprob - want), abs(near - want)))
        if request.plan is None:
            return
        if finished.captured is None:
            self.problems.append(f"request {request.number} asked for rows and got none")
            return
        kept = list(request.plan.positions.select(n_prompt, len(fed)))
        pooled = request.plan.positions.pooled
        positions = [-1] if pooled else kept
        if finished.captured.position.tolist() != positions:
            self.problems.append(
                f"request {request.number} has rows of positions {_spans(finished.captured.position.tolist())}, "
                f"not {_spans(positions)}"
            )
            return
        differ = [i for i in range(len(positions) - 1) if fed[kept[i]] != fed[kept[i + 1]]]
        for key in keys:
            rows = finished.captured.tensors[key].to(device).float()
            want, near = exact[key][kept].float(), plain[key][kept].float()
            if pooled:
                want, near = want.mean(0, keepdim=True), near.mean(0, keepdim=True)
            if rows.shape != want.shape:
                self.problems.append(
                    f"request {request.number}, {key}: {list(rows.shape)} was kept, not {list(want.shape)}"
                )
                continue
            errors = (distances(rows, want), distances(near, want), distances(rows, near))
            neighbor = distances(want[differ], want[[i + 1 for i in differ]])
            alike = (cosine_similarity(one, want, dim=1).tolist() for one in (rows, near))
            self._rows[key, pooled].append(_Rows(request.number, positions, *errors, neighbor, *alike))

    def judge(self, model: str, steps: dict[int, int]) -> RowCheck:
        """Judge what has been gathered."""
        keys, wrong = [], []
        for (key, pooled), requests in self._rows.items():
            engine, plain, apart, neighbors, cosines, plain_cosines = (
                [error for errors in gathered for error in errors]
                for gathered in zip(*(rows[2:] for rows in requests), strict=True)
            )
            allowed = max(FLOOR[self._dtype], MARGIN * max(plain))
            neighbor = median(neighbors) if neighbors else None
            keys.append(
                KeyErrors(
                    key=key,
                    pooled=pooled,
                    rows=len(engine),
                    engine=max(engine),
                    plain=max(plain),
                    apart=max(apart),
                    allowed=allowed,
                    engine_mean=fmean(engine),
                    plain_mean=fmean(plain),
                    cosine=min(cosines),
                    plain_cosine=min(plain_cosines),
                    neighbor=neighbor,
                )
            )
            for rows in requests:
                bad = [at for at, error in zip(rows.positions, rows.engine, strict=True) if not error <= allowed]
                if bad:
                    wrong.append(WrongRows(rows.request, key, bad, len(rows.engine), max(rows.engine), allowed))
            enough = len(engine) >= FOR_MEANS
            if enough and not keys[-1].engine_mean <= max(FLOOR[self._dtype] / 4, MEAN_MARGIN * keys[-1].plain_mean):
                self.problems.append(
                    f"{key}: rows are off by {keys[-1].engine_mean:.1e} on average, the plain forward's by "
                    f"{keys[-1].plain_mean:.1e}"
                )
            if neighbor is not None and neighbor <= allowed:
                self.problems.append(
                    f"{key}: the check is blind: a row is {neighbor:.1e} from the next, and {allowed:.1e} is allowed"
                )
        if not keys:
            self.problems.append("no row was compared")
        self.problems += [str(rows) for rows in wrong[:LISTED]]
        if len(wrong) > LISTED:
            self.problems.append(f"… and rows of {len(wrong) - LISTED} more pairs of a request and a key")
        allowed = max(FLOOR[self._dtype], MARGIN * max((plain for *_, plain in self._logprobs), default=0.0))
        off = sorted({request for request, error, _ in self._logprobs if not error <= allowed})
        error = max((error for _, error, _ in self._logprobs), default=0.0)
        if off:
            self.problems.append(
                f"requests {_spans(off)}: log-probabilities are off by up to {error:.1e} where {allowed:.1e} is allowed"
            )
        return RowCheck(
            model=model,
            dtype=str(self._dtype).removeprefix("torch."),
            requests=self._requests,
            rows=sum(key.rows for key in keys),
            steps=dict(sorted(steps.items())),
            keys=keys,
            logprob_error=error,
            logprob_allowed=allowed,
            wrong=wrong,
            problems=self.problems,
        )


def read_alone(
    module: nn.Module, fed: Sequence[int], keys: Sequence[str], device: torch.device
) -> tuple[dict[str, Float[Tensor, "tokens d"]], Float[Tensor, "tokens vocab"]]:
    """Run one sequence through a plain Llama, and read keys with PyTorch's hooks; returns the logits too."""
    seen: dict[str, Tensor] = {}
    handles = []
    for key in keys:
        path, side = _place(key)
        part = module.get_submodule(path)

        def before(_module: nn.Module, args: Any, key: str = key) -> None:
            seen[key] = args[0][0].clone()

        def after(_module: nn.Module, _args: Any, output: Any, key: str = key) -> None:
            seen[key] = (output[0] if isinstance(output, tuple) else output)[0].clone()

        handles.append(part.register_forward_pre_hook(before) if side == "input" else part.register_forward_hook(after))
    try:
        with torch.no_grad():
            logits: Tensor = module(input_ids=torch.tensor([list(fed)], device=device), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return seen, logits


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Compute in float32 with the weights as they are, one submodule's at a time in float32, so that any model fits.

    A bfloat16 or float16 number is a float32 number, so the weights are afterwards what they were.
    """
    dtypes: dict[nn.Parameter, torch.dtype] = {p: p.dtype for p in module.parameters()}

    def raise_(part: nn.Module, _args: Any) -> None:
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.float()

    def lower(part: nn.Module, _args: Any, _output: Any) -> None:
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.to(dtypes[parameter])

    handles = []
    for part in module.modules():
        if any(True for _ in part.parameters(recurse=False)):
            handles += [part.register_forward_pre_hook(raise_), part.register_forward_hook(lower)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for part in module.modules():
            lower(part, None, None)


def distances(rows: Float[Tensor, "rows d"], want: Float[Tensor, "rows d"]) -> list[float]:
    """Return how far each row is from the wanted one, relative to that one's length; infinite if it is not a number."""
    difference = (rows - want).norm(dim=1)
    relative: Tensor = torch.where(difference == 0, 0.0, difference / want.norm(dim=1))
    return list(relative.nan_to_num(nan=math.inf).tolist())


def _place(key: str) -> tuple[str, str]:
    """Return the module and side of a key in a Llama."""
    if key in IN_MODEL:
        return IN_MODEL[key]
    _, layer, name = key.split(".")
    path, side = IN_LAYER[name]
    return ".".join(filter(None, (f"model.layers.{layer}", path))), side


def _spans(numbers: Sequence[int]) -> str:
    """Write numbers shortly: `0–3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs) or "none"
