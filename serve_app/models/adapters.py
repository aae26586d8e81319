"""Loads a model, and merges its adapter into the weights if it has one.

An adapter (LoRA and similar methods, as saved by peft) is a small set of weights that changes another model's weights. It is
merged: every weight is then the adapted model's own, and module paths do not change, so hook points, caches and probes work as
for any model. An adapter that cannot be merged (prompt tuning, which adds tokens, or one that acts only after certain tokens)
is rejected by name. An adapter whose weights do not fit the base model is an error that names them. The merged model is
compared with the unmerged one on a few tokens.
"""

import importlib.util
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from serve_app.models.errors import WeightsError
from serve_app.models.model_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, ModelSource
from serve_app.models.weights import MOST_NAMED, natural, read_module

ADAPTER_NAME = "default"
"""peft's name of a model's only adapter."""

PROBE_TOKENS = 8
"""Number of tokens that the merged and the unmerged model are compared on."""

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest difference of logits between them, relative to the largest logit: merging rounds the weights once more."""


def read_model(source: ModelSource, **options: Any) -> PreTrainedModel:
    """Load a source's weights, and merge its adapter into them.

    Args:
        source: what to load.
        options: options of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        WeightsError: if weights of the model or the adapter are missing, or do not fit each other.
    """
    adapter = source.adapter
    if adapter is None:
        return read_module(source.path, source.name, **options)
    config = _read_config(adapter, source.name)
    if not Path(source.path, ADAPTER_CONFIG).exists():
        return _merge(read_module(source.path, source.name, **options), config, adapter, source.name)
    # transformers would load the adapter beside the weights, unmerged, so it gets a folder with the base model only.
    with tempfile.TemporaryDirectory(prefix="roentgen-base-") as folder:
        for file in Path(source.path).iterdir():
            if file.name not in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS):
                Path(folder, file.name).symlink_to(file)
        base = read_module(folder, source.name, **options)
    base.config._name_or_path = source.path
    return _merge(base, config, adapter, source.name)


def _read_config(adapter: Adapter, name: str) -> Any:
    """Read an adapter's configuration, before the base model is loaded.

    Raises:
        WeightsError: if it cannot be merged into a model, or peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise WeightsError(
            f"model {name!r} is an adapter ({adapter.peft_type}), which needs peft: pip install 'peft>=0.21,<0.22'"
        )
    from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig

    try:
        config = PeftConfig.from_pretrained(adapter.path, revision=adapter.commit)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise WeightsError(f"model {name!r}: peft cannot read its {ADAPTER_CONFIG}: {error}") from error
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    reason = None
    if config.is_prompt_learning or config.is_adaption_prompt or not hasattr(tuner, "merge_and_unload"):
        reason = "it changes the model's input and not its weights"
    elif getattr(config, "alora_invocation_tokens", None):
        reason = "it acts only after certain tokens (alora_invocation_tokens)"
    elif getattr(config, "layer_replication", None):
        reason = "it runs layers of the model more than once (layer_replication)"
    if reason is not None:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise WeightsError(
            f"model {name!r} is an adapter of type {kind} that cannot be merged into its model: {reason}"
        )
    return config


def _merge(base: PreTrainedModel, config: Any, adapter: Adapter, name: str) -> PreTrainedModel:
    """Merge an adapter into its base model.

    Raises:
        WeightsError: if it was made for another model.
    """
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights

    config.inference_mode = True
    device = base.get_input_embeddings().weight.device
    try:
        stored = load_peft_weights(adapter.path, device=str(device), revision=adapter.commit)
        _fit_vocabulary(base, stored)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of embeddings that are tied: `_untie`
            model = PeftModel(base, config).eval()
            _load(model, config, stored)
            expected = _logits(model)
            _untie(base)
            merged: PreTrainedModel = cast(Any, model.merge_and_unload)().eval()
    except (KeyError, NotImplementedError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise WeightsError(f"model {name!r}: its adapter does not fit its base model: {_bounded(error)}") from error
    off = (_logits(merged) - expected).abs().max() / expected.abs().max()
    if off > TOLERANCE.get(merged.dtype, 0.1):
        raise WeightsError(
            f"model {name!r}: merging its adapter changes the model's logits (by {float(off):.1%}): merge it with "
            "the library that created it, and load the merged model"
        )
    return merged


def _load(model: Any, config: Any, stored: dict[str, Tensor]) -> None:
    """Load an adapter's weights into its modules.

    Raises:
        ValueError: if some are missing or left over.
    """
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils.save_and_load import set_peft_model_state_dict

    result: Any = set_peft_model_state_dict(model, stored)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    missing = [key for key in result.missing_keys if prefix in key and ADAPTER_NAME in key.split(".")]
    problems = [
        f"{len(keys)} weights {problem}: {', '.join(sorted(keys, key=natural)[:MOST_NAMED])}"
        f"{f' and {len(keys) - MOST_NAMED} more' if len(keys) > MOST_NAMED else ''}"
        for keys, problem in (
            (missing, "are missing"),
            (result.unexpected_keys, "belong to no module of that model"),
        )
        if keys
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _fit_vocabulary(base: PreTrainedModel, stored: dict[str, Tensor]) -> None:
    """Resize a base model's embeddings to those saved with an adapter, which was trained with added tokens."""
    embedding = base.get_input_embeddings()
    path = next(path for path, module in base.named_modules() if module is embedding)
    saved = stored.get(f"base_model.model.{path}.weight")
    if saved is not None and saved.shape[0] != embedding.weight.shape[0]:
        base.resize_token_embeddings(saved.shape[0], mean_resizing=False)


def _untie(base: PreTrainedModel) -> None:
    """Give the output head its own weights if the adapter changes only the head or only the embedding that it is tied to."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    if None in ends or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    taken, given = (end.base_layer if hasattr(end, "base_layer") else end for end in ends)
    if getattr(taken, "weight", None) is getattr(given, "weight", None):
        given.weight = nn.Parameter(given.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Return the logits of a few tokens."""
    embedding = model.get_input_embeddings()
    tokens = torch.arange(PROBE_TOKENS, device=embedding.weight.device) % embedding.weight.shape[0]
    logits: Tensor = model(input_ids=tokens[None]).logits.float()
    return logits


def _bounded(error: Exception) -> str:
    """Return an error's message, cut to a few lines: torch lists every weight of another shape."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    rest = len(lines) - MOST_NAMED - 1
    return " ".join(lines[: MOST_NAMED + 1]) + (f" and {rest} more" if rest > 0 else "")
