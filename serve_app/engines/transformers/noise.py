"""Generates random numbers for sampling; each is a function of a key and a token id alone.

Adding Gumbel noise to logits and taking the largest samples a token from their softmax (Gumbel, 1954). A token's noise depends
on its id, and not on the other tokens, on their order or on the batch. So logits that differ by rounding sample the same
token, unless two tokens are as close as the rounding. With a cumulative sum, rounding anywhere moves every boundary.

The noise is counter-based: the id is hashed with the key (three rounds of multiply and shift, Wellons' `triple32`, a bijection
of 32 bits in which each output bit depends on all input bits). So it can be computed for any part of a vocabulary, and is the
same on every device up to the rounding of a logarithm. On a CPU, NumPy computes it row by row, so that the working data stays
in the processor's cache. On other devices PyTorch does, whose integers are signed.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

SPREAD = 0x9E3779B1
"""2^32 divided by the golden ratio, odd: consecutive ids start far apart."""

ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB), (14, 1))
"""Shifts and factors of the rounds; the second half of the key is added after the first round."""

LEAST, MOST = 2.0**-32, 1 - 2.0**-24
"""Bounds of the uniform numbers, which keep the noise finite."""


def gumbel(ids: Int[Tensor, "rows tokens"], keys: list[tuple[int, int]]) -> Float[Tensor, "rows tokens"]:
    """Return standard Gumbel noise, in float32.

    Args:
        ids: of tokens.
        keys: per row, two random numbers of 32 bits.
    """
    if ids.device.type == "cpu":
        rows = [_row(row.numpy().astype(np.uint32), key) for row, key in zip(ids, keys, strict=True)]
        return torch.from_numpy(np.stack(rows))
    return _batch(ids, keys)


def _row(ids: "np.ndarray[tuple[int], np.dtype[np.uint32]]", key: tuple[int, int]) -> np.ndarray:
    hashed = ids * np.uint32(SPREAD)
    hashed += np.uint32(key[0])
    shifted = np.empty_like(hashed)
    for number, (shift, factor) in enumerate(ROUNDS):
        np.right_shift(hashed, np.uint32(shift), out=shifted)
        hashed ^= shifted
        hashed *= np.uint32(factor)
        if number == 0:
            hashed += np.uint32(key[1])
    # Uniform numbers are finest near 0, where the exponential is smallest and its token is chosen.
    share = np.abs(hashed.view(np.int32).astype(np.float32))
    share *= np.float32(-(2.0**-31))
    np.clip(share, np.float32(-MOST), np.float32(-LEAST), out=share)
    np.log1p(share, out=share)
    np.negative(share, out=share)
    np.log(share, out=share)
    return np.negative(share, out=share)


def _batch(ids: Int[Tensor, "rows tokens"], keys: list[tuple[int, int]]) -> Float[Tensor, "rows tokens"]:
    """Compute the same for all rows at once, with signed integers."""
    first, second = (torch.tensor([[_signed(key[i])] for key in keys], dtype=torch.int32) for i in (0, 1))
    hashed = ids.int() * _signed(SPREAD)
    hashed += first.to(ids.device)
    for number, (shift, factor) in enumerate(ROUNDS):
        hashed ^= (hashed >> shift).bitwise_and_((1 << 32 - shift) - 1)
        hashed *= _signed(factor)
        if number == 0:
            hashed += second.to(ids.device)
    share = hashed.float().abs_().mul_(-(2.0**-31)).clamp_(-MOST, -LEAST)
    return share.log1p_().neg_().log_().neg_()


def _signed(number: int) -> int:
    return number - (1 << 32) if number >= 1 << 31 else number
