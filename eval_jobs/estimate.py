"""Estimates how much a run would store, for `roentgen eval --dry-run`.

The server's tokenizer counts the prompt tokens of a few problems. The length of the answers is bounded only by
`max_tokens`, so the estimate is an upper bound. A later turn of a conversation adds at most `max_tokens` tokens and a short
tool reply.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from httpx2 import HTTPError
from pydantic import BaseModel, ValidationError

from eval_jobs.endpoint import Endpoint, FatalRequestError
from eval_jobs.hashed_config import ServedModelInfo
from eval_jobs.problems import Problem
from eval_jobs.prompts import Prompt
from eval_jobs.settings import EvalSettings
from roentgen.contract import MODEL_HOOK_POINTS, Positions
from roentgen.http_client import connect

COUNTED = 8
"""Number of problems whose prompts are tokenized."""

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

SCALE = 4
"""Bytes of an int8 row's scale."""

DESCRIBED = 13
"""Bytes per row of the metadata columns: token, position, log-probability, and whether the token was generated."""

INDEXED = 7
"""Approximate bytes of the index per token; GSM8K took 6.9."""


class _Tokens(BaseModel):
    count: int


@dataclass(frozen=True)
class StorageEstimate:
    """An upper bound on what a run would store."""

    samples: int
    """Number of samples."""
    keys: int
    """Tensors per rollout: layers × hook points."""
    rows: int
    """Maximum per rollout."""
    bytes_per_row: int
    """Bytes of one row of one key."""
    tokens: int
    """Maximum per rollout."""

    @property
    def index(self) -> int:
        """Maximum bytes of everything other than activations."""
        return self.samples * (self.rows * DESCRIBED + self.tokens * INDEXED)

    @property
    def total(self) -> int:
        """Maximum total bytes."""
        return self.samples * self.keys * self.rows * self.bytes_per_row + self.index

    def __str__(self) -> str:
        """Format the estimate, with advice if it is large."""
        advice = "; --positions or --layers reduce it" if self.total >= 10e9 else ""
        return (
            f"activations: at most {format_bytes(self.total)} ({self.samples} samples × {self.keys} keys × {self.rows} rows × "
            f"{self.bytes_per_row} bytes, and {format_bytes(self.index)} to describe them){advice}"
        )


def estimate(
    settings: EvalSettings, served: ServedModelInfo, endpoint: Endpoint, problems: Sequence[Problem], variants: int
) -> StorageEstimate | None:
    """Estimate what a run would store; None if it captures nothing, or the server does not list the model's width.

    Args:
        settings: the settings.
        served: the model.
        endpoint: a Roentgen server.
        problems: the problems.
        variants: the number of prompt prefixes.

    Raises:
        FatalRequestError: if the server cannot count tokens.
    """
    if settings.capture is None or served.d_model is None or served.num_layers is None:
        return None
    dtype = served.dtype or "float32" if settings.store_dtype == "model" else settings.store_dtype
    width = BYTES.get(dtype, 4) * served.d_model + SCALE * (dtype == "int8")
    layers = served.num_layers if settings.layers == "all" else len(settings.layers)
    keys = sum(1 if hook in MODEL_HOOK_POINTS else layers for hook in settings.hook_points)
    n_prompt = _prompt_tokens(settings.chosen_prompt, endpoint, served.id, problems)
    turns = settings.max_turns if settings.mode == "with-tools" else 1
    positions = Positions.parse(settings.positions)
    tokens = n_prompt + turns * settings.max_tokens
    rows = 1 if positions.pooled else len(positions.select(n_prompt, tokens - 1))
    return StorageEstimate(len(problems) * settings.epochs * variants, keys, rows, width, tokens)


def format_bytes(size: float) -> str:
    """Format a size, `151 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _prompt_tokens(prompt: Prompt, endpoint: Endpoint, model: str, problems: Sequence[Problem]) -> int:
    """Return the token count of the longest prompt among a few evenly spaced problems."""
    root = endpoint.urls[0].removesuffix("/v1")
    step = max(1, len(problems) // COUNTED)
    counts = []
    try:
        with connect(root, endpoint.api_key, 60.0) as client:
            for problem in problems[::step][:COUNTED]:
                body = {"model": model, "messages": prompt.messages(problem)}
                reply = client.post("/tokenize", json=body).raise_for_status()
                counts.append(_Tokens.model_validate_json(reply.content).count)
    except (HTTPError, ValidationError) as error:
        raise FatalRequestError(f"{root}/tokenize cannot count tokens: {error}") from error
    return max(counts)
