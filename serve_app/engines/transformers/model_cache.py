"""Finds out how a model's forward takes its cache, and whether the engine can keep that cache between forwards.

Models name the argument differently (`past_key_values`; `cache_params` in state-space models; `state` in RWKV), and some keep
recurrent states in their own modules as well. The engine must know all of this: an unknown state would pass from one request
to another. So the engine first runs a few short forwards to find out. A model whose cache it cannot keep is rejected then,
with the reason, and not at its first request.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from serve_app.engines.transformers.kv_cache import cache_tensors, is_continuous
from serve_app.models.architecture import UnsupportedModelError

CACHES = ("past_key_values", "cache_params", "state")
"""Names of the cache in the arguments and outputs of forwards."""

ROWS, LENGTH = 3, 6
"""Number of sequences, and tokens of each, that a model is tested with."""


@dataclass(frozen=True)
class ForwardInputs:
    """The inputs of one forward."""

    tokens: Int[Tensor, "batch width"]
    """The new tokens."""
    mask: Int[Tensor, "batch context"]
    """Attention mask of all columns; 0 is padding."""
    positions: Int[Tensor, "batch width"]
    """Position ids of the new tokens."""
    cache: Any
    """The cache; None if the model creates its own."""
    logits_to_keep: int = 1
    """Number of columns to compute logits for; 0 for all."""

    @property
    def begins(self) -> bool:
        """Whether these are the first tokens of their sequences."""
        return self.mask.shape[1] == self.tokens.shape[1]


@dataclass(frozen=True)
class CacheSupport:
    """Properties of a model's cache."""

    argument: str
    """Name of the cache in its forward's arguments and output."""
    named: frozenset[str] | None
    """Other named arguments of its forward; None if it accepts any."""
    continuous: bool
    """Whether the cache is past keys and values in every layer and nothing else, so that rows can join and leave."""
    config: PretrainedConfig | None = None
    """Configuration to create a cache from; None if the model creates it itself."""
    alone: bool = False
    """Whether it continues correctly with one sequence at a time only."""
    modules: tuple[tuple[nn.Module, str], ...] = ()
    """Modules that keep a state per sequence themselves, each with the attribute's name."""
    token_bytes: int = 0
    """Bytes that a token adds to the cache of a sequence."""
    sequence_bytes: int = 0
    """Bytes of a sequence's cache that do not depend on its length."""

    def arguments(self, inputs: ForwardInputs, device: torch.device) -> dict[str, Any]:
        """Return a forward's arguments. A model with states only, and no past tokens, masks the new tokens only."""
        mask = inputs.mask if self.argument == "past_key_values" else inputs.mask[:, -inputs.tokens.shape[1] :]
        found = {
            "input_ids": inputs.tokens.to(device),
            "attention_mask": mask.to(device),
            "position_ids": inputs.positions.to(device),
            "use_cache": True,
            "logits_to_keep": inputs.logits_to_keep,
            self.argument: inputs.cache,
        }
        return {name: value for name, value in found.items() if self.named is None or name in self.named}

    def given(self, output: Any, cache: Any) -> Any:
        """Return the cache after a forward: the given one, or the one that the model created."""
        return output[self.argument] if cache is None or self.argument == "state" else cache

    def new_cache(self) -> Cache | None:
        """Return the cache for a prefill: one that keeps every column of every layer, or None for the model's own kind."""
        if self.continuous:
            return DynamicCache()
        return None if self.config is None else DynamicCache(config=self.config)


def inspect_cache(model: PreTrainedModel, device: torch.device) -> CacheSupport:
    """Test a model's cache with a few short forwards.

    Args:
        model: on its device.
        device: where its token ids must be.

    Raises:
        UnsupportedModelError: if it has no cache, or one that the engine cannot keep.
    """
    parameters = inspect.signature(model.forward).parameters
    argument = next((name for name in CACHES if name in parameters), None)
    kind = type(model).__name__
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    if argument is None and takes_any:  # a wrapper that passes its arguments on
        argument = CACHES[0]
    if argument is None:
        raise UnsupportedModelError(f"{kind} takes no cache of past tokens, so it cannot generate here")
    stateful = argument != "past_key_values" or getattr(model, "_is_stateful", False)
    named = None if takes_any else frozenset(parameters)
    if not stateful and _only_past_tokens(model.config):
        ways = [CacheSupport(argument, named, continuous=True)]
    else:
        ways = [CacheSupport(argument, named, continuous=False, config=config) for config in (None, model.config)]
    failure: Exception | None = None
    for rows in (ROWS, 1):
        for way in ways:
            try:
                with torch.inference_mode():
                    return _try_cache(model, replace(way, alone=rows == 1), device, rows)
            except Exception as error:  # noqa: BLE001 - with any error, the engine cannot use the model in this way
                failure = failure or error
    if isinstance(failure, UnsupportedModelError):
        raise failure
    reason = str(failure).strip().split("\n")[0]
    raise UnsupportedModelError(
        f"{kind} does not continue from its cache as the engine keeps it ({type(failure).__name__}: {reason})"
    ) from failure


