"""A kind of probe of one's own: a function that fits, and what it reads.

roentgen probe train results/mine --label correct --kind examples/extensions/probe_kind.py:NEAREST
"""

import torch
from torch import Tensor

from roentgen.probes import Kind, LinearProbes


def fit(X: Tensor, y: Tensor, groups: Tensor, strengths: Tensor) -> LinearProbes:
    """Fit the nearest of two centers: which is closer, that of the True rows or that of the False ones?

    Args:
        X: rows of several models (a stored key at a position each), `[models, rows, d]`.
        y: the label of each row, `[rows]`.
        groups: the problem of each row; not used here.
        strengths: what to fit with, one probe each, `[strengths]`: here how far features are evened out, 0 to 1.
    """
    X = X.double()
    spread = X.std(1).clamp_min(1e-12)[:, None] ** strengths.double()[None, :, None]  # [models, strengths, d]
    high, low = X[:, y].mean(1)[:, None], X[:, ~y].mean(1)[:, None]  # [models, 1, d]
    weight = (high - low) / spread**2
    bias = -(weight * (high + low) / 2).sum(-1)
    zeros, ones = torch.zeros_like(X[:, 0]), torch.ones_like(X[:, 0])
    return LinearProbes(weight[:, :, None], bias[:, :, None], zeros, ones)


NEAREST = Kind(
    name="nearest",
    target="binary",
    fit=fit,
    strengths=(0.0, 0.5, 1.0),  # the first wins ties
    strength="how far features are evened out",
)
