"""Checks a model when it is loaded: whether it is a causal decoder, and which requests may share a forward.

What an engine does with a model (another attention, padding on the left, prompts in pieces, keys and values in slots that rows
join and leave) must not change a value. For most architectures it does not. So each model is tested before it serves:

1. *Causality.* The last token of a sequence is changed; no earlier row may change. A model that fails uses later tokens, so it
   cannot generate, and is rejected.
2. *Attention.* The model with grouped attention is compared with the original. If they differ, the original is kept.
3. *Batching.* Sequences of different lengths run as the engine runs them, and each runs alone in one forward of the original.
   If their rows differ, narrower groups are tried (`batching.Kind`), down to one request at a time.

Rows are compared at every layer of two models. The first is a narrow random model in float32 with the same layers and
rotation, whose windows and thresholds are a few tokens wide (`capture.narrowing.stand_in`); there any real difference is far
above rounding. The second is the model itself, in its own dtype, compared within the rounding of that dtype. The first finds
the effects of a configuration, whatever the size and dtype; the second finds gross faults of this model.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from roentgen.contract import stored_key
from serve_app.capture.narrowing import (
    HEADS,
    KEY_VALUE_HEADS,
    LONG,
    one_thread,
    rotation_limit,
    stand_in,
    thresholds,
)
from serve_app.capture.structure import ModelStructure, Tap
from serve_app.engines.batching import KINDS, Batching, Kind, LoadReport
from serve_app.engines.transformers.grouped_attention import use_grouped_attention
from serve_app.engines.transformers.model_cache import CacheSupport
from serve_app.engines.transformers.trial import PIECE, Rows, Trial
from serve_app.models.architecture import UnsupportedModelError

log = logging.getLogger(__name__)

LONGEST = 300
"""Longest sequence in tokens that the model itself is tested with, to cross its windows and chunks."""


@dataclass(frozen=True)
class CheckedModel(LoadReport):
    """A load report with what the engine needs of a tested model."""

    cache_support: CacheSupport | None = None
    """Properties of the model's cache; None if they were not tested."""


def check_loaded(model: PreTrainedModel, structure: ModelStructure) -> CheckedModel:
    """Check a loaded model, and switch it to grouped attention if that changes nothing.

    Args:
        model: the model with transformers' own attention, in evaluation mode.
        structure: its hook points.

    Raises:
        UnsupportedModelError: if it is not a causal decoder, or cannot decode with its cache.
    """
    begun = time.monotonic()
    own: str = model.config._attn_implementation
    limit = rotation_limit(model.config)
    trials: list[Trial] = []
    found, decoding_error, grouped = Batching(), 0.0, _has_grouped_heads(model.config)
    with torch.inference_mode():
        narrow = _narrow_trial(model, structure)
        if narrow is not None:
            with one_thread():
                check_causality(narrow, ("short", "long"))
                if _has_supported_cache(narrow):
                    check_positions(narrow)
                    grouped = grouped and grouped_is_same(narrow)
                    found, decoding_error = find_batching(narrow, LONG if limit else None)
            trials.append(narrow)
        actual = _actual_trial(model, structure)
        if actual is not None:
            check_causality(actual, ("short",))
            check_positions(actual)
            for name in ("middle", "long"):
                actual.expected(name)  # with the untouched attention
            if grouped:
                use_grouped_attention(model)
            crossed = limit if limit and limit < len(actual.sequences["long"]) else None
            batching, error = find_batching(actual, crossed, widest=found.kind)
            if batching.kind != found.kind and grouped:
                model.set_attn_implementation(own)
                log.warning("%s; trying the model's own attention", batching.reason)
                batching, error = find_batching(actual, crossed, widest=found.kind)
            found = batching if batching.kind != found.kind else found
            decoding_error = max(decoding_error, error)
            trials.append(actual)
    if found.kind == "one side of a limit":
        found = replace(found, limit=limit)
    if found.kind != "any":
        log.warning("requests share a forward by %s: %s", found.kind, found.reason)
    return CheckedModel(
        batching=found,
        attention="grouped" if model.config._attn_implementation != own else own,
        decoding_error=decoding_error,
        compared_on=tuple(trial.name for trial in trials),
        cache_support=actual.cache_support if actual is not None else None,
        seconds=time.monotonic() - begun,
    )


def check_causality(trial: Trial, names: Sequence[str]) -> None:
    """Change the last token of sequences: no earlier row may change.

    Raises:
        UnsupportedModelError: if one does.
    """
    for name in names:
        tokens = trial.sequences[name]
        rows = trial.alone([*tokens[:-1], tokens[0] if tokens[0] != tokens[-1] else tokens[1]])
        moved = trial.off([rows[:, :-1]], [trial.expected(name)[:, :-1]])
        if moved:
            raise UnsupportedModelError(
                f"{type(trial.model).__name__} is not a causal decoder: changing the last token changes the rows before it "
                f"(by up to {moved:.0%} of their norm), so it uses later tokens and cannot generate"
            )


def check_positions(trial: Trial) -> None:
    """Pass a sequence's positions, counted from 0, as the engine does: no row may change.

    Raises:
        UnsupportedModelError: if one does.
    """
    moved = trial.off([trial.counted(trial.sequences["short"])], [trial.expected("short")])
    if moved:
        raise UnsupportedModelError(
            f"{type(trial.model).__name__} does not count positions from 0: passing them "
            f"changes rows by {moved:.0%} of their norm"
        )


