"""Positions where a probe reads a rollout: each name selects one row per example, or all tokens.

    last_prompt  last  mean_prompt  mean_generated     the store's policies with one row
    at:F                                               at fraction F of the trace: 0 is the last prompt token, 1 the last row
    before_answer                                      where the model is about to write the last number of its answer
    tokens                                             every token, for kinds that pool over tokens

Rows are read one rollout at a time and only the requested ones are kept, so memory holds one row per example and key.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from probes.errors import ProbeDataError
from roentgen.contract import count_rows
from roentgen.store import Session, StoreError

POLICIES = ("last_prompt", "last", "mean_prompt", "mean_generated")
NAMES = (*POLICIES, "before_answer", "tokens", "at:F (F from 0 to 1)")

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def check_positions(name: str) -> str:
    """Return `name` if it is a position.

    Raises:
        ProbeDataError: if it is not.
    """
    if name in (*POLICIES, "before_answer", "tokens") or _fraction(name) is not None:
        return name
    raise ProbeDataError(f"positions: {name!r} is not a position; allowed are {', '.join(NAMES)}")


def read(
    session: Session, rollouts: pd.DataFrame, key: str, positions: str
) -> Float[Tensor, "rollouts d"] | Float[Tensor, "rollouts tokens d"]:
    """Read one key of rollouts in float32; `tokens` are padded with NaN.

    Raises:
        ProbeDataError: if the rows were not stored.
    """
    try:
        if positions in POLICIES:
            return session.activations(key, where=rollouts, positions=positions).stack().float().flatten(1)
        rows = session.activations(key, where=rollouts, positions="all")
        if positions == "tokens":
            parts = [item.values.float().flatten(1) for item in rows]
            check_finite([bool(part.isfinite().all()) for part in parts], key, session)  # before padding with NaN
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=torch.nan)
        wanted = _wanted(rollouts, positions)
        kept = []
        for item, position in zip(rows, wanted, strict=True):
            places = (item.position == position).nonzero()[0]
            if len(places) != 1:
                raise StoreError(f"rollout {item.rollout_id} does not store position {position}")
            kept.append(item.values[int(places[0])].float().flatten())
        return torch.stack(kept)
    except StoreError as error:
        raise ProbeDataError(f"positions: {positions!r} cannot be read from {session.uri}: {error}") from error


def check_finite(finite: Sequence[bool], key: str, session: Session) -> None:
    """Check that all values are finite.

    Raises:
        ProbeDataError: if they are not; the message names the key and the number of samples.
    """
    broken = len(finite) - sum(finite)
    if broken:
        raise ProbeDataError(
            f"{key} has non-finite values in {broken} of {len(finite)} samples of {session.uri}; store a wider dtype"
        )


def _fraction(name: str) -> float | None:
    prefix, _, number = name.partition(":")
    if prefix != "at" or not re.fullmatch(r"\d+(\.\d+)?", number) or float(number) > 1:
        return None
    return float(number)


def _wanted(rollouts: pd.DataFrame, positions: str) -> Iterator[int]:
    fraction = _fraction(positions)
    find = before_answer if fraction is None else partial(_at, fraction=fraction)
    return (find(row) for _, row in rollouts.iterrows())


def _at(row: pd.Series, fraction: float) -> int:
    n_prompt, n_rows = int(row["n_prompt"]), count_rows(int(row["n_prompt"]), int(row["n_completion"]))
    return n_prompt - 1 + round(fraction * (n_rows - n_prompt))


def before_answer(row: pd.Series) -> int:
    """Return the position whose output is the first token of the last number in the completion.

    Without a number it is the last row: the output was truncated before one, or has none.
    """
    n_prompt, n_rows = int(row["n_prompt"]), count_rows(int(row["n_prompt"]), int(row["n_completion"]))
    offsets = row["token_offsets"]
    start = int(offsets[n_prompt]) if len(offsets) > n_prompt else len(row["text"])
    numbers = list(_NUMBER.finditer(row["text"], start))
    if not numbers:
        return n_rows - 1
    first = max(place for place in range(n_prompt, len(offsets)) if offsets[place] <= numbers[-1].start())
    return min(first - 1, n_rows - 1)
