"""The stopping rules that a sweep tries, each with its parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float

from probes.stopping.traces import StopTrace, scores_of
from roentgen.linear_probe import LinearProbe

RuleKind = Literal["whole", "probe", "random", "fixed_length", "convergence"]

QUANTILES = np.array([0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99, 0.995])
"""Quantiles of the scores that are tried as thresholds, if none are given."""
SHARES = np.linspace(0.1, 1.0, 19)
"""Quantiles of the lengths that are tried as fixed lengths."""
READINGS = (1, 2, 3, 4, 6)
"""Numbers of consecutive sentence ends that must have the same reading."""


@dataclass(frozen=True)
class Setting:
    """A setting of one rule. Fields that do not apply to its kind are None."""

    kind: RuleKind
    """`whole` never stops. The others stop by the probe's score, by a random direction's score, after a fixed number of
    tokens, or when the scorer has read the same answer several times in a row."""
    number: int = 0
    """Which of the random directions."""
    above: float | None = None
    """The threshold."""
    length: int | None = None
    """Number of consecutive tokens or readings."""
    limit: int | None = None
    """The fixed length."""

    @property
    def family(self) -> tuple[RuleKind, int]:
        """The rule that it is a setting of."""
        return self.kind, self.number

    def __str__(self) -> str:
        match self.kind:
            case "whole":
                return "never"
            case "fixed_length":
                return f"after {self.limit} tokens"
            case "convergence":
                return f"{self.length} equal readings"
            case _:
                return f"above {self.above:g} for {self.length}"


def random_directions(probe: LinearProbe, count: int, seed: int = 0) -> list[LinearProbe]:
    """Return uninformative probes: random weights of the same norm as the probe's, on features standardized like the
    probe's."""
    drawn = torch.randn(count, probe.weight.shape[1], generator=torch.Generator().manual_seed(seed))
    weights = torch.nn.functional.normalize(drawn, dim=-1) * probe.weight.float().norm()
    return [LinearProbe(weight[None], torch.zeros(1), probe.mean, probe.scale) for weight in weights]


def make_settings(
    traces: Sequence[StopTrace],
    scores: Sequence[Sequence[Float[np.ndarray, "fed"]]],
    lengths: Sequence[int],
    above: Sequence[float] | None = None,
) -> list[Setting]:
    """Return the settings to try, "whole" first.

    Args:
        traces: the rollouts on which settings are chosen.
        scores: scores of their tokens by the probe, then by each random direction.
        lengths: numbers of consecutive tokens.
        above: thresholds of the probe; None for quantiles of its scores. A random direction gets, for each of them, the
            threshold that the same share of its own scores is below, in the same order.
    """
    counted = [
        np.concatenate([found[trace.counted] for found, trace in zip(own, traces, strict=True)]) for own in scores
    ]
    values = list(above) if above is not None else quantiles(counted[0], QUANTILES)
    settings = [Setting("whole"), *(Setting("probe", 0, value, length) for value in values for length in lengths)]
    shares = np.array([np.mean(counted[0] <= value) for value in values])
    for number, own in enumerate(counted[1:]):
        alike = quantiles(own, shares)
        settings += [Setting("random", number, value, length) for value in alike for length in lengths]
    limits = np.unique(np.quantile([int(trace.counted.sum()) for trace in traces], SHARES).astype(int))
    settings += [Setting("fixed_length", limit=int(limit)) for limit in limits if limit > 0]
    return [*settings, *(Setting("convergence", length=length) for length in READINGS)]


def quantiles(scores: Float[np.ndarray, "tokens"], shares: Float[np.ndarray, "shares"]) -> list[float]:
    """Return quantiles of scores rounded to four digits, so that no score practically equals one of them."""
    return [float(f"{value:.4g}") for value in np.quantile(scores, shares)]


def all_scores(probes: Sequence[LinearProbe], traces: Sequence[StopTrace]) -> list[list[Float[np.ndarray, "fed"]]]:
    """Score traces with each probe."""
    return [[scores_of(probe, trace) for trace in traces] for probe in probes]
