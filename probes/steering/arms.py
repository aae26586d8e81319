"""What a sweep compares: the probe's direction against directions that know nothing of the label, of the same length.

A change under steering shows only that the model was pushed. So each scale is also tried along random directions and along
random directions orthogonal to the probe's: what these do, pushing does; what only the probe's does is the direction's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Along = Literal["nothing", "probe", "random", "orthogonal"]


@dataclass(frozen=True, eq=False)
class Arm:
    """One way to answer all problems."""

    along: Along
    """What is added."""
    number: int = 0
    """Which of the directions of this kind, from 0."""
    scale: float = 0.0
    """In units of `SweepPlan.unit`."""
    direction: Float[Tensor, "d"] | None = None
    """Of length 1, `[d]`; None for no steering."""


def make_arms(direction: Float[Tensor, "d"], scales: Sequence[float], controls: int, seed: int = 0) -> list[Arm]:
    """Return the arms of a sweep: no steering first, then every direction at every scale.

    Args:
        direction: the probe's; any length.
        scales: how far to push.
        controls: how many random, and as many orthogonal directions.
        seed: of these.
    """
    unit = torch.nn.functional.normalize(direction.double(), dim=0)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2 * controls, len(unit), generator=generator, dtype=torch.float64)
    # Orthogonal to the probe's direction and, as far as there is room, to one another.
    orthogonal = torch.linalg.qr(torch.cat([unit[None], drawn[controls:]]).mT).Q.mT[1:] if controls else drawn
    directions: list[tuple[Along, int, Tensor]] = [("probe", 0, unit)]
    directions += [("random", i, row) for i, row in enumerate(torch.nn.functional.normalize(drawn[:controls], dim=-1))]
    directions += [("orthogonal", i, row) for i, row in enumerate(orthogonal[:controls])]
    return [Arm("nothing"), *(Arm(along, i, scale, row) for along, i, row in directions for scale in scales)]
