"""Exports a session in other formats, one rollout at a time: `.pt` files, and torch, Ray and Hugging Face datasets.

The `.pt` files are compatible with the tool that this project replaces, so that scripts written for it keep working:
`activations_{session}_{rollout}_layer_{i}_{hook}.pt`, float32, `[1, rows, d_model]`, with its names for the norms' outputs.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch.utils.data import IterableDataset, get_worker_info

from roentgen.atomic_files import atomic_write, make_folder
from roentgen.contract import split_key
from roentgen.store.activations import RolloutRows
from roentgen.store.reader import Session
from roentgen.store.schema import StoreError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from ray.data import Dataset as RayDataset

_OLD_HOOKS = {"ln_attn": "input_layernorm_output", "ln_mlp": "post_attention_layernorm_output"}


def pt_file_name(session_id: str, rollout_id: str, key: str) -> str:
    """Return the name of a `.pt` file; `_` separates its parts, so underscores in the session id become `-`."""
    hook, layer = split_key(key)
    hook = _OLD_HOOKS.get(hook, hook).replace(".", "_")
    place = hook if layer is None else f"layer_{layer}_{hook}"
    return f"activations_{session_id.replace('_', '-')}_{rollout_id}_{place}.pt"


def export_pt(session: Session, folder: Path, *, on_progress: Callable[[int], None] = lambda _: None) -> int:
    """Write every key of every rollout to its own file; existing files are kept.

    Args:
        session: the session; retried rollouts are exported once.
        folder: the output folder, created if absent.
        on_progress: called with the number of rollouts done.

    Returns:
        The number of files.

    Raises:
        StoreError: if the session or some of its rollouts cannot be read; all other rollouts have been written then.
        OSError: if a file cannot be written; existing files are complete.
    """
    make_folder(folder)
    frame = session.rollouts(columns=())
    files = 0
    unread: list[tuple[str, StoreError]] = []
    for number in range(len(frame)):
        row = frame.iloc[number : number + 1]
        try:
            files += _export_rollout(session, row, folder)
        except StoreError as error:
            unread.append((row["rollout_id"].iloc[0], error))
        on_progress(number + 1)
    if unread:
        rollout_id, reason = unread[0]
        raise StoreError(
            f"{len(unread)} of {len(frame)} rollouts cannot be read and were skipped; the first is {rollout_id}: {reason}; "
            f"the others are in {folder}"
        )
    return files


def _export_rollout(session: Session, row: pd.DataFrame, folder: Path) -> int:
    """Write the missing files of one rollout; return the number of its files."""
    keys = session.spec(row["shard"].iloc[0]).keys
    for key in keys:
        path = folder / pt_file_name(session.name, row["rollout_id"].iloc[0], key)
        if not path.exists():
            values = session.activations(key, where=row)[0].values.float().unsqueeze(0).clone()
            with atomic_write(path) as temporary:
                torch.save(values, temporary)
    return len(keys)


class TorchRollouts(IterableDataset[dict[str, Any]]):
    """A torch dataset: `rollout_id`, `values` (`[rows, *shape]`, as stored), `position` (`[rows]`) and `labels`.

    The workers of a DataLoader split the rollouts among them. Batches of ragged rollouts need a collate function.
    """

    def __init__(self, uri: str, key: str, where: pd.DataFrame, positions: str) -> None:
        self._uri, self._key, self._where, self._positions = uri, key, where, positions

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        frame = self._where.iloc[first::step]
        rows = Session.open(self._uri).activations(self._key, where=frame, positions=self._positions)
        for item, labels in zip(rows, frame["labels"], strict=True):
            yield {
                "rollout_id": item.rollout_id,
                "values": item.values,
                "position": torch.from_numpy(item.position.copy()),
                "labels": labels,
            }


def to_torch(session: Session, key: str, *, where: pd.DataFrame | None = None, positions: str = "all") -> TorchRollouts:
    """Return a torch dataset of one key's rows; the arguments are those of `Session.activations`."""
    return TorchRollouts(session.uri, key, _wanted(session, where), positions)


def to_hf(session: Session, key: str, *, where: pd.DataFrame | None = None, positions: str = "all") -> "Dataset":
    """Return a Hugging Face dataset of one key's rows in float32, written to its cache one rollout at a time.

    Columns: `rollout_id`, `problem_id`, `epoch`, `turn`, `position` (list), `values` (list of rows).
    """
    from datasets import Dataset

    frame = _wanted(session, where)

    def examples(uri: str, key: str, positions: str) -> Iterator[dict[str, Any]]:
        rows = Session.open(uri).activations(key, where=frame, positions=positions)
        for item, row in zip(rows, frame.to_dict("records"), strict=True):
            keyed = {name: None if pd.isna(row[name]) else row[name] for name in ("problem_id", "epoch", "turn")}
            yield {"rollout_id": item.rollout_id, **keyed, "position": item.position.tolist(), "values": _floats(item)}

    made: Dataset = Dataset.from_generator(
        examples, gen_kwargs={"uri": session.uri, "key": key, "positions": positions}
    )
    return made


def all_to_hf(session: Session, *, positions: str = "all") -> "DatasetDict":
    """Return a Hugging Face dataset per key, as made by `to_hf`."""
    from datasets import DatasetDict

    return DatasetDict({key: to_hf(session, key, positions=positions) for key in session.keys()})  # noqa: SIM118 - no dict


def to_ray(session: Session, key: str, *, where: pd.DataFrame | None = None, positions: str = "all") -> "RayDataset":
    """Return a Ray Dataset of one key's rows in float32; Ray's tasks read the rows, so their nodes must reach the store.

    Columns: those of `LOCATION` (`store.reader`), `position` and `values` (`[rows, *shape]`).
    """
    import ray.data

    uri = session.uri

    def read(batch: pd.DataFrame) -> pd.DataFrame:
        rows = list(Session.open(uri).activations(key, where=batch, positions=positions))
        ragged = {"position": [item.position for item in rows], "values": [_floats(item) for item in rows]}
        return batch.assign(**{name: pd.Series(column, index=batch.index) for name, column in ragged.items()})

    frame = _wanted(session, where).drop(columns="labels")
    made: RayDataset = ray.data.from_pandas(frame).map_batches(read, batch_format="pandas", batch_size=256)
    return made


def _floats(item: RolloutRows) -> Any:
    return item.values.float().numpy()


def _wanted(session: Session, where: pd.DataFrame | None) -> pd.DataFrame:
    return session.rollouts(columns=("labels",)) if where is None else where
