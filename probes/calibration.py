"""Calibrates scores to log-odds, so that a probe's probabilities match observed frequencies.

The raw scores of a fitted probe need not be log-odds on new rows. Means estimated from few rows are further apart than
those of new rows (`mean_difference`, `lda`), and a penalty shrinks scores. The calibration is therefore fitted on
out-of-fold scores:

- Binary labels: log-odds = slope · score + intercept, fitted by maximum likelihood with Platt's targets, (n₁ + 1)/(n₁ + 2)
  and 1/(n₀ + 2) instead of 1 and 0, which keep a few perfectly separated samples from producing certainty (Platt 1999,
  "Probabilistic outputs for support vector machines"; Newton's method as in Lin, Lin and Weng 2007,
  https://doi.org/10.1007/s10994-007-5018-6).
- Several classes: logits = slope · score, temperature scaling (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

A negative slope would invert what the probe has learned, because of rows on which it did worse than chance. The slope is
bounded below by 0.01: such a probe predicts the share of True for any input, and keeps its direction.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from probes.kinds.linear import LinearProbes

LEAST_SLOPE = 0.01
STEPS = 50
ENOUGH = 1e-9


@dataclass(frozen=True)
class Calibration:
    """The calibration of several probes."""

    slope: Float[np.ndarray, "probes"]
    """`[probes]`."""
    intercept: Float[np.ndarray, "probes"]
    """`[probes]`."""

    @classmethod
    def none(cls, probes: int) -> "Calibration":
        """Return the identity calibration."""
        return cls(np.ones(probes), np.zeros(probes))

    @classmethod
    def binary(cls, scores: Float[np.ndarray, "probes rows"], y: Bool[np.ndarray, "rows"]) -> "Calibration":
        """Fit the calibration of binary probes on scores of unseen rows."""
        trues, falses = int(y.sum()), int((~y).sum())
        target = np.where(y, (trues + 1) / (trues + 2), 1 / (falses + 2))
        middle, spread = scores.mean(1, keepdims=True), scores.std(1, keepdims=True)
        varies = spread > 1e-12 * (1 + np.abs(middle))
        spread = np.where(varies, spread, 1.0)
        z = np.where(varies, (scores - middle) / spread, 0.0)
        least = LEAST_SLOPE * spread[:, 0]
        slope, intercept = _platt(z, target, np.zeros(len(z)), fixed=np.zeros(len(z), dtype=bool))
        held = slope < least
        if held.any():  # refit on the bound: the slope is fixed, the intercept is optimized
            again = _platt(z, target, np.where(held, least, slope), fixed=held)
            slope, intercept = (np.where(held, new, old) for new, old in zip(again, (slope, intercept), strict=True))
        slope = slope / spread[:, 0]
        return cls(slope, intercept - slope * middle[:, 0])

    @classmethod
    def classes(cls, scores: Float[np.ndarray, "probes rows outputs"], y: Int[np.ndarray, "rows"]) -> "Calibration":
        """Fit the calibration of multi-class probes on scores of unseen rows."""
        smooth = np.full((len(y), scores.shape[2]), 1 / (len(y) + scores.shape[2]))
        smooth[np.arange(len(y)), y] += len(y) / (len(y) + scores.shape[2])
        scale = scores.std((1, 2))
        scale = np.where(scale > 0, scale, 1.0)
        z = scores / scale[:, None, None]
        low, high = np.full(len(z), np.log(1e-4)), np.full(len(z), np.log(1e4))
        for _ in range(STEPS):  # bisection on the sign of the derivative: the loss is convex in the slope
            slope = np.exp((low + high) / 2)
            said = _softmax(slope[:, None, None] * z)
            rising = ((said - smooth) * z).sum((1, 2)) > 0
            low, high = np.where(rising, low, np.log(slope)), np.where(rising, np.log(slope), high)
        slope = np.maximum(np.exp((low + high) / 2) / scale, LEAST_SLOPE)
        return cls(slope, np.zeros(len(z)))

    def probes(self, fitted: LinearProbes) -> LinearProbes:
        """Return probes with calibrated scores; each has one strength."""
        slope, intercept = (
            torch.from_numpy(part).to(fitted.weight)[:, None, None] for part in (self.slope, self.intercept)
        )
        return LinearProbes(
            fitted.weight * slope[..., None], fitted.bias * slope + intercept, fitted.mean, fitted.scale
        )

    def __call__(self, scores: Float[np.ndarray, "probes rows outputs"]) -> Float[np.ndarray, "probes rows outputs"]:
        """Return the calibrated scores."""
        calibrated: np.ndarray = self.slope[:, None, None] * scores + self.intercept[:, None, None]
        return calibrated


def log_loss(
    scores: Float[np.ndarray, "... rows outputs"], y: Bool[np.ndarray, "rows"] | Int[np.ndarray, "rows"]
) -> Float[np.ndarray, "..."]:
    """Return the mean log-loss of log-odds (one output) or logits (several)."""
    if scores.shape[-1] == 1:
        f = scores[..., 0]
        loss: Float[np.ndarray, "..."] = (np.logaddexp(0, f) - y * f).mean(-1)
        return loss
    top = scores.max(-1, keepdims=True)
    total = np.log(np.exp(scores - top).sum(-1)) + top[..., 0]
    own: Float[np.ndarray, "..."] = (total - scores[..., np.arange(len(y)), y]).mean(-1)
    return own


def _softmax(f: Float[np.ndarray, "... outputs"]) -> Float[np.ndarray, "... outputs"]:
    said = np.exp(f - f.max(-1, keepdims=True))
    shares: np.ndarray = said / said.sum(-1, keepdims=True)
    return shares


def _platt(
    z: Float[np.ndarray, "probes rows"],
    target: Float[np.ndarray, "rows"],
    slope: Float[np.ndarray, "probes"],
    *,
    fixed: Bool[np.ndarray, "probes"],
) -> tuple[Float[np.ndarray, "probes"], Float[np.ndarray, "probes"]]:
    """Minimize the cross-entropy by Newton's method; the slope is constant where `fixed`; a step that increases the loss is
    halved."""
    intercept = np.full(len(z), np.log(target.mean() / (1 - target.mean())))

    def loss(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        f = a[:, None] * z + b[:, None]
        total: np.ndarray = (np.logaddexp(0, f) - target * f).sum(1)
        return total

    now = loss(slope, intercept)
    for _ in range(STEPS):
        said = 1 / (1 + np.exp(-(slope[:, None] * z + intercept[:, None]).clip(-500, 500)))
        curve, off = said * (1 - said) + 1e-12, said - target
        by_slope, by_intercept = np.where(fixed, 0.0, (off * z).sum(1)), off.sum(1)
        aa, ab, bb = (curve * z * z).sum(1) + 1e-9, np.where(fixed, 0.0, (curve * z).sum(1)), curve.sum(1)
        determinant = aa * bb - ab * ab
        step_a = (bb * by_slope - ab * by_intercept) / determinant
        step_b = (aa * by_intercept - ab * by_slope) / determinant
        by = np.ones(len(z))
        for _ in range(STEPS):
            after = loss(slope - by * step_a, intercept - by * step_b)
            worse = after > now + 1e-12 * np.abs(now)
            if not worse.any():
                break
            by = np.where(worse, by / 2, by)
        slope, intercept = slope - by * step_a, intercept - by * step_b
        if (np.abs(by * step_a) + np.abs(by * step_b)).max() < ENOUGH:
            break
        now = loss(slope, intercept)
    return slope, intercept
