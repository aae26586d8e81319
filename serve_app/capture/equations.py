"""The equations that verify hook points, up to the rounding of the model's dtype and no further.

A model of many layers adds small contributions to a large stream, and a few channels of the stream can be a thousand times
larger than the rest. A tolerance on the norm of the whole would accept any small contribution there. So a sum is checked
element by element, to the rounding of each element. In addition, least squares over all elements, each weighted by its
rounding, estimates the contribution's factor. A tensor that is not in the sum has a factor of 0, however small it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same values; dtypes may differ, and batch and token axes may be flattened."""
    if a.shape[-1:] != b.shape[-1:] or a.numel() != b.numel():
        return False
    coarser = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(a.to(coarser).flatten(), b.to(a.device, coarser).flatten())


def share(total: Tensor, others: Sequence[Tensor], part: Tensor) -> float | None:
    """Return the factor c with `total = sum(others) + c · part`; None if there is none.

    Args:
        total: `[batch, tokens, width]`, or flattened to `[batch * tokens, width]`, like the other tensors.
        others: the other terms of the sum.
        part: the term whose factor is estimated.

    Returns:
        Exactly 1.0 if the part is added unscaled.
    """
    given = (total, part, *others)
    if any(t.numel() != total.numel() or t.shape[-1] != total.shape[-1] for t in given):
        return None
    rounding = max(torch.finfo(t.dtype).eps for t in given)
    t, p, *o = (x.to(total.device, torch.float32).flatten() for x in given)
    rest, size = t - sum(o), t.abs() + sum(x.abs() for x in o)
    weight = size.clamp_min(torch.finfo(torch.float32).tiny).reciprocal()
    weighted_rest, weighted_part = (rest * weight).double(), (p * weight).double()
    factor = float(weighted_rest @ weighted_part / (weighted_part @ weighted_part))
    if abs(factor - 1) <= max(1e-3, 4 * rounding):
        factor = 1.0
    fits = (rest - factor * p).abs() <= 2 * rounding * (size + (factor * p).abs())
    return factor if bool(fits.all()) and abs(factor) > 1e-3 else None


def is_projection(given: Tensor, taken: Tensor, module: nn.Module) -> bool:
    """Whether a module's output is exactly the linear projection of its input by its own weight."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or not given.is_floating_point() or weight.shape != (given.shape[-1], taken.shape[-1]):
        return False
    expected = functional.linear(taken.float(), weight.float(), None if bias is None else bias.float())
    tolerance = 8 * max(torch.finfo(given.dtype).eps, torch.finfo(weight.dtype).eps)
    return bool((given.float().reshape(expected.shape) - expected).norm() <= tolerance * expected.norm())
