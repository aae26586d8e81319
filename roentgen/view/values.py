"""Numbers that color tokens, and the heat map of one token, from the rows of the store.

    logprob             the token's log-probability when it was sampled
    norm:KEY            the length of the row
    probe:LABEL/NAME    a saved probe's score, read at every row; of several classes the first, or another as NAME#CLASS
    cosine:KEY:LABEL/NAME   the cosine to a saved probe's direction, in the activations' own units

There is no value where no row was stored: under other positions than `all`, and at the last token, which never passes through
the model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from roentgen.contract import split_key
from roentgen.linear_probe import SavedProbe
from roentgen.view.errors import ViewError
from roentgen.view.schemas import Grid, Values
from roentgen.view.sources import OpenSource, StoredRollout

Read = Callable[[Float[Tensor, "rows d"]], Float[Tensor, "rows"]]


def values_of(source: OpenSource, rollout: StoredRollout, of: str, start: int = 0, stop: int | None = None) -> Values:
    """Return a number for each token `[start, stop)` of a rollout.

    Raises:
        ViewError: if `of` is not understood, or the rollout has no such rows.
        StoreError: if they cannot be read.
    """
    total = rollout.n_tokens
    numbers = np.full(total, np.nan)
    if of == "logprob":
        unit = "log-probability"
        _fill_logprobs(rollout, numbers)
    else:
        key, read, unit = _reader(source, of)
        if key not in rollout.keys:
            raise ViewError(f"{of}: the rollout has no rows of {key}; it has {', '.join(rollout.keys)}", 404)
        (item,) = rollout.session.activations(key, where=rollout.frame)
        there = item.position >= 0
        scored = read(item.values.flatten(1)).double().numpy()
        numbers[item.position[there]] = scored[there]
    start = min(max(0, start), total)
    finite = numbers[np.isfinite(numbers)]
    low, high = np.percentile(finite, [1, 99]).tolist() if len(finite) else (None, None)
    return {"of": of, "start": start, "values": listed(numbers[start:stop]), "low": low, "high": high, "unit": unit}


def choices_of(source: OpenSource, rollout: StoredRollout) -> list[str]:
    """Return what `of` can be for a rollout, but for cosines."""
    keys = rollout.keys
    probes = [f"probe:{name}" for name, card in source.cards().items() if card.key in keys]
    return ["logprob", *probes, *(f"norm:{key}" for key in keys)]


def grid_of(source: OpenSource, rollout: StoredRollout, position: int, of: str) -> Grid:
    """Return a number per layer and hook point at one token.

    Args:
        source: whose probes are read.
        rollout: the rollout.
        position: of the token.
        of: norm, probe (those of the first label that has some, or probe:LABEL), or cosine:LABEL/NAME.

    Raises:
        ViewError: if `of` is not understood, or there is no such token.
        StoreError: if rows cannot be read.
    """
    check_position(rollout, position)
    cells: dict[tuple[int | None, str], float | None] = {}
    missing = None
    readers = _grid_readers(source, rollout.keys, of)
    for key in rollout.keys:
        hook_point, layer = split_key(key)
        cells[layer, hook_point] = None
        row = row_at(rollout, key, position)
        if row is None:
            missing = f"no row is stored at position {position}"
        elif key in readers:
            cells[layer, hook_point] = listed(readers[key](row[None]).double().numpy())[0]
    if missing is None and not readers:
        missing = f"{of}: there is nothing of that kind for the stored keys"
    layers, hook_points, values = arranged(cells)
    return {"layers": layers, "hook_points": hook_points, "values": values, "missing": missing}


def row_at(rollout: StoredRollout, key: str, position: int) -> Float[Tensor, "d"] | None:
    """Return the row of a key at a position, `[d]`; None where none is stored."""
    row = rollout.place
    shard = rollout.session.shard(row["shard"])
    own = shard.column("position")[row["row_start"] : row["row_stop"]]
    (at,) = np.nonzero(own == position)
    if not len(at):
        return None
    return shard.values(key, np.array([row["row_start"] + int(at[0])])).flatten(1)[0].float()


def check_position(rollout: StoredRollout, position: int) -> None:
    """Make sure that a rollout has a token.

    Raises:
        ViewError: 404 if it has not.
    """
    total = rollout.n_tokens
    if not 0 <= position < total:
        raise ViewError(f"position {position} is out of range; there are tokens 0 to {total - 1}", 404)


def arranged(
    cells: dict[tuple[int | None, str], Any],
) -> tuple[list[int | None], list[str], list[list[Any]]]:
    """Return layers, hook points, and the cells as rows of a table; what belongs to no layer comes last."""
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: (layer is None, layer or 0))
    hook_points = list(dict.fromkeys(hook_point for _, hook_point in cells))
    return layers, hook_points, [[cells.get((layer, name)) for name in hook_points] for layer in layers]


def listed(numbers: Float[np.ndarray, "n"]) -> list[float | None]:
    """Return numbers as JSON has them: null where they are not finite; six digits are enough for colors and hovers."""
    return [
        float(f"{number:.6g}") if finite else None for number, finite in zip(numbers, np.isfinite(numbers), strict=True)
    ]


def _fill_logprobs(rollout: StoredRollout, numbers: Float[np.ndarray, "tokens"]) -> None:
    row = rollout.row
    shard = rollout.session.shard(row["shard"])
    start, stop = row["row_start"], row["row_stop"]
    position, logprobs = (shard.rows(name, start, stop).numpy() for name in ("position", "logprob"))
    numbers[position[position >= 0]] = logprobs[position >= 0]
    if row["n_completion"] and row["final_logprob"] is not None:
        numbers[-1] = row["final_logprob"]


def _reader(source: OpenSource, of: str) -> tuple[str, Read, str]:
    """Return the key, what is read of its rows, and the unit."""
    kind, _, name = of.partition(":")
    if kind == "norm" and name:
        return name, _norm, "norm"
    if kind == "probe" and name:
        name, output = _output(source, name)
        probe = source.probe(name)
        return probe.card.key, lambda rows: probe.scores(rows)[:, output], probe.card.unit.replace("_", "-")
    if kind == "cosine" and ":" in name:
        key, _, direction = name.partition(":")
        return key, _cosine(source.probe(direction)), "cosine"
    raise ViewError(f"of: {of!r} is none of logprob, norm:KEY, probe:NAME, cosine:KEY:NAME")


def _output(source: OpenSource, name: str) -> tuple[str, int]:
    name, _, chosen = name.partition("#")
    classes = source.probe(name).card.classes
    if chosen and chosen not in classes:
        raise ViewError(f"probe {name} has no class {chosen!r}; it has {', '.join(classes)}", 404)
    return name, classes.index(chosen) if chosen else 0


def _grid_readers(source: OpenSource, keys: Sequence[str], of: str) -> dict[str, Read]:
    kind, _, name = of.partition(":")
    if of == "norm":
        return dict.fromkeys(keys, _norm)
    if kind == "cosine" and name:
        probe = source.probe(name)
        same = [k["key"] for k in source.stored_keys() if k["width"] == len(probe.mean)]
        return {key: _cosine(probe) for key in keys if key in same}
    if kind == "probe":
        cards = source.cards()
        label = name or next((one.partition("/")[0] for one in cards), "")
        first = {card.key: one for one, card in reversed(cards.items()) if one.partition("/")[0] == label}
        return {key: _reader(source, f"probe:{first[key]}")[1] for key in keys if key in first}
    raise ViewError(f"of: {of!r} is none of norm, probe, cosine:NAME, lens")


def _norm(rows: Float[Tensor, "rows d"]) -> Float[Tensor, "rows"]:
    norms: Tensor = torch.linalg.vector_norm(rows.double(), dim=1)
    return norms


def _cosine(probe: SavedProbe) -> Read:
    direction = probe.direction[0]

    def read(rows: Float[Tensor, "rows d"]) -> Float[Tensor, "rows"]:
        if rows.shape[1] != len(direction):
            raise ViewError(f"the direction has {len(direction)} features, and the rows have {rows.shape[1]}")
        return torch.nn.functional.cosine_similarity(rows.to(direction), direction[None], dim=1)

    return read
