"""Slots of keys and values against the plainest thing they could be: a list of each row's own columns."""

from dataclasses import dataclass

import pytest
import torch
import transformers as tr
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from serve_app.engines.transformers.kv_cache import SlotRows, StaticRows, fill_gaps, is_continuous

LAYERS, HEADS, WIDTH = 2, 2, 3


@dataclass
class Reference:
    """One row: its keys per column, as the layers were given them; values are the negated keys."""

    columns: list[torch.Tensor]


def prefilled(lengths: list[int]) -> tuple[DynamicCache, list[Reference]]:
    """A cache of left-padded rows with random keys, and the keys that each row must read."""
    width = max(lengths)
    cache = DynamicCache()
    keys = torch.randn(len(lengths), HEADS, width, WIDTH)
    for layer in range(LAYERS):
        cache.update(keys + layer, -(keys + layer), layer)
    return cache, [Reference([keys[row, :, c] for c in range(width - n, width)]) for row, n in enumerate(lengths)]


def step(rows: SlotRows, references: list[Reference]) -> None:
    """Write one column for every row, and check everything that attention would read."""
    mask, positions = rows.step_inputs()
    new = torch.randn(len(references), HEADS, 1, WIDTH)
    for layer in range(LAYERS):
        assert rows.cache.get_mask_sizes(1, layer) == (mask.shape[1], 0)
        keys, values = rows.cache.update(new + layer, -(new + layer), layer)
        assert torch.equal(values, -keys)
        assert keys.shape[2] == mask.shape[1]
        for row, reference in enumerate(references):
            if layer == 0:
                reference.columns.append(new[row, :, 0])
            seen = keys[row][:, mask[row].bool()]
            assert torch.equal(seen, torch.stack(reference.columns, dim=1) + layer)
            assert positions[row].item() == len(reference.columns) - 1
    rows.stepped(rows.cache)


Action = st.one_of(
    st.lists(st.integers(1, 90), min_size=1, max_size=4),  # join, with these prompt lengths
    st.integers(1, 40),  # so many steps
    st.sets(st.integers(0, 9), min_size=1, max_size=5),  # leave: these rows, if there are so many
)


@settings(max_examples=60, deadline=None)
@given(st.lists(Action, max_size=14))
def test_rows_that_join_and_leave_keep_what_is_theirs(actions: list[list[int] | int | set[int]]) -> None:
    rows, references = SlotRows(), list[Reference]()
    for action in actions:
        if isinstance(action, list):
            cache, new = prefilled(action)
            width = max(action)
            rows.add(cache, list(range(len(action))), [width - n for n in action], width)
            references += new
        elif isinstance(action, set):
            keep = [row for row in range(len(references)) if row not in action]
            references = [references[row] for row in rows.keep(keep)]
        elif references:
            for _ in range(action):
                step(rows, references)


def test_only_the_rows_asked_for_are_taken_from_a_prefill() -> None:
    rows = SlotRows()
    cache, references = prefilled([5, 2, 9])
    rows.add(cache, [2, 0], [4, 7, 0], 9)
    step(rows, [references[2], references[0]])


@given(st.integers(0, 12).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, max(n - 1, 0))))))
def test_filling_gaps_moves_as_few_rows_as_there_are_gaps(case: tuple[int, set[int]]) -> None:
    n, kept = case
    keep = sorted(row for row in kept if row < n)
    order = fill_gaps(n, keep)
    assert sorted(order) == keep
    assert sum(row != source for row, source in enumerate(order)) == sum(row >= len(keep) for row in keep)


def test_the_slabs_stay_small() -> None:
    """Rows that come and go for a long time must not make the slabs grow."""
    rows = SlotRows()
    for _ in range(30):
        cache, references = prefilled([40])
        rows.add(cache, [0], [0], 40)
        for _ in range(50):
            step(rows, references)
        rows.keep([])
    assert rows.cache.layers[0].keys.shape[2] <= 2 * 90 + 64


def test_which_models_can_run_continuously() -> None:
    assert is_continuous(tr.LlamaConfig())
    assert is_continuous(tr.Gemma2Config())  # sliding-window layers are kept whole and masked
    assert not is_continuous(tr.Qwen3NextConfig())  # recurrent states


def test_a_static_batch_is_filled_once() -> None:
    rows = StaticRows()
    cache, _ = prefilled([3, 1])
    rows.add(cache, [0, 1], [0, 2], 3)
    with pytest.raises(ValueError, match="cannot join"):
        rows.add(prefilled([2])[0], [0], [0], 2)
