"""Quantizes rows to 8-bit integers with one scale per row: half the bytes of bfloat16.

    scale = largest |value| of the row / 127        code = round(value / scale)        value ≈ code · scale

The error of a value is at most half the scale, 1/254 of the row's largest value. This is accurate if the values of a row
are of similar size, and coarse if a few are much larger than the rest, as in the residual stream of some models: measure
the effect on a probe (docs/store.md). A row that contains NaN or infinity is read as NaN everywhere.
"""

import torch
from jaxtyping import Float, Int8, Shaped
from torch import Tensor

QUANTIZED = "torch.int8"
"""Dtype of a spec with quantized rows."""
SCALE = ".scale"
"""Suffix of a key in the name of the tensor with its rows' scales."""
LARGEST = 127


def quantize(values: Shaped[Tensor, "rows ..."]) -> tuple[Int8[Tensor, "rows ..."], Float[Tensor, "rows"]]:
    """Return the codes of rows, `[rows, *shape]`, and their scales in float32, `[rows]`."""
    rows = values.float().flatten(1)
    scales = rows.abs().amax(1) / LARGEST if rows.shape[1] else rows.new_zeros(len(rows))
    scales[~scales.isfinite()] = torch.nan
    # For the largest representable numbers, a scale that was rounded up would overflow to infinity.
    scales = scales.where((scales * LARGEST).isfinite() | scales.isnan(), scales.nextafter(torch.zeros(())))
    steps = scales.where(scales > 0, 1.0)[:, None]  # for rows of zeros and rows that are not finite
    codes = (rows / steps).round_().clamp_(-LARGEST, LARGEST).nan_to_num_(0.0)
    return codes.to(torch.int8).view(values.shape), scales


def dequantize(codes: Int8[Tensor, "rows ..."], scales: Float[Tensor, "rows"]) -> Float[Tensor, "rows ..."]:
    """Reconstruct the values in float32."""
    return codes.float() * scales.view(-1, *[1] * (codes.dim() - 1))
