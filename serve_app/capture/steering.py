"""Adds vectors to the stream of some requests of a running batch: the observer's counterpart.

A request may steer at several hook points and positions. Per forward and hook point there is one intervention over the whole
batch, `StepSteering`, which adds each request's vectors to its own rows and touches no other. It is shown the very tensor
that the model goes on with, before what captures and scores is, and adds in place: whoever else holds the tensor sees it
too, as `resid_mid` has to be seen by both the MLP's norm and the sum around it.
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
    """What was added made the model's output something else than numbers."""

    code, param, prefix = "steering_overflow", "steering", "steering: "

    def __init__(self) -> None:
        super().__init__("what is added makes the model's output overflow; take a smaller scale")


class UnsteerableError(RequestError):
    """A request's vector cannot be added at its hook point; the message says why."""

    param, prefix = "steering", "steering: "


@dataclass(frozen=True)
class SteeringVector:
    """What one request adds at one hook point."""

    key: str
    """The stored key of the hook point."""
    tap: Tap
    """Where that is."""
    vector: Float[Tensor, "d_model"]
    """What is added, on the model's device, `[d_model]`."""
    positions: Positions
    """To which of its rows."""

    def wanted(self, n_prompt: int, span: range) -> range:
        """Return the positions in `span` to add to, of a job whose prompt has `n_prompt` tokens."""
        return self.positions.select(n_prompt, span.stop, first=span.start)


def different_sums(steering_vectors: Sequence[SteeringVector], n_prompt: int, n_rows: int) -> int:
    """Return how many different vectors a request adds, over all hook points: at a token, all that are added there are one.

    Args:
        steering_vectors: the request's.
        n_prompt: tokens of its prompt.
        n_rows: of a full capture.
    """
    found: dict[str, dict[int, tuple[int, ...]]] = defaultdict(dict)
    for number, steering_vector in enumerate(steering_vectors):
        at = found[steering_vector.key]
        for place in steering_vector.wanted(n_prompt, range(n_rows)):
            at[place] = (*at.get(place, ()), number)
    return sum(len(set(at.values())) for at in found.values())


@dataclass
class _Sums:
    """What is added at one hook point in one forward: to flat index `indices[i]` the vector `vectors[which[i]]`."""

    vectors: list[Tensor] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    which: list[int] = field(default_factory=list)


class StepSteering:
    """One forward's interventions.

    Attributes:
        taps: per stored key, where to add in this forward; nothing if no row of it is steered.
    """

    def __init__(self, requests: list[tuple[SteeringVector, ...]], n_prompts: list[int], layout: BatchLayout) -> None:
        """Lay out what is added.

        Args:
            requests: per batch row, what its request adds.
            n_prompts: per batch row, the tokens of its prompt.
            layout: how the rows lie.
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
        """Add to one value, in place.

        Raises:
            ValueError: if it has no row of the vectors' width per token, so that nothing can be added to it.
        """
        self._seen.add(key)
        sums = self._sums[key]
        vectors = torch.stack(sums.vectors).to(value)
        index = self._layout.index(value, sums.indices)
        if index is None or value.shape[len(index) :] != vectors.shape[1:]:
            raise ValueError(f"{key} is {list(value.shape)}: not a row of {vectors.shape[1]} per token")
        value.index_put_(index, vectors[sums.which], accumulate=True)

    def added(self, key: str) -> tuple[list[int], list[int], list[Float[Tensor, "d_model"]]]:
        """Return the places to add to at one hook point, per place which sum is added, and the different sums.

        Whoever asks adds them; nothing is then missing of what was to be added there.
        """
        self._seen.add(key)
        sums, at = self._sums[key], defaultdict(list)
        for place, number in zip(sums.indices, sums.which, strict=True):
            at[place].append(number)
        kinds = {kind: number for number, kind in enumerate(dict.fromkeys(map(tuple, at.values())))}
        vectors = [torch.stack([sums.vectors[number] for number in kind]).sum(0) for kind in kinds]
        return list(at), [kinds[tuple(numbers)] for numbers in at.values()], vectors

    def fail(self, key: str, reason: str) -> None:
        """Take note that nothing could be added at a hook point: the requests that steer there fail, and no others."""
        self._failed.setdefault(key, reason)

    @property
    def failures(self) -> dict[int, UnsteerableError]:
        """Per batch row whose request was not steered as it asked, why; complete once the forward has been issued."""
        reasons = {
            key: f"{key} was not reached, so nothing was added there" for key in self.taps if key not in self._seen
        }
        return {
            row: UnsteerableError(why) for key, why in (reasons | self._failed).items() for row in self._steered[key]
        }
