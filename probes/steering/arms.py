"""The arms of a sweep: the probe's direction and control directions of the same length.

A change under steering alone shows only that the model was perturbed. So each scale is also applied along random directions
and along random directions orthogonal to the probe's. An effect that the controls share is due to the perturbation; one
that only the probe's direction has is due to the direction.
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
    """A condition under which all problems are answered."""

    along: Along
    """The kind of direction."""
    number: int = 0
    """Number of the direction within its kind, from 0."""
    scale: float = 0.0
    """Scale in units of `SweepPlan.unit`."""
    direction: Float[Tensor, "d"] | None = None
    """Unit direction, `[d]`; None for no steering."""


def make_arms(direction: Float[Tensor, "d"], scales: Sequence[float], controls: int, seed: int = 0) -> list[Arm]:
    """Return the arms of a sweep: no steering, then every direction at every scale.

    Args:
        direction: the probe's direction, of any length.
        scales: the scales.
        controls: number of random and of orthogonal directions.
        seed: seed of the control directions.
    """
    unit = torch.nn.functional.normalize(direction.double(), dim=0)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2 * controls, len(unit), generator=generator, dtype=torch.float64)
    # Orthogonal to the probe's direction and, as far as dimensions allow, to one another.
    orthogonal = torch.linalg.qr(torch.cat([unit[None], drawn[controls:]]).mT).Q.mT[1:] if controls else drawn
    directions: list[tuple[Along, int, Tensor]] = [("probe", 0, unit)]
    directions += [("random", i, row) for i, row in enumerate(torch.nn.functional.normalize(drawn[:controls], dim=-1))]
    directions += [("orthogonal", i, row) for i, row in enumerate(orthogonal[:controls])]
    return [Arm("nothing"), *(Arm(along, i, scale, row) for along, i, row in directions for scale in scales)]
