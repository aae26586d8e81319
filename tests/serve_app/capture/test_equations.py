"""Contributions to a residual stream are distinguished in half precision, where the stream is much larger."""

import pytest
import torch
from torch import nn

from serve_app.capture.equations import is_projection, same, share


@pytest.fixture
def stream() -> torch.Tensor:
    """A residual stream with a few channels a thousand times larger than the rest, as trained models have."""
    torch.manual_seed(0)
    values = torch.randn(2, 8, 64)
    values[..., :3] *= 1000
    return values.bfloat16()


@pytest.mark.parametrize("size", [1.0, 0.1, 0.01])
def test_a_small_part_is_found_and_another_refused(stream: torch.Tensor, size: float) -> None:
    part, other = (torch.randn(2, 8, 64) * size).bfloat16(), (torch.randn(2, 8, 64) * size).bfloat16()
    assert share(stream + part, [stream], part) == 1.0
    assert share(stream + part, [stream], part.flatten(0, 1)) == 1.0
    assert share(stream + part, [stream], other) is None
    assert share(stream, [stream], part) is None


def test_two_parts_each_have_their_share(stream: torch.Tensor) -> None:
    one, two = torch.randn(2, 8, 64).bfloat16(), torch.randn(2, 8, 64).bfloat16()
    total = (two + one) + stream
    assert share(total, [stream, one], two) == share(total, [stream, two], one) == 1.0
    assert share(total, [stream], one) is None


def test_a_scaled_part_gives_its_factor() -> None:
    stream, part = torch.randn(2, 8, 64), torch.randn(2, 8, 64)
    assert share(stream + 0.22 * part, [stream], part) == pytest.approx(0.22, rel=1e-5)


def test_nothing_adds_nothing() -> None:
    stream = torch.randn(2, 8, 64)
    assert share(stream, [stream], torch.zeros(2, 8, 64)) is None
    assert share(torch.full((2, 8, 64), torch.nan), [stream], stream) is None


def test_the_same_values_in_another_dtype_or_flattened() -> None:
    values = torch.randn(2, 8, 4).bfloat16()
    assert same(values, values.float().flatten(0, 1))
    assert not same(values, values.flip(0))
    assert not same(values, values.transpose(1, 2))


def test_a_projection_is_not_what_is_made_of_it() -> None:
    module, taken = nn.Linear(16, 5), torch.randn(2, 8, 16)
    assert is_projection(module(taken), taken, module)
    assert not is_projection(module(taken).softmax(-1), taken, module)
    assert not is_projection(module(taken).argsort(-1), taken, module)
    assert not is_projection(module(taken), taken, nn.Linear(16, 5))
