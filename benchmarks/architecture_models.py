"""Builds the narrow random models of `benchmarks.architectures`.

Their configurations are narrowed as the server narrows them (`serve_app.capture.narrowing`). They have few layers, short
windows and no end-of-text token, so that every prompt runs for the requested length.
"""

import torch
import transformers as tr
from transformers import PreTrainedModel

from benchmarks.architecture_cases import NARROW_ALREADY, configuration
from serve_app.capture.narrowing import narrowed, rotation_limit

LAYERS = 6
WINDOW, LIMIT = 12, 24
"""The tokens of a narrow model's sliding window, and beyond which its rotation of positions changes."""

MOST_PARAMETERS = 200_000_000

HALF = {
    **dict.fromkeys(("d_model", "hidden_size"), 32),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 48),
}
"""The widths of a narrow encoder-decoder, whose configuration has two of each."""


class CannotBeBuiltError(Exception):
    """No narrow model of a configuration can be built that runs."""


def shallow(config: tr.PretrainedConfig) -> None:
    """Reduce a configuration to its first layers, including per-layer settings."""
    fields = vars(config)
    name = next((n for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in fields), None)
    if name is None or fields[name] <= LAYERS:
        return
    for key, value in list(fields.items()):
        if isinstance(value, list) and len(value) == fields[name]:
            fields[key] = value[:LAYERS]
        elif key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"):
            fields[key] = LAYERS


def narrow_config(config: tr.PretrainedConfig, *, four_heads: bool, few_layers: bool) -> tr.PretrainedConfig:
    """Return a configuration as narrow as it can be, which ends no sequence by itself."""
    kept = rotation_limit(config) is not None
    if config.model_type not in NARROW_ALREADY:
        config = narrowed(config, four_heads=four_heads, keep_positions=kept)
    if few_layers:
        shallow(config)
        shallow(config.get_text_config())
    for part in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
        fields = vars(part)
        if {"decoder_attention_heads", "num_decoder_attention_heads"} & fields.keys():
            fields |= {name: width for name, width in HALF.items() if name in fields}
        if isinstance(fields.get("sliding_window"), int):
            part.sliding_window = WINDOW
        if kept:
            part.original_max_position_embeddings = LIMIT
            part.rope_parameters["original_max_position_embeddings"] = LIMIT
        fields["eos_token_id"] = fields["bos_token_id"] = None
        if fields.get("pad_token_id") is not None:
            part.pad_token_id = 0
    return config


def build(case: str) -> PreTrainedModel:
    """Build a narrow random model, with weights large enough for its tokens to depend on one another."""
    said = []
    for four_heads, few_layers in ((True, True), (False, True), (True, False), (False, False)):
        try:
            config = narrow_config(configuration(case), four_heads=four_heads, few_layers=few_layers)
            with torch.device("meta"):
                size = sum(p.numel() for p in tr.AutoModelForCausalLM.from_config(config).parameters())
            if size > MOST_PARAMETERS:
                raise CannotBeBuiltError(f"narrowed, it still has {size:,} parameters")
            torch.manual_seed(0)
            model = tr.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            for parameter in model.parameters():
                if parameter.numel() > 1 and parameter.min() == parameter.max():
                    parameter.data += 0.3 * torch.randn_like(parameter)
                elif parameter.ndim == 2:
                    parameter.data *= 3
            with torch.inference_mode():
                model(input_ids=torch.arange(8)[None] + 3, use_cache=False)
        except CannotBeBuiltError as error:
            said.append(str(error))
        except Exception as error:  # noqa: BLE001 - each way to narrow may fail in its own way
            said.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
        else:
            return model
    raise CannotBeBuiltError("; ".join(dict.fromkeys(said)))
