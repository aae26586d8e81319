"""Rows as 8-bit integers, each with a scale of its own: half the bytes of bfloat16.

    scale = largest |value| of the row / 127        code = round(value / scale)        value ≈ code · scale

A value is off by half a scale at most, 1/254 of the row's largest. That is fine where a row's values are of one size, and
coarse where a few of them are much larger than the rest, as in the residual stream of some models: measure what it does to a
probe (docs/store.md). A row that holds NaN or infinity is read as NaN everywhere.
"""

import torch
from jaxtyping import Float, Int8, Shaped
from torch import Tensor

QUANTIZED = "torch.int8"
"""The dtype of a spec whose rows are stored so."""
SCALE = ".scale"
"""What follows a key in the name of the tensor with its rows' scales."""
LARGEST = 127


def quantize(values: Shaped[Tensor, "rows ..."]) -> tuple[Int8[Tensor, "rows ..."], Float[Tensor, "rows"]]:
    """Return the codes of rows, `[rows, *shape]`, and their scales in float32, `[rows]`."""
    rows = values.float().flatten(1)
    scales = rows.abs().amax(1) / LARGEST if rows.shape[1] else rows.new_zeros(len(rows))
    scales[~scales.isfinite()] = torch.nan
    # Of the largest numbers that there are: rounded up, a scale would make infinity of them.
    scales = scales.where((scales * LARGEST).isfinite() | scales.isnan(), scales.nextafter(torch.zeros(())))
    steps = scales.where(scales > 0, 1.0)[:, None]  # rows of zeros, and those that are not finite
    codes = (rows / steps).round_().clamp_(-LARGEST, LARGEST).nan_to_num_(0.0)
    return codes.to(torch.int8).view(values.shape), scales


def dequantize(codes: Int8[Tensor, "rows ..."], scales: Float[Tensor, "rows"]) -> Float[Tensor, "rows ..."]:
    """Return what codes and scales stand for, in float32."""
    return codes.float() * scales.view(-1, *[1] * (codes.dim() - 1))
