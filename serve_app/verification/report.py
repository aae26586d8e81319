"""What a verification found."""

import json
from dataclasses import asdict, dataclass

MAX_ERROR = 1e-4
"""The largest relative error that a row may have in float32."""

MEAN_COSINE, MIN_COSINE = 0.999, 0.99
"""The smallest mean cosine of a hook point's rows at a layer in half precision, and the smallest of any row. A single row may
be further off, because half precision is: SmolLM2-135M alone in bfloat16 has rows whose cosine with float32 is 0.991."""


@dataclass(frozen=True)
class Deviation:
    """How far one hook point's rows at one layer are from those computed alone.

    Attributes:
        key: the stored key.
        hook_point: its hook point.
        layer: its layer, None for a model-wide hook point.
        rows: how many were compared.
        max_error: the largest norm of a row's difference, relative to the row's norm.
        mean_error: the mean of that.
        mean_cosine: the mean cosine between a row and itself computed alone.
        min_cosine: the smallest of them.
    """

    key: str
    hook_point: str
    layer: int | None
    rows: int
    max_error: float
    mean_error: float
    mean_cosine: float
    min_cosine: float


@dataclass(frozen=True)
class Divergence:
    """A greedy choice that differs from the most likely token of the lone forward.

    Attributes:
        request: the request's number.
        index: of the token in the completion.
        chosen: the token that the engine chose.
        expected: the most likely one, alone.
        margin: how much larger its logit is, alone.
        rounding: how large a margin rounding explains.
    """

    request: int
    index: int
    chosen: int
    expected: int
    margin: float
    rounding: float


@dataclass(frozen=True)
class Rollout:
    """What one request was, and how it ended: at its length, at an end-of-text token, at a stop token or string, or not."""

    request: int
    kind: str
    sampling: str
    positions: str
    keys: int
    n_prompt: int
    n_completion: int
    ended: str


@dataclass(frozen=True)
class Report:
    """A verification's result.

    Attributes:
        model: the model's name.
        revision: of its weights.
        dtype: it computes and is captured in.
        device: it ran on.
        together: how many requests were under way at once.
        rollouts: what ran.
        deviations: per stored key.
        divergences: greedy choices that differ.
        max_logprob_error: the largest difference of a token's log-probability.
        problems: what is wrong, in words; empty if nothing is.
    """

    model: str
    revision: str
    dtype: str
    device: str
    together: int
    rollouts: tuple[Rollout, ...]
    deviations: tuple[Deviation, ...]
    divergences: tuple[Divergence, ...]
    max_logprob_error: float
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the captures are what they should be."""
        return not self.problems

    def to_json(self) -> str:
        """Return everything as JSON, the verdict first."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2, ensure_ascii=False)
