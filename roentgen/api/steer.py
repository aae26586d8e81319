"""`Steer`, a steering vector, and the ways in which a script names probes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from roentgen.extensions import preview

if TYPE_CHECKING:
    from roentgen.linear_probe import SavedProbe


class HasProbe(Protocol):
    """An object with one probe, such as the result of a training."""

    @property
    def probe(self) -> "SavedProbe":
        """The probe."""


Probe = Any
"""A `SavedProbe`, the result of `roentgen.probes.train`, or the path of a saved probe, FOLDER/NAME."""


@dataclass(frozen=True, eq=False)
class Steer:
    """A vector to add to a model's residual stream while it reads and generates.

    The vector is `scale` times the direction. A probe's direction has length 1; a given vector is used as it is.
    """

    direction: Any
    """A probe (a `SavedProbe`, the result of `roentgen.probes.train`, or a path FOLDER/NAME), or a vector of the residual
    stream's width (a list, a NumPy array or a tensor)."""
    layer: int | None = None
    """The layer to steer; None for a probe's own layer. Negative numbers count from the end."""
    scale: float = 1.0
    """Factor of the direction."""
    hook_point: str | None = None
    """The hook point to steer; None for a probe's own, or `resid_post` for a vector."""
    positions: str = "all"
    """The token positions to steer: all, prompt, generated, last_prompt or stride:k."""
    output: int | None = None
    """Index of the direction, for a probe with several."""


def named_probes(given: "Probe | Sequence[Probe] | Mapping[str, Probe]") -> "dict[str, SavedProbe]":
    """Return one or more probes by name: the mapping's names, or their own, such as `layers.12.resid_post@last_prompt`.

    Raises:
        TypeError: if one is not a probe.
        ValueError: if two have the same name.
        SavedProbeError: if there is no probe at a path.
    """
    if isinstance(given, Mapping):
        return {name: find_probe(probe, f"probes[{name!r}]") for name, probe in given.items()}
    found: dict[str, SavedProbe] = {}
    for place, one in enumerate(given if isinstance(given, list | tuple) else [given]):
        probe = find_probe(one, f"probes[{place}]")
        if probe.card.name in found:
            raise ValueError(
                f"probes[{place}]: another is called {probe.card.name} too; give them names: probes={{'mine': …}}"
            )
        found[probe.card.name] = probe
    return found


def find_probe(given: Probe, param: str) -> "SavedProbe":
    """Return the probe that is meant.

    Raises:
        TypeError: if it is none.
        SavedProbeError: if there is none at the path.
    """
    from roentgen.linear_probe import SavedProbe, load_probe

    if isinstance(given, SavedProbe):
        return given
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        return load_probe(path.parent, path.name)
    probe = getattr(given, "probe", None)
    if isinstance(probe, SavedProbe):
        return probe
    raise TypeError(
        f"{param}: {preview(given)} is no probe; allowed are a SavedProbe, what roentgen.probes.train returns, and a "
        "path FOLDER/NAME"
    )


def is_vector(given: Any) -> bool:
    """Whether a direction is numbers, not a probe."""
    return hasattr(given, "tolist") or (isinstance(given, Sequence) and not isinstance(given, str))
