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
    """How far one hook point's rows at one layer are from those computed alone."""

    key: str
    """The stored key."""
    hook_point: str
    """Its hook point."""
    layer: int | None
    """Its layer, None for a model-wide hook point."""
    rows: int
    """How many were compared."""
    max_error: float
    """The largest norm of a row's difference, relative to the row's norm."""
    mean_error: float
    """The mean of that."""
    mean_cosine: float
    """The mean cosine between a row and itself computed alone."""
    min_cosine: float
    """The smallest of them."""


@dataclass(frozen=True)
class Divergence:
    """A greedy choice that differs from the most likely token of the lone forward."""

    request: int
    """The request's number."""
    index: int
    """Of the token in the completion."""
    chosen: int
    """The token that the engine chose."""
    expected: int
    """The most likely one, alone."""
    margin: float
    """How much larger its logit is, alone."""
    rounding: float
    """How large a margin rounding explains."""


@dataclass(frozen=True)
class VerifiedRollout:
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
