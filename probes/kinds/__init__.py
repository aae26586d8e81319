"""The kinds of probe, one file each, and the list of them.

A kind fits one probe per model (a stored key at a position) and strength, all of them together in batched tensors, on a CPU or
a GPU: whichever device `X` is on. Adding one is a file with a `fit` and a line in `KINDS`; a user's own comes from elsewhere by
the same registry (`choosing`).
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
    """What it is called."""
    target: TargetKind
    """What it can read: True or False, a number, or one of several classes."""
    fit: Callable[[Tensor, Tensor, Tensor, Tensor], Probes]
    """`(X, y, groups, strengths)` to probes. `X` is `[models, rows, d]`, or `[models, rows, tokens, d]` with NaN for padding
    if it takes every token."""
    strengths: tuple[float, ...]
    """What to choose from on inner folds, most regularized first: ties go to the first."""
    strength: str
    """What the strength is, in words."""
    fit_together: Callable[[Tensor, Tensor, Tensor, Tensor], Probes] | None = None
    """Likewise `(X, y, trains, strengths)` for several labelings of the same rows, `y` and `trains` (which rows train)
    `[labelings, rows]`, labelings before strengths in the result; None where fitting them together saves nothing."""
    tokens: bool = False
    """Whether it takes every token of a sample instead of one row."""
    within: bool = False
    """Whether it reads differences within a problem only, so that samples of different problems do not compare."""
    digest: str | None = None
    """Hash of the source of a kind that is not built in."""

    @property
    def probabilistic(self) -> bool:
        """Whether its scores, once calibrated, are log-odds (of classes: logits); else they are values, or mere scores."""
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
"""The kind that reads a target if none is named."""