def _only_past_tokens(config: PretrainedConfig) -> bool:
    try:
        return is_continuous(config)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False  # transformers' cache does not support this configuration: the model creates its own


def _try_cache(model: PreTrainedModel, found: CacheSupport, device: torch.device, rows: int) -> CacheSupport:
    """Run a prefill and a step, and the same tokens without a cache; measure the cache, and find states outside of it."""
    kind = type(model).__name__
    size = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(2 * rows * (LENGTH + 1)).view(2, rows, LENGTH + 1) % size

    def run(ids: Tensor, start: int, cache: Any) -> tuple[Tensor, Any]:
        stop = start + ids.shape[1]
        positions = torch.arange(start, stop).expand(rows, -1)
        mask = torch.ones(rows, stop, dtype=torch.long)
        arguments = found.arguments(ForwardInputs(ids, mask, positions, cache), device)
        # Bypass the module's hooks: these forwards belong to no request.
        output = model.forward(**arguments)
        return output.logits[:, -1].float(), found.given(output, cache)

    def prefill(which: int) -> Any:
        return run(tokens[which, :, :LENGTH], 0, found.new_cache())[1]

    def step(cache: Any) -> Tensor:
        return run(tokens[0, :, LENGTH:], LENGTH, cache)[0]

    before = dict(_attributes(model))
    cache = prefill(0)
    modules = [place for place, value in _attributes(model) if value is not before.get(place) and _per_row(value, rows)]
    whole = [tensor for tensor in cache_tensors(cache) if tensor.numel() > 1]
    if not whole and not modules:
        raise UnsupportedModelError(f"{kind} keeps no cache of past tokens, so it cannot generate here")
    strange = next((tensor for tensor in whole if not _per_row(tensor, rows)), None)
    if strange is not None:
        raise UnsupportedModelError(
            f"{kind} has a cache that the engine does not support: a tensor of shape {list(strange.shape)} for {rows} sequences"
        )
    size_before = sum(tensor.nbytes for tensor in whole)
    expected = step(cache)
    whole_read = run(tokens[0], 0, found.new_cache())[0]
    # Wrong logits are as far away as another sequence's; rounding is not.
    another = whole_read.roll(1, 0) if rows > 1 else run(tokens[1], 0, found.new_cache())[0]
    if (expected - whole_read).norm() > 0.3 * (another - whole_read).norm() + 1e-3 * whole_read.norm():
        raise UnsupportedModelError(f"{kind} has other logits with its cache than without, so it cannot generate here")
    grown = (sum(tensor.nbytes for tensor in cache_tensors(cache)) - size_before) // rows
    token_bytes = max(grown, 0)
    found = replace(found, token_bytes=token_bytes, sequence_bytes=max(0, size_before // rows - LENGTH * token_bytes))
    if found.continuous and not modules:
        return found
    if found.continuous:  # what modules keep need not be a state
        mine, others = prefill(0), prefill(1)
        again, elsewhere = step(mine), step(others)
        # The same shapes give nearly the same numbers; a larger difference comes from the other sequences.
        if not (again - expected).norm() > 0.1 * (elsewhere - expected).norm():
            return found
    by_id = {id(module): module for module in model.modules()}
    own = {"continuous": False, "config": model.config} if found.continuous else {}
    return replace(found, modules=tuple((by_id[key], name) for key, name in modules), **own)


def _attributes(model: nn.Module) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """Yield the tensors that modules keep as plain attributes, apart from parameters and buffers."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield (id(module), name), value


def _per_row(tensor: Tensor, rows: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == rows
