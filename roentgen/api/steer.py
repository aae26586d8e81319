"""Vectors to add and probes to read, as a script names them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from roentgen.extensions import preview

if TYPE_CHECKING:
    from roentgen.linear_probe import SavedProbe


class HasProbe(Protocol):
    """What names one probe, as a training does its best."""

    @property
    def probe(self) -> "SavedProbe":
        """The probe."""


Probe = Any
"""A `SavedProbe`, what `roentgen.probes.train` returns, or the path of a saved one, FOLDER/NAME."""


@dataclass(frozen=True, eq=False)
class Steer:
    """A vector to add to a model's stream while it reads and generates.

    What is added is `scale` times the direction: a probe's has length 1, and a vector is taken as it is.
    """

    direction: Any
    """A probe (a `SavedProbe`, what `roentgen.probes.train` returns, a path FOLDER/NAME), or a vector as wide as the stream
    (a list, a NumPy array, a tensor)."""
    layer: int | None = None
    """Where to add it; a probe's own layer if absent. Negative ones count from the end."""
    scale: float = 1.0
    """What it is multiplied by."""
    hook_point: str | None = None
    """Where to add it; a probe's own if absent, else `resid_post`."""
    positions: str = "all"
    """To which tokens' rows: all, prompt, generated, last_prompt or stride:k."""
    output: int | None = None
    """Which of a probe's directions, for one with several."""


def named_probes(given: "Probe | Sequence[Probe] | Mapping[str, Probe]") -> "dict[str, SavedProbe]":
    """Return probes, one or several, by name: those of the mapping, or their own, `layers.12.resid_post@last_prompt`.

    Raises:
        TypeError: if one is no probe.
        ValueError: if two have one name.
        SavedProbeError: if there is none at a path.
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
