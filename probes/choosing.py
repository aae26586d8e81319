"""Chooses the kind of probe to fit: a built-in one or a user's own.

A custom kind is a `Kind`, or only its `fit(X, y, groups, strengths)`. It is found by a name that an installed package
declares (entry points of "roentgen.probe_kinds"), by a reference, or passed as an object. The result of its `fit` is
validated here, so that errors can address its author.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from probes.errors import ProbeDataError
from probes.kinds import DEFAULT_KINDS, KINDS, Kind, Probes
from probes.labels import Target
from roentgen.extensions import Extension, ExtensionError, format_error, given, preview

Fit = Callable[[Tensor, Tensor, Tensor, Tensor], Probes]


def choose_kind(target: Target, chosen: str | Kind | Fit | None) -> Kind:
    """Return the kind of probe to fit.

    Args:
        target: the label's target.
        chosen: a name, a reference, a kind or its `fit`; None chooses the default of the target.

    Raises:
        ProbeDataError: if there is no such kind, or it does not support the target.
    """
    name = DEFAULT_KINDS[target.kind] if chosen is None else chosen
    try:
        found: Extension[Any] = KINDS.find(name) if isinstance(name, str) else given(name)
    except ExtensionError as error:
        raise ProbeDataError(f"kind: {error}") from error
    kind = found.value if isinstance(found.value, Kind) else _of_fit(found, target)
    if kind is not KINDS.built_in.get(kind.name) and kind.digest is None:  # otherwise it has been validated already
        kind = _checked(kind, found)
    if kind.target != target.kind:
        fitting = [one.name for one in KINDS.built_in.values() if one.target == target.kind]
        raise ProbeDataError(
            f"kind: {kind.name!r} does not support {target.name!r}, which is {target.kind}; allowed are {', '.join(fitting)}"
        )
    return kind


def _of_fit(found: Extension[Any], target: Target) -> Kind:
    if not callable(found.value):
        raise ProbeDataError(
            f"kind: {found.reference or found.name} is {preview(found.value)}; allowed are a Kind, and a function "
            "fit(X, y, groups, strengths)"
        )
    return Kind(found.name, target.kind, found.value, (1.0,), "none")


def _checked(kind: Kind, found: Extension[Any]) -> Kind:
    """Wrap a custom kind so that the results of its `fit` are validated."""
    if kind.name in KINDS.built_in:
        raise ProbeDataError(f"kind: {kind.name!r} is the name of a built-in kind; rename yours")
    if not kind.strengths or not callable(kind.fit):
        raise ProbeDataError(f"kind: {kind.name!r} needs at least one strength and a callable fit")

    def fit(X: Tensor, y: Tensor, groups: Tensor, strengths: Tensor) -> Probes:
        try:
            fitted = kind.fit(X, y, groups, strengths)
            scores = fitted.scores(X) if hasattr(fitted, "scores") else None
        except Exception as error:
            raise ProbeDataError(f"kind: {kind.name} raised {format_error(error)} on X of {tuple(X.shape)}") from error
        wanted = (len(X), len(strengths), "outputs", X.shape[1])
        if not isinstance(scores, Tensor):
            returned = preview(fitted) if scores is None else f"probes whose scores are {preview(scores)}"
            raise ProbeDataError(f"kind: {kind.name} returned {returned}; allowed are probes with a method scores(X)")
        if scores.ndim != 4 or (*scores.shape[:2], "outputs", scores.shape[3]) != wanted:
            raise ProbeDataError(
                f"kind: {kind.name} returned probes whose scores are {tuple(scores.shape)}; allowed are [models, strengths, "
                f"outputs, rows], here [{', '.join(map(str, wanted))}]"
            )
        return fitted

    return replace(kind, fit=fit, digest=found.digest)
