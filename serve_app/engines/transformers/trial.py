"""Tests a model: runs sequences alone, and together as an engine runs them, and reads their rows at every layer.

Plain PyTorch hooks read the rows, so the results depend on nothing but the model and how it is run.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from serve_app.capture.structure import Tap
from serve_app.capture.watching import nth_tensor
from serve_app.engines.transformers.kv_cache import BatchRows, SlotRows, StaticRows
from serve_app.engines.transformers.model_cache import CacheSupport, ForwardInputs, inspect_cache
from serve_app.engines.transformers.rotation import forget_lengths

EXACT, CHAOTIC = 1e-4, 1e-3
"""The largest relative error of a row in float32, as in `roentgen verify-capture`. In a model whose layers amplify rounding,
it is ten times the error that copies of one sequence in a batch cause in a row, and at most the second value."""

ROUGH = 0.1
"""The same in half precision. Single rows of a correct path differ by some per cent there, and by more at tokens with massive
activations, so only gross faults are distinguished from rounding."""

FEW_ROWS = 0.05
"""Share of rows that may differ: rounding alone can send a token to another expert."""

DECODED = 2
"""Tokens of each sequence that are decoded one by one, after its prompt."""

PIECE = 15
"""Tokens of a prompt that are read at once."""

Rows = Float[Tensor, "layers tokens d"]


class Trial:
    """A model under test.

    Attributes:
        name: the model's name in messages.
        model: the model.
        sequences: the test sequences by name.
    """

    def __init__(self, name: str, model: PreTrainedModel, taps: list[Tap], longest: int) -> None:
        """Draw the test sequences.

        Args:
            name: the model's name in messages.
            model: the model, in evaluation mode, with transformers' own attention.
            taps: where to read rows.
            longest: length of the longest sequence.
        """
        self.name = name
        self.model = model
        self.sequences = sequences(model, longest)
        self._taps = taps
        self._expected: dict[str, Rows] = {}
        noise = float(row_errors(self.alone(self.sequences["short"], copies=3), self.expected("short")).max())
        self._tolerance = ROUGH if model.dtype != torch.float32 else min(max(EXACT, 10 * noise), CHAOTIC)

    @cached_property
    def cache_support(self) -> CacheSupport:
        """Properties of the model's cache.

        Raises:
            UnsupportedModelError: if the engine cannot keep its cache.
        """
        return inspect_cache(self.model, self.model.device)

    def expected(self, name: str) -> Rows:
        """Return a sequence's expected rows: at first, those of one forward of its own."""
        if name not in self._expected:
            self._expected[name] = self.alone(self.sequences[name])
        return self._expected[name]

    def expect(self, name: str, rows: Rows) -> None:
        """Set a sequence's expected rows."""
        self._expected[name] = rows

    def alone(self, sequence: list[int], copies: int = 1) -> Rows:
        """Return a sequence's rows in one forward of its own, or beside copies of itself."""
        forget_lengths(self.model)
        with self._recorded() as forwards:
            self.model(input_ids=torch.tensor([sequence] * copies, device=self.model.device), use_cache=False)
        return torch.stack([layer[0] for layer in forwards[0]])

    def counted(self, sequence: list[int]) -> Rows:
        """Return a sequence's rows in one forward of its own with explicit position ids, as an engine passes them."""
        tokens, positions = torch.tensor([sequence]), torch.arange(len(sequence))[None]
        cache = self.cache_support.new_cache()  # inspected before rows are recorded
        with self._recorded() as forwards:
            self._forward(tokens, torch.ones_like(tokens), positions, cache)
        return torch.stack([layer[0] for layer in forwards[0]])

    def off(self, rows: Sequence[Rows], expected: Sequence[Rows]) -> float:
        """Return the largest relative error of sequences' rows; 0 if no more rows differ than rounding explains."""
        worst = 0.0
        for got, wanted in zip(rows, expected, strict=True):
            errors = row_errors(got, wanted)
            if float((errors > self._tolerance).float().mean()) > FEW_ROWS:
                worst = max(worst, float(errors.max()))
        return worst

    def batched(self, groups: Sequence[Sequence[list[int]]], *, piece: int | None = None) -> list[Rows]:
        """Run sequences as an engine does; returns the rows of each.

        The first group is prefilled with padding on the left; each later group joins after a decoded token.

        Args:
            groups: the sequences of each prefill.
            piece: tokens of a prompt to read at once; None for whole prompts.
        """
        cache_support = self.cache_support
        rows: BatchRows = (
            SlotRows() if cache_support.continuous else StaticRows(cache_support.new_cache, cache_support.modules)
        )
        sequences: list[list[int]] = []
        found: list[list[Tensor]] = []  # per sequence and layer, [tokens, d]
        for group in groups:
            lengths = [len(sequence) - DECODED for sequence in group]
            width = max(lengths)
            padding = torch.tensor([width - length for length in lengths])[:, None]
            tokens = torch.tensor(
                [[0] * int(pad) + seq[:length] for pad, seq, length in zip(padding, group, lengths, strict=True)]
            )
            columns = torch.arange(width)
            mask, positions = (columns >= padding).long(), (columns - padding).clamp(min=0)
            cache = rows.new()
            with self._recorded() as forwards:
                for start in range(0, width, piece or width):
                    stop = min(start + (piece or width), width)
                    cache = self._forward(tokens[:, start:stop], mask[:, :stop], positions[:, start:stop], cache)
            read = [torch.cat(parts, dim=1) for parts in zip(*forwards, strict=True)]
            rows.add(cache, list(range(len(group))), padding[:, 0].tolist(), width)
            sequences += group
            found += [[layer[i, width - length :] for layer in read] for i, length in enumerate(lengths)]
            self._decode(rows, sequences, found)
        for _ in range(DECODED - 1):
            self._decode(rows, sequences, found)
        return [torch.stack(layers) for layers in found]

    def _decode(self, rows: BatchRows, sequences: list[list[int]], found: list[list[Tensor]]) -> None:
        """Decode each sequence's next token; a sequence at its end repeats its last token."""
        tokens = torch.tensor(
            [[seq[min(layers[0].shape[0], len(seq) - 1)]] for seq, layers in zip(sequences, found, strict=True)]
        )
        mask, positions = rows.step_inputs()
        with self._recorded() as forwards:
            cache = self._forward(tokens, mask, positions, rows.cache)
        rows.stepped(cache)
        for i, layers in enumerate(found):
            if layers[0].shape[0] < len(sequences[i]):
                found[i] = [torch.cat([layer, new[i]]) for layer, new in zip(layers, forwards[0], strict=True)]

    def _forward(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Any:
        """Run the model on new tokens; returns the cache to continue with."""
        inputs = ForwardInputs(tokens, mask, positions, cache)
        if inputs.begins:
            forget_lengths(self.model)
        return self.cache_support.given(self.model(**self.cache_support.arguments(inputs, self.model.device)), cache)

    @contextmanager
    def _recorded(self) -> Iterator[list[list[Tensor]]]:
        """Record, per forward and layer, the rows `[batch, tokens, d]`."""
        forwards: list[list[Tensor]] = []
        batch = tokens = 0

        def begin(_module: Any, _args: Any, kwargs: Any) -> None:
            nonlocal batch, tokens
            batch, tokens = kwargs["input_ids"].shape
            forwards.append([])

        def keep(value: Any, place: int) -> None:
            forwards[-1].append(nth_tensor(value, place).float().reshape(batch, tokens, -1).cpu())

        def taken(_module: Any, args: Any, kwargs: Any) -> None:
            keep((args, kwargs), 0)

        def given(_module: Any, _args: Any, output: Any, *, place: int) -> None:
            keep(output, place)

        handles = [self.model.register_forward_pre_hook(begin, with_kwargs=True)]
        for tap in self._taps:
            module = self.model.get_submodule(tap.module)
            handles.append(
                module.register_forward_pre_hook(taken, with_kwargs=True)
                if tap.side == "input"
                else module.register_forward_hook(partial(given, place=tap.index))
            )
        try:
            yield forwards
        finally:
            for handle in handles:
                handle.remove()


def sequences(model: PreTrainedModel, longest: int) -> dict[str, list[int]]:
    """Draw the sequences that a model is tested with; the last `DECODED` tokens of each are decoded.

    Args:
        model: the model, for its vocabulary.
        longest: length of the longest sequence; it exceeds windows, chunks and, in a stand-in, the rotation's limit.

    Returns:
        Sequences by name; a twin has the same length and other tokens.
    """
    config = model.config.get_text_config()
    special: set[int | None] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = getattr(config, name, None)
        special |= set(ids) if isinstance(ids, list) else {ids}
    size = model.get_input_embeddings().weight.shape[0]
    drawn = torch.randint(0, size, (8 * longest,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = iter([token for token in drawn if token not in special])
    lengths = {
        "short": 9,
        "middle": 14,
        "long": longest - 8,
        "longer": longest,
        "short_twin": 9,
        "long_twin": longest - 8,
    }
    return {name: list(islice(tokens, length)) for name, length in lengths.items()}


def row_errors(rows: Rows, expected: Rows) -> Float[Tensor, "tokens"]:
    """Return, per token, the largest relative error of its rows.

    It is infinite where only one of the two is finite, and 0 where neither is: an overflow is not judged here.
    """
    difference = (rows - expected).norm(dim=-1)
    errors = torch.where(difference == 0, 0.0, difference / expected.norm(dim=-1).clamp_min(1e-30)).nan_to_num(math.inf)
    overflown = ~rows.isfinite().all(-1) & ~expected.isfinite().all(-1)
    return errors.masked_fill(overflown, 0.0).amax(0)
