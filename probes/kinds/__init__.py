"""The kinds of probe, one file each.

A kind fits one probe per model (a stored key at a position) and strength, all together in batched tensors, on the device of
`X`. A new kind is a file with a `fit` and a line in `KINDS`; a user's own comes from the same registry (`choosing`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from probes.kinds import attention, contrast, lda, logistic, mean_difference, multinomial, ridge
from roentgen.extensions import Registry

TargetKind = Literal["binary", "real", "classes"]


class Probes(Protocol):
    """Fitted probes, one per model and strength."""

    def scores(self, X: Tensor) -> Tensor:
        """Return the scores of rows, `[models, strengths, outputs, rows]`; one output, or one per class."""


@dataclass(frozen=True)
class Kind:
    """A kind of probe."""

    name: str
    """Name."""
    target: TargetKind
    """The targets it supports: True or False, a number, or one of several classes."""
    fit: Callable[[Tensor, Tensor, Tensor, Tensor], Probes]
    """Maps `(X, y, groups, strengths)` to probes. `X` is `[models, rows, d]`, or `[models, rows, tokens, d]` with NaN for
    padding if the kind reads all tokens."""
    strengths: tuple[float, ...]
    """Strengths to choose from on inner folds, most regularized first: ties go to the first."""
    strength: str
    """Description of the strength."""
    fit_together: Callable[[Tensor, Tensor, Tensor, Tensor], Probes] | None = None
    """Maps `(X, y, trains, strengths)` to probes for several labelings of the same rows; `y` and `trains` (which rows
    train) are `[labelings, rows]`, and labelings precede strengths in the result. None if fitting together saves
    nothing."""
    tokens: bool = False
    """True if it reads all tokens of a sample instead of one row."""
    within: bool = False
    """True if it reads differences within problems, so that samples of different problems are not comparable."""
    digest: str | None = None
    """Hash of the source of a kind that is not built in."""

    @property
    def probabilistic(self) -> bool:
        """True if its calibrated scores are log-odds or class logits; otherwise they are values or uncalibrated scores."""
        return self.target != "real" and not self.within


_BUILT_IN = {
    kind.name: kind
    for kind in (
        Kind(
            "logistic",
            "binary",
            logistic.fit,
            (1e-4, 1e-3, 1e-2, 1e-1),
            "C, the inverse of the L2 penalty",
            fit_together=logistic.fit_together,
        ),
        Kind("mean_difference", "binary", mean_difference.fit, (1.0,), "none"),
        Kind("lda", "binary", lda.fit, (0.99, 0.9, 0.5, 0.1), "shrinkage of the covariance"),
        Kind("contrast", "binary", contrast.fit, (1e-4, 1e-3, 1e-2, 1e-1), "C", within=True),
        Kind("attention", "binary", attention.fit, (1e-3, 1e-2, 1e-1), "C", tokens=True),
        Kind("ridge", "real", ridge.fit, (1e5, 1e4, 1e3, 1e2), "alpha, the L2 penalty"),
        Kind("multinomial", "classes", multinomial.fit, (1e-4, 1e-3, 1e-2, 1e-1), "C, the inverse of the L2 penalty"),
    )
}

KINDS: Registry[Kind] = Registry("roentgen.probe_kinds", _BUILT_IN)
"""Every kind, by name."""

DEFAULT_KINDS: dict[TargetKind, str] = {"binary": "logistic", "real": "ridge", "classes": "multinomial"}
"""Default kind of each target."""
