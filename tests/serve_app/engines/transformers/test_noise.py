"""The noise that tokens are drawn with: its distribution, its independence, and that it stays with a token's id."""

import numpy as np
import torch
from scipy import stats

from serve_app.engines.transformers.noise import _batch, gumbel

KEYS = [(int(a), int(b)) for a, b in np.random.default_rng(0).integers(0, 2**32, (200, 2))]


def test_it_is_gumbel_noise() -> None:
    found = gumbel(torch.arange(5000).expand(len(KEYS), -1), KEYS).numpy()
    assert stats.kstest(found.ravel(), stats.gumbel_r.cdf).pvalue > 1e-3
    # What wins is in the upper tail: of a million, so many are above the quantile of one in ten thousand.
    above = int((found > stats.gumbel_r.isf(1e-4)).sum())
    assert stats.binomtest(above, found.size, 1e-4).pvalue > 1e-3
    # One token over the keys, and one key over the tokens.
    assert min(stats.kstest(found[:, token], stats.gumbel_r.cdf).pvalue for token in (0, 1, 4999)) > 1e-3
    assert min(stats.kstest(found[row], stats.gumbel_r.cdf).pvalue for row in (0, 1, 199)) > 1e-3


def test_tokens_and_keys_have_nothing_to_do_with_one_another() -> None:
    near = [(key + (i & 1), other + (i >> 1 & 1)) for i in range(4) for key, other in [(7, 9)]]
    found = gumbel(torch.arange(20000).expand(4, -1), near).numpy()
    # Neighbouring keys and neighbouring tokens: a correlation of 20000 pairs has a standard error of 0.007.
    assert np.abs(np.corrcoef(found)[np.triu_indices(4, 1)]).max() < 0.03
    assert np.abs([np.corrcoef(row[:-step], row[step:])[0, 1] for row in found for step in (1, 2, 256)]).max() < 0.03


def test_a_tokens_noise_is_its_own() -> None:
    ids = torch.arange(151_936)
    whole = gumbel(ids[None], KEYS[:1])[0]
    some = torch.tensor([151_935, 3, 70_000, 0])
    assert torch.equal(gumbel(some[None], KEYS[:1])[0], whole[some])
    assert torch.equal(gumbel(ids.expand(3, -1), KEYS[:3])[0], whole)


def test_it_is_the_same_with_signed_integers() -> None:
    ids = torch.arange(30_000).expand(len(KEYS[:20]), -1)
    torch.testing.assert_close(_batch(ids, KEYS[:20]), gumbel(ids, KEYS[:20]), rtol=1e-5, atol=1e-6)


def test_it_is_finite() -> None:
    assert gumbel(torch.arange(3_000_000)[None], [(0, 0)]).isfinite().all()
