"""Describes which requests may share a forward.

Batching is neutral if a request gets the same values whatever runs beside it. This is true for most models: padding is masked,
and rows do not attend to one another. Some models differ: a recurrent layer may read padding, or a rotary embedding may take
its frequencies from the longest row of the batch. `transformers.load_checks` finds this out when a model is loaded, and
engines then keep such requests apart.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Kind = Literal["any", "one side of a limit", "same length", "alone"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""From the widest to the narrowest."""


@dataclass(frozen=True)
class Batching:
    """Which requests may share a forward."""

    kind: Kind = "any"
    """"any" requests; requests on "one side of a limit" of tokens, so that the longest row of a batch changes nothing;
    requests of the "same length", which need no padding; or each request "alone"."""
    limit: int | None = None
    """The limit in tokens, for "one side of a limit"."""
    reason: str = ""
    """Why the kind is not "any", as text."""

    @property
    def joins(self) -> bool:
        """Whether requests may join a running batch, and prompts be read in pieces."""
        return self.kind in ("any", "one side of a limit")

    def together(self, tokens: int, other: int) -> bool:
        """Whether sequences of these lengths may share a forward.

        Args:
            tokens: length of one sequence, once its prompt is read.
            other: length of the other.
        """
        match self.kind:
            case "any":
                return True
            case "one side of a limit":
                assert self.limit is not None
                return (tokens > self.limit) == (other > self.limit)
            case "same length":
                return tokens == other
            case "alone":
                return False

    def whole(self, tokens: int) -> bool:
        """Whether a prompt of this length must be read in one forward."""
        return not self.joins or (self.limit is not None and tokens > self.limit)

    def record(self) -> dict[str, Any]:
        """Return the fields for the model's card."""
        return {name: value for name, value in asdict(self).items() if value}


ANY = Batching()


@dataclass(frozen=True)
class LoadReport:
    """Results of the checks of a loaded model."""

    batching: Batching = field(default_factory=Batching)
    """Which requests may share a forward."""
    attention: str = "sdpa"
    """"grouped", or the name of the attention implementation that the model keeps."""
    decoding_error: float = 0.0
    """Largest relative error of a request's rows, run alone with its cache, against one forward over the whole sequence; 0 if
    rounding explains it. If it is not 0, the model itself computes them differently."""
    compared_on: tuple[str, ...] = ()
    """Models that were tested."""
    seconds: float = 0.0
    """Duration of the checks."""

    def record(self) -> dict[str, Any]:
        """Return the fields for the model's card."""
        return {
            "batching": self.batching.record(),
            "attention": self.attention,
            "decoding_error": self.decoding_error,
            "compared_on": list(self.compared_on),
            "seconds": round(self.seconds, 2),
        }
