"""The report of a verification."""

import json
from dataclasses import asdict, dataclass

MAX_ERROR = 1e-4
"""Maximum relative error of a row in float32."""

MEAN_COSINE, MIN_COSINE = 0.999, 0.99
"""Minimum mean cosine of a hook point's rows at a layer in half precision, and minimum cosine of a single row. The latter is
lower, because half precision itself deviates: SmolLM2-135M in bfloat16 has rows whose cosine with float32 is 0.991."""


@dataclass(frozen=True)
class Deviation:
    """Deviation of one hook point's rows at one layer from those computed alone."""

    key: str
    """The stored key."""
    hook_point: str
    """The hook point."""
    layer: int | None
    """The layer; None for a model-wide hook point."""
    rows: int
    """Number of compared rows."""
    max_error: float
    """Maximum norm of a row's difference, relative to the row's norm."""
    mean_error: float
    """Mean of the relative errors."""
    mean_cosine: float
    """Mean cosine between a row and the same row computed alone."""
    min_cosine: float
    """Minimum of these cosines."""


@dataclass(frozen=True)
class Divergence:
    """A greedy choice that differs from the most likely token of the single-request forward pass."""

    request: int
    """The request's number."""
    index: int
    """Index of the token in the completion."""
    chosen: int
    """The token that the engine chose."""
    expected: int
    """The most likely token when run alone."""
    margin: float
    """Difference of the two logits when run alone."""
    rounding: float
    """Maximum margin that rounding explains."""


@dataclass(frozen=True)
class VerifiedRollout:
    """One request and how it ended: by length, end-of-text token, stop token, stop string, error or cancellation."""

    request: int
    kind: str
    sampling: str
    positions: str
    keys: int
    n_prompt: int
    n_completion: int
    ended: str


@dataclass(frozen=True)
class QuantizationEffect:
    """How far a model with quantized weights is from the one that it was made of; it is no fault, and not judged."""

    method: str
    """How the weights are quantized."""
    deviations: tuple[Deviation, ...]
    """Per stored key, of the captured rows from those of plain weights, on the same tokens."""
    positions: int
    """Positions whose next token was compared."""
    other_choices: int
    """Of these, how many have another most likely token."""
    mean_divergence: float
    """The mean Kullback-Leibler divergence of the next token's distribution from that of plain weights, in nats."""


@dataclass(frozen=True)
class VerificationReport:
    """A verification's result."""

    model: str
    """The model's name."""
    revision: str
    """The revision of its weights."""
    dtype: str
    """What it computes in, and is captured in."""
    device: str
    """Where it ran."""
    together: int
    """How many requests were under way at once."""
    rollouts: tuple[VerifiedRollout, ...]
    """What ran."""
    deviations: tuple[Deviation, ...]
    """Per stored key."""
    divergences: tuple[Divergence, ...]
    """Greedy choices that differ."""
    max_logprob_error: float
    """The largest difference of a token's log-probability."""
    problems: tuple[str, ...]
    """What is wrong, in words; empty if nothing is."""
    quantization: QuantizationEffect | None = None
    """What quantizing the weights has changed, None if they were not."""

    @property
    def ok(self) -> bool:
        """Whether the captures are what they should be."""
        return not self.problems

    def to_json(self) -> str:
        """Return everything as JSON, the verdict first."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2, ensure_ascii=False)
