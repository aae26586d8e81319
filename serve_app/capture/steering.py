"""Adds steering vectors to the rows of some requests of a running batch.

A request may steer at several hook points and positions. Per forward and hook point there is one intervention for the whole
batch, `StepSteering`, which adds each request's vectors to its own rows and changes no others. It receives the tensor that the
model continues with, before capture and probes do, and adds in place. So everything that holds the tensor sees the change:
`resid_mid`, for example, is the input of the MLP's norm and of the sum around the MLP.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from roentgen.contract import Positions
from serve_app.capture.batch_layout import BatchLayout
from serve_app.capture.structure import Tap
from serve_app.errors import RequestError


class OversteeredError(RequestError):
    """The steering vectors made the model's output NaN or infinite."""

    code, param, prefix = "steering_overflow", "steering", "steering: "

    def __init__(self) -> None:
        super().__init__("the steering vectors make the model's output overflow; use a smaller scale")


class UnsteerableError(RequestError):
    """A request's vector cannot be added at its hook point; the message says why."""

    param, prefix = "steering", "steering: "


@dataclass(frozen=True)
class SteeringVector:
    """A vector that one request adds at one hook point."""

    key: str
    """The stored key of the hook point."""
    tap: Tap
    """The hook point's tap."""
    vector: Float[Tensor, "d_model"]
    """The vector, on the model's device: `[d_model]`."""
    positions: Positions
    """Positions to add it to."""

    def wanted(self, n_prompt: int, span: range) -> range:
        """Return the positions in `span` to add it to, of a job with `n_prompt` prompt tokens."""
        return self.positions.select(n_prompt, span.stop, first=span.start)


def different_sums(steering_vectors: Sequence[SteeringVector], n_prompt: int, n_rows: int) -> int:
    """Return the number of different vectors that a request adds, over all hook points.

    Several vectors that are added at one token count as one, their sum.

    Args:
        steering_vectors: the request's vectors.
        n_prompt: tokens of its prompt.
        n_rows: rows of a full capture.
    """
    found: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for number, steering_vector in enumerate(steering_vectors):
        at = found[steering_vector.key]
        for place in steering_vector.wanted(n_prompt, range(n_rows)):
            at[place] = (*at.get(place, ()), number)
    return sum(len(set(at.values())) for at in found.values())


@dataclass
class _Sums:
    """The vectors added at one hook point in one forward: `vectors[which[i]]` is added at flat index `indices[i]`."""

    vectors: list[Tensor] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    which: list[int] = field(default_factory=list)


class StepSteering:
    """Steers one forward.

    Attributes:
        taps: per stored key, the tap to add at in this forward; a key is left out if no row of it is steered.
    """

    def __init__(self, requests: list[tuple[SteeringVector, ...]], n_prompts: list[int], layout: BatchLayout) -> None:
        """Plan one forward's interventions.

        Args:
            requests: per batch row, its request's vectors.
            n_prompts: per batch row, the tokens of its request's prompt.
            layout: the batch's layout.
        """
        self._layout = layout
        self._sums: dict[str, _Sums] = {}
        self._steered: dict[str, list[int]] = {}
        self._seen: set[str] = set()
        self._failed: dict[str, str] = {}
        self.taps: dict[str, Tap] = {}
        for row, (steering_vectors, n_prompt) in enumerate(zip(requests, n_prompts, strict=True)):
            for steering_vector in steering_vectors:
                indices = layout.flat_indices(row, steering_vector.wanted(n_prompt, layout.spans[row]))
                if not indices:
                    continue
                self.taps[steering_vector.key] = steering_vector.tap
                self._steered.setdefault(steering_vector.key, []).append(row)
                sums = self._sums.setdefault(steering_vector.key, _Sums())
                sums.which += [len(sums.vectors)] * len(indices)
                sums.vectors.append(steering_vector.vector)
                sums.indices += indices

    def __call__(self, key: str, value: Float[Tensor, "rows width d_model"]) -> None:
        """Add to one tapped value, in place.

        Raises:
            ValueError: if the value has no row of the vectors' width per token.
        """
        self._seen.add(key)
        sums = self._sums[key]
        vectors = torch.stack(sums.vectors).to(value)
        index = self._layout.index(value, sums.indices)
        if index is None or value.shape[len(index) :] != vectors.shape[1:]:
            raise ValueError(
                f"{key} has the shape {list(value.shape)}: not a row of {vectors.shape[1]} values per token"
            )
        value.index_put_(index, vectors[sums.which], accumulate=True)

    def added(self, key: str) -> tuple[list[int], list[int], list[Float[Tensor, "d_model"]]]:
        """Return, for one hook point, the flat indices to add at, the number of the sum for each, and the different sums.

        The caller adds them; the hook point then counts as steered.
        """
        self._seen.add(key)
        sums, at = self._sums[key], defaultdict(list)
        for place, number in zip(sums.indices, sums.which, strict=True):
            at[place].append(number)
        kinds = {kind: number for number, kind in enumerate(dict.fromkeys(map(tuple, at.values())))}
        vectors = [torch.stack([sums.vectors[number] for number in kind]).sum(0) for kind in kinds]
        return list(at), [kinds[tuple(numbers)] for numbers in at.values()], vectors

    def fail(self, key: str, reason: str) -> None:
        """Record that a hook point could not be steered; only the requests that steer there fail."""
        self._failed.setdefault(key, reason)

    @property
    def failures(self) -> dict[int, UnsteerableError]:
        """The errors of requests that were not steered as requested, per batch row.

        They are complete once the forward has been launched.
        """
        reasons = {
            key: f"{key} was not reached, so nothing was added there" for key in self.taps if key not in self._seen
        }
        return {
            row: UnsteerableError(why) for key, why in (reasons | self._failed).items() for row in self._steered[key]
        }
