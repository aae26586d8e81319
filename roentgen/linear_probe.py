"""The file format of saved linear probes, written by training and read by servers and other runs.

    probes/<label>/
      probes.safetensors    per probe: `<name>.weight` [outputs, d], `<name>.bias` [outputs], `<name>.mean` [d],
                            `<name>.scale` [d]
      probes.json           per probe: its card (`ProbeCard`); written last, so if it exists, everything does

A name is `<key>@<positions>`, as in `layers.12.resid_post@last_prompt`. The score of a row x is `weight · (x − mean) /
scale + bias`. The card's `unit` defines the score: log-odds that the label is True, class logits, a value, or an
uncalibrated score. Log-odds and logits are calibrated at the position of training: of the rows with log-odds of −1.1, 1 in
4 have the label. Probes saved before `unit` existed have uncalibrated scores. Nothing is pickled.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from roentgen.atomic_files import atomic_write, make_folder, write_json
from roentgen.contract import split_key
from roentgen.errors import RoentgenError

ScoreUnit = Literal["log_odds", "logits", "value", "score"]

TENSORS = "probes.safetensors"
CARDS = "probes.json"


class SavedProbeError(RoentgenError):
    """A saved probe cannot be used; the message names the file and what to do."""


class ProbeCard(BaseModel):
    """Metadata of a saved probe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """Name of the model whose activations it reads."""
    revision: str
    """Its revision."""
    key: str
    """The stored key."""
    positions: str
    """The position of training."""
    kind: str
    """The kind of probe."""
    label: str
    """The label."""
    target: str
    """"binary", "real" or "classes"."""
    classes: tuple[str, ...] = ()
    """Names of the classes, if they have names."""
    unit: ScoreUnit = "score"
    """Unit of its scores; older files have uncalibrated scores."""
    strength: float
    """Strength of the penalty."""
    folds: int
    """Number of outer folds of the evaluation."""
    metrics: dict[str, dict[str, float | None]]
    """Out-of-fold metrics with their intervals."""
    data_hash: str
    """Hash of the training samples and their labels."""
    seed: int
    """Seed of the folds."""
    roentgen: str
    """Version of Roentgen that made it."""

    @property
    def name(self) -> str:
        """Name in its folder."""
        return f"{self.key}@{self.positions}"

    @property
    def layer(self) -> int | None:
        """The layer that it reads; None for a model-wide key."""
        return split_key(self.key)[1]


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear probe: maps rows to scores."""

    weight: Float[Tensor, "outputs d"]
    """Directions in standardised features, `[outputs, d]`."""
    bias: Float[Tensor, "outputs"]
    """Intercepts, `[outputs]`."""
    mean: Float[Tensor, "d"]
    """Subtracted from the features, `[d]`."""
    scale: Float[Tensor, "d"]
    """What they are then divided by, `[d]`."""

    def scores(self, X: Float[Tensor, "rows d"]) -> Float[Tensor, "rows outputs"]:
        """Return the scores of rows."""
        return (X.to(self.mean) - self.mean) / self.scale @ self.weight.mT + self.bias

    @property
    def direction(self) -> Float[Tensor, "outputs d"]:
        """Unit directions in the activations' own units, along which the scores grow fastest."""
        return torch.nn.functional.normalize(self.weight / self.scale, dim=-1)

    def to(self, device: torch.device) -> "LinearProbe":
        """Return a copy on a device, in float32."""
        return LinearProbe(
            *(part.to(device, torch.float32) for part in (self.weight, self.bias, self.mean, self.scale))
        )


@dataclass(frozen=True, eq=False)
class SavedProbe(LinearProbe):
    """A linear probe with its metadata."""

    card: ProbeCard
    """Its metadata."""


def save_probes(folder: Path, probes: list[SavedProbe]) -> None:
    """Write a folder of probes atomically."""
    make_folder(folder)
    tensors = {
        f"{probe.card.name}.{part}": getattr(probe, part).float().cpu().contiguous()
        for probe in probes
        for part in ("weight", "bias", "mean", "scale")
    }
    cards = {probe.card.name: probe.card.model_dump(mode="json") for probe in probes}
    with atomic_write(folder / TENSORS) as temporary:
        save_file(tensors, temporary)
    write_json(folder / CARDS, cards)


def read_cards(folder: Path) -> dict[str, ProbeCard]:
    """Return the cards of a folder's probes by name.

    Raises:
        SavedProbeError: if the folder has no probes, or the file is damaged.
    """
    file = folder / CARDS
    try:
        cards: dict[str, Any] = json.loads(file.read_text())
        return {name: ProbeCard.model_validate(card) for name, card in cards.items()}
    except FileNotFoundError:
        raise SavedProbeError(
            f"{folder} holds no probes: it has no {CARDS}; `roentgen probe train` creates it"
        ) from None
    except (json.JSONDecodeError, ValidationError, AttributeError) as error:
        raise SavedProbeError(f"{file} is damaged: {error}") from error


def load_probe(folder: Path, name: str) -> SavedProbe:
    """Load one probe.

    Args:
        folder: its folder.
        name: its name, `<key>@<positions>`.

    Raises:
        SavedProbeError: if there is no such probe, or a file is damaged.
    """
    cards = read_cards(folder)
    if name not in cards:
        raise SavedProbeError(f"{folder} has no probe {name!r}; it has {', '.join(cards)}")
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            weight, bias, mean, scale = (file.get_tensor(f"{name}.{p}") for p in ("weight", "bias", "mean", "scale"))
    except (SafetensorError, OSError) as error:
        raise SavedProbeError(f"{folder / TENSORS} is damaged: {error}") from error
    if weight.shape[1:] != mean.shape or mean.shape != scale.shape or bias.shape != weight.shape[:1]:
        raise SavedProbeError(f"{folder / TENSORS} is damaged: the tensors of {name} have inconsistent shapes")
    return SavedProbe(weight, bias, mean, scale, cards[name])


def find_probe(given: Path, label: str) -> tuple[Path, SavedProbe]:
    """Return a saved probe and its path, FOLDER/NAME; for a run, the probe that most folds chose.

    Raises:
        SavedProbeError: if there is none.
    """
    path = given.expanduser().absolute()
    if not path.exists() and not (path.parent / CARDS).exists():
        raise SavedProbeError(f"{given} is neither a run nor a saved probe, FOLDER/NAME")
    if (path / "config.json").exists():
        folder = path / "probes" / label
        results = folder / "results.json"
        if not results.exists() or not (folder / CARDS).exists():
            raise SavedProbeError(f"{path} has no saved probes of {label!r}; `roentgen probe train` creates them")
        path = folder / Counter(json.loads(results.read_text())["best"]["keys"]).most_common(1)[0][0]
    return path, load_probe(path.parent, path.name)