def grouped_is_same(trial: Trial) -> bool:
    """Switch a tested model to grouped attention; returns whether its rows stay the same. If not, switch it back."""
    groups = [[trial.sequences[name] for name in ("short", "long")]]
    own = trial.model.config._attn_implementation
    untouched = _attempt(trial, groups)
    use_grouped_attention(trial.model)
    switched = _attempt(trial, groups)
    if untouched is not None and switched is not None and not (off := trial.off(switched, untouched)):
        return True
    reason = f"changes rows by {off:.0e} of their norm" if untouched and switched else "does not run"
    log.warning("grouped attention %s on %s: the model keeps %s", reason, trial.name, own)
    trial.model.set_attn_implementation(own)
    return False


def find_batching(trial: Trial, limit: int | None, widest: Kind = "any") -> tuple[Batching, float]:
    """Find the widest kind of batch that changes no rows, and the error of decoding alone against one forward.

    Args:
        trial: the model.
        limit: tokens beyond which its rotation changes; None if the sequences do not cross such a limit.
        widest: the widest kind to try.

    Raises:
        UnsupportedModelError: if it does not run even alone.
    """
    joins = trial.cache_support.continuous
    piece = PIECE if joins else None

    def off(*groups: Sequence[str], piece: int | None = None) -> float:
        rows = _attempt(trial, [[trial.sequences[name] for name in group] for group in groups], piece)
        expected = [trial.expected(name) for group in groups for name in group]
        return math.inf if rows is None else trial.off(rows, expected)

    def error(kind: Kind) -> float:
        match kind:
            case "one side of a limit" if limit is not None and joins:
                # A piece of a prompt does not show how long the prompt is, so prompts beyond the limit are read whole.
                below = off(("short", "middle"), ("short_twin",), piece=piece)
                return max(below, off(("long", "longer"), ("long_twin",)))
            case "any" | "one side of a limit" if not trial.cache_support.alone:
                return off(("short", "long"), ("middle",), piece=piece) if joins else off(("short", "long"))
            case "same length" if not trial.cache_support.alone:
                return max(off(("short", "short_twin")), off(("long", "long_twin")))
            case _:
                return 0.0 if kind == "alone" else math.inf

    beside = error(widest)
    if not beside and widest != "alone":
        return Batching(widest), 0.0
    # The reference is what a request gets alone, even if the model's own decoding differs from one forward.
    decoding_error = 0.0
    for name in trial.sequences:
        rows = _run_alone(trial, name)
        decoding_error = max(decoding_error, trial.off([rows], [trial.expected(name)]))
        trial.expect(name, rows)
    reason = f"beside a longer request, a row differs by {beside:.0e} of its norm ({trial.name})" if beside else ""
    found = next(kind for kind in KINDS[KINDS.index(widest) :] if (limit or "limit" not in kind) and not error(kind))
    return Batching(found, reason=reason), decoding_error


def _run_alone(trial: Trial, name: str) -> Rows:
    try:
        return trial.batched([[trial.sequences[name]]])[0]
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedModelError(
            f"{type(trial.model).__name__} has no cache that this engine can decode with ({type(error).__name__}: {reason})"
        ) from error


def _attempt(trial: Trial, groups: Sequence[Sequence[list[int]]], piece: int | None = None) -> list[Rows] | None:
    """Run sequences as an engine does; None if the model cannot."""
    try:
        return trial.batched(groups, piece=piece)
    except Exception:
        log.debug("%s does not run %d sequences together", trial.name, len(groups[0]), exc_info=True)
        return None


def _has_grouped_heads(config: PretrainedConfig) -> bool:
    """Whether several query heads share a KV head, so that grouped attention is worth testing."""
    text = config.get_text_config()
    if config._attn_implementation != "sdpa":
        return False
    heads = next((n for name in HEADS if isinstance(n := getattr(text, name, None), int)), 0)
    shared = any(isinstance(n := getattr(text, name, None), int) and n < heads for name in KEY_VALUE_HEADS)
    return shared or bool(getattr(text, "multi_query", False))


def _narrow_trial(model: PreTrainedModel, structure: ModelStructure) -> Trial | None:
    narrow = stand_in(type(model), model.config)
    if narrow is None:
        log.warning("no narrow model of this configuration can be built, so batching is checked on the model alone")
        return None
    n_layers = getattr(narrow.config.get_text_config(), "num_hidden_layers", structure.num_layers)
    taps = _taps(structure, min(n_layers, structure.num_layers))
    if not taps:
        return None
    return Trial("a narrow random model of its configuration", narrow.to(model.device), taps, 3 * LONG)


def _has_supported_cache(trial: Trial) -> bool:
    """Whether the engine supports a stand-in's cache; the model itself may behave differently."""
    try:
        return trial.cache_support is not None
    except UnsupportedModelError as error:
        log.warning("batching is checked on the model alone: %s", error)
        return False


def _actual_trial(model: PreTrainedModel, structure: ModelStructure) -> Trial | None:
    taps = _taps(structure, structure.num_layers)
    if not taps:
        log.warning("no layer has a hook point, so batching is not checked")
        return None
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    longest = max([n + 16 for n in thresholds(model.config).values() if n + 16 <= LONGEST], default=2 * LONG)
    return Trial("the model", model, taps, min(longest, context))


def _taps(structure: ModelStructure, n_layers: int) -> list[Tap]:
    """Return the taps to read the first layers' rows at, of the first hook point that layers have."""
    for hook_point in ("resid_post", "resid_pre", "mlp_out", "attn_out"):
        keys = [stored_key(hook_point, layer) for layer in range(n_layers)]
        taps = [structure.taps[key] for key in keys if key in structure.taps]
        if taps:
            return taps
    return []
