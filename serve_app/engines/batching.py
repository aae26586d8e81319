"""Which requests may share a forward.

Batching is neutral if a request gets the same values whatever runs beside it. Most models are: padding is masked, and rows do
not see one another. Some are not: a recurrent layer may read padding, a rotary embedding may take its frequencies from the
longest row of the batch. `transformers.load_checks` finds out when a model is loaded; engines then keep apart what must not
share a forward.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Kind = Literal["any", "one side of a limit", "same length", "alone"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""From the widest to the narrowest."""


@dataclass(frozen=True)
class Batching:
    """The requests that may share a forward."""

    kind: Kind = "any"
    """"any" requests; those on "one side of a limit" of tokens, so that the longest row of a batch changes nothing; those of
    the "same length", which need no padding; or each request "alone"."""
    limit: int | None = None
    """The tokens of "one side of a limit"."""
    reason: str = ""
    """Why not "any", for people."""

    @property
    def joins(self) -> bool:
        """Whether requests may join a batch that runs, and prompts be read in pieces."""
        return self.kind in ("any", "one side of a limit")

    def together(self, tokens: int, other: int) -> bool:
        """Whether sequences of these lengths may share a forward.

        Args:
            tokens: of the one, once its prompt is read.
            other: of the other.
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
        """Whether a prompt of this many tokens must be read in one forward."""
        return not self.joins or (self.limit is not None and tokens > self.limit)

    def record(self) -> dict[str, Any]:
        """Return what a model's card says."""
        return {name: value for name, value in asdict(self).items() if value}


ANY = Batching()


@dataclass(frozen=True)
class LoadReport:
    """What the checks of a loaded model found."""

    batching: Batching = field(default_factory=Batching)
    """Which requests may share a forward."""
    attention: str = "sdpa"
    """"grouped", or the name of the implementation that the model keeps."""
    decoding_error: float = 0.0
    """How far the rows of a request that runs alone, with its cache, are from those of one forward over the whole sequence,
    relative to their norm; 0 if rounding explains it. The model itself computes them differently then."""
    compared_on: tuple[str, ...] = ()
    """The models that were tried."""
    seconds: float = 0.0
    """What the checks took."""

    def record(self) -> dict[str, Any]:
        """Return what a model's card says."""
        return {
            "batching": self.batching.record(),
            "attention": self.attention,
            "decoding_error": self.decoding_error,
            "compared_on": list(self.compared_on),
            "seconds": round(self.seconds, 2),
        }
