"""How much a run would store: `roentgen eval --dry-run`.

Prompts are counted by the server's own tokenizer on a few of the problems; of answers, all that is known is how long they may
become, so the estimate is of the most. Later turns of a conversation add only what is new in them: at most `max_tokens` each,
and the tools' answers, which are short.
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
"""Problems whose prompts are tokenized."""

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

SCALE = 4
"""Bytes of the scale of an int8 row."""

DESCRIBED = 13
"""Bytes of the columns that describe a row: its token, position, log-probability, and whether it was generated."""

INDEXED = 7
"""Bytes of the index per token, about: what the whole of GSM8K took (6.9)."""


class _Tokens(BaseModel):
    count: int


@dataclass(frozen=True)
class StorageEstimate:
    """What a run would store."""

    samples: int
    """Samples in all."""
    keys: int
    """Tensors of a rollout: layers × hook points."""
    rows: int
    """Of a rollout, at most."""
    bytes_per_row: int
    """Size of a row of one key."""
    tokens: int
    """Of a rollout, at most."""

    @property
    def index(self) -> int:
        """Bytes of what is stored beside activations, at most."""
        return self.samples * (self.rows * DESCRIBED + self.tokens * INDEXED)

    @property
    def total(self) -> int:
        """Bytes, at most."""
        return self.samples * self.keys * self.rows * self.bytes_per_row + self.index

    def __str__(self) -> str:
        """Spell it, with what makes it less if that is a lot."""
        advice = "; --positions or --layers make it less" if self.total >= 10e9 else ""
        return (
            f"activations: at most {format_bytes(self.total)} ({self.samples} samples × {self.keys} keys × {self.rows} rows × "
            f"{self.bytes_per_row} bytes, and {format_bytes(self.index)} to describe them){advice}"
        )


def estimate(
    settings: EvalSettings, served: ServedModelInfo, endpoint: Endpoint, problems: Sequence[Problem], variants: int
) -> StorageEstimate | None:
    """Return what a run would store; None if it keeps nothing, or the server does not say how wide its model is.

    Args:
        settings: what was asked for.
        served: the model.
        endpoint: the server, a Roentgen server.
        problems: that are posed.
        variants: under how many prefixes.

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
    """Spell a size, `151 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _prompt_tokens(prompt: Prompt, endpoint: Endpoint, model: str, problems: Sequence[Problem]) -> int:
    """Return the tokens of the longest prompt among a few problems, evenly chosen."""
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
        raise FatalRequestError(f"{root}/tokenize does not count tokens: {error}") from error
    return max(counts)
