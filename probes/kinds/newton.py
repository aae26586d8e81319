"""Newton solver for the kinds with a smooth convex loss and an L2 penalty, for many problems on the same rows at once.

Method:
    1. The weights lie in the span of the rows, w = Zᵀ·a, so scores are K·a + b with K = Z·Zᵀ (the kernel trick): d no longer
       appears once K is computed. K serves every problem on these rows: each strength, each fold (rows that do not train have
       zero weight in its loss), each labeling. Strengths are solved in sequence, each starting from the previous solution.
    2. Newton's method. A step is found by conjugate gradients in w and b (Hestenes and Stiefel 1952,
       https://doi.org/10.6028/jres.049.044), expressed in a: one product with K per iteration, for all models and problems
       together. No factorization is needed: with the strong penalties that probes need, few iterations suffice.
    3. A step is solved approximately, to a tenth of the residual, which preserves fast convergence (Dembo, Eisenstat and
       Steihaug 1982, https://doi.org/10.1137/0719025), and therefore in float32. The residual is recomputed in float64 after
       each step, because residual streams have a few directions thousands of times larger than the rest.
    4. Intercepts of several outputs sum to 0. A loss of several outputs is a softmax, which is invariant under a shift of all
       outputs: it has neither slope nor curvature there, and rounding errors could produce a step of any length.
    5. A step that does not lower the objective is halved until it does; the scores along it are known, so that is cheap.

If rows are many and features few, K is larger than Z, and products are computed through Z and its transpose instead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from probes.errors import NoConvergenceError

PerRow = Float[Tensor, "models problems outputs rows"]
PerOutput = Float[Tensor, "models problems outputs 1"]
PerProblem = Float[Tensor, "models problems 1 1"]
Product = Callable[[PerRow], PerRow]

TOLERANCE = 3e-4
"""Stop after a step that moves no score by more than this; the remaining error is at most of that size, usually a tenth."""

ROUGHLY = 0.1
"""Relative residual of the conjugate gradients in a step."""

MAX_STEPS = 100
"""Maximum Newton steps; fewer than ten are needed."""

MAX_PRODUCTS = 300
"""Maximum products with K per step."""

MAX_HALVINGS = 30


class Loss(Protocol):
    """A smooth convex loss of the scores: for each problem the weighted sum over its rows."""

    def value(self, f: PerRow) -> PerProblem:
        """Return the loss."""

    def slope(self, f: PerRow) -> PerRow:
        """Return its derivative with respect to each score."""

    def curvature(self, f: PerRow) -> Product:
        """Return a function that multiplies by its second derivative, in float32."""


@dataclass(frozen=True)
class NewtonStep:
    """A step of the search."""

    a: PerRow
    """Change of the dual weights."""
    b: PerOutput
    """Change of the intercepts."""
    Ka: PerRow
    """K times `a`."""


def minimize(
    Z: Float[Tensor, "models rows d"],
    loss: Loss,
    strengths: Float[Tensor, "strengths"],
    problems: int = 1,
    outputs: int = 1,
    *,
    intercept: bool = True,
) -> tuple[Float[Tensor, "models problems*strengths outputs d"], Float[Tensor, "models problems*strengths outputs"]]:
    """Return weights and intercept at the minimum of ½‖w‖² + C·loss, for each model, problem and strength C.

    Args:
        Z: standardized rows, float64.
        loss: the loss of the scores.
        strengths: values of C.
        problems: number of problems in the loss.
        outputs: number of scores per row; a loss of several must be invariant under a shift of all.
        intercept: True to fit an intercept, which is not penalized.

    Raises:
        NoConvergenceError: if it does not converge.
    """
    exactly, roughly = _products(Z)
    a = Z.new_zeros(len(Z), problems, outputs, Z.shape[1])
    Ka, b = torch.zeros_like(a), a[..., :1]
    found = []
    for C in strengths.tolist():
        for _ in range(MAX_STEPS):
            rough = _newton_step(roughly, loss, C, a, Ka + b, intercept=intercept)
            # The effect of a step is computed in float64: in float32 a good step may seem to do harm.
            step = NewtonStep(rough.a, rough.b, exactly(rough.a))
            by = _step_length(loss, C, Ka, b, step)
            a, b, Ka = a + by * step.a, b + by * step.b, Ka + by * step.Ka
            if (by * (step.Ka + step.b)).abs().max() < TOLERANCE:
                break
        else:
            raise NoConvergenceError(
                f"the fit has not converged in {MAX_STEPS} steps for C = {C:g}: features may differ too much in scale, or "
                "rows may be damaged; check them with `roentgen sessions verify`, or choose --kind lda or mean_difference"
            )
        found.append((a, b))
    a, b = (torch.stack(parts, 2).flatten(1, 2) for parts in zip(*found, strict=True))
    return (a.flatten(1, 2) @ Z).unflatten(1, a.shape[1:3]), b[..., 0]


def _products(Z: Float[Tensor, "models rows d"]) -> tuple[Product, Product]:
    """Return functions that multiply by K, in float64 and in float32."""
    factors = [Z @ Z.mT] if Z.shape[1] < 2 * Z.shape[2] else [Z, Z.mT]

    def product(matrices: list[Tensor]) -> Product:
        def times(v: PerRow) -> PerRow:
            flat = v.flatten(1, 2)
            for matrix in matrices:
                flat = flat @ matrix
            product: Tensor = flat.unflatten(1, v.shape[1:3])
            return product

        return times

    return product(factors), product([factor.float() for factor in factors])


def _newton_step(times_K: Product, loss: Loss, C: float, a: PerRow, f: PerRow, *, intercept: bool) -> NewtonStep:
    """Return an approximate Newton step, by conjugate gradients in the inner product a·K·a′ + κ·b·b′.

    The inner product of a is that of the weights. κ, the maximum curvature of the intercept for a loss that curves no more
    than the logistic one, balances the convergence of the intercept with that of the weights.
    """
    curve, kappa = loss.curvature(f), C * f.shape[-1] / 4

    def of_intercept(x: PerRow) -> PerOutput:
        total = x.sum(-1, keepdim=True) / kappa if intercept else torch.zeros_like(x[..., :1])
        return total - total.mean(2, keepdim=True) if total.shape[2] > 1 else total

    slope = C * loss.slope(f)
    a, b = -(a + slope).float(), -of_intercept(slope).float()
    left = along = NewtonStep(a, b, times_K(a))
    found = NewtonStep(torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(a))
    size = _inner(left, left, kappa)
    enough = ROUGHLY**2 * size
    for _ in range(MAX_PRODUCTS):
        going = size > enough
        if not bool(going.any()):
            break
        bent = C * curve(along.Ka + along.b)
        a = along.a + bent
        image = NewtonStep(a, of_intercept(bent), times_K(a))
        bend = _inner(along, image, kappa)
        going &= bend > 0  # unless the residual is float32 noise
        by = torch.where(going, size / bend, 0.0)
        found, left = _plus(found, by, along), _plus(left, -by, image)
        before, size = size, torch.where(going, _inner(left, left, kappa), size)
        along = _plus(left, torch.where(going, size / before, 0.0), along)
    return NewtonStep(found.a.double(), found.b.double(), found.Ka.double())


def _plus(one: NewtonStep, by: PerProblem, other: NewtonStep) -> NewtonStep:
    return NewtonStep(one.a + by * other.a, one.b + by * other.b, one.Ka + by * other.Ka)


def _inner(one: NewtonStep, other: NewtonStep, kappa: float) -> PerProblem:
    return _total(one.a * other.Ka) + kappa * _total(one.b * other.b)


def _total(x: PerRow) -> PerProblem:
    return x.sum((2, 3), keepdim=True)


def _step_length(loss: Loss, C: float, Ka: PerRow, b: PerOutput, step: NewtonStep) -> PerProblem:
    """Return the step length of each problem: 1, or the first of ½, ¼, … that lowers its objective."""
    f, moves = Ka + b, step.Ka + step.b
    now, crossed, squared = loss.value(f), _total(step.a * Ka), _total(step.a * step.Ka)
    by = torch.ones_like(squared)
    for _ in range(MAX_HALVINGS):
        change = by * crossed + by**2 * squared / 2 + C * (loss.value(f + by * moves) - now)
        worse = change > 1e-9 * C * now
        if not bool(worse.any()):
            break
        by = torch.where(worse, by / 2, by)
    return by
