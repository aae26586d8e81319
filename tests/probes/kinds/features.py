"""Features as difficult as those of a residual stream."""

import torch
from torch import Tensor


def correlated(models: int, rows: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features that are correlated and off center, with one very large direction, and a noisy number that the first shows."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(models, d, d, generator=generator) / torch.arange(1, d + 1).sqrt()[:, None]
    X = torch.randn(models, rows, d, generator=generator) @ mixing + 3
    X[..., 0] *= 1000
    return X, X[0, :, 1] + 0.5 * torch.randn(rows, generator=generator)
