"""The cases of docs/architectures.md: the configurations to try, and the page's wording of the results.

A case is a model type of transformers with options of its configuration, written as in the first cell of a row. Every
causal model type is tried with its default configuration, unless this module declares options for it.
"""

import ast
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from roentgen.contract import LAYER_HOOK_POINTS, MODEL_HOOK_POINTS
from serve_app.capture.structure import ModelStructure

COLUMNS = (*LAYER_HOOK_POINTS, *MODEL_HOOK_POINTS)

DECODER = ("", "is_decoder=True")
"""Encoders that can also be decoders, depending on their configuration."""

HALF = ("", "is_decoder=True is_encoder_decoder=False")
"""Encoder-decoders, and their decoder without cross-attention."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "bamba": ("attn_layer_indices=[2]",),
    "bart": HALF,
    "bert": DECODER,
    "bert-generation": DECODER,
    "big_bird": DECODER,
    "bigbird_pegasus": HALF,
    "blenderbot": HALF,
    "blenderbot-small": HALF,
    "camembert": DECODER,
    "data2vec-text": DECODER,
    "deepseek_v2": ("num_experts_per_tok=6",),
    "dots1": ("n_routed_experts=128 num_experts_per_tok=6 n_shared_experts=2",),
    "electra": DECODER,
    "ernie": DECODER,
    "falcon": (
        "",
        "new_decoder_architecture=True num_attention_heads=64 hidden_size=8192",
        "parallel_attn=False",
    ),
    "falcon_h1": ("hidden_size=32 mamba_d_ssm=64 mamba_n_heads=8 mamba_d_head=8 mamba_n_groups=1",),
    "gpt_neox": ("", "use_parallel_residual=False"),
    "granite": ("", "residual_multiplier=0.22"),
    "granitemoehybrid": ("", "layer_types=['linear_attention','full_attention'] num_hidden_layers=2"),
    "hunyuan_v1_dense": ("head_dim=128",),
    "hunyuan_v1_moe": ("head_dim=128",),
    "mamba2": ("hidden_size=32 num_heads=8 head_dim=8 n_groups=2 state_size=16 vocab_size=512",),
    "marian": HALF,
    "mbart": HALF,
    "megatron-bert": DECODER,
    "ministral": ("head_dim=128",),
    "mvp": HALF,
    "nemotron": ("num_key_value_heads=8",),
    "opt": ("", "do_layer_norm_before=False"),
    "pegasus": HALF,
    "phi3": ("", "rope_type='longrope'"),
    "plbart": HALF,
    "prophetnet": HALF,
    "rembert": DECODER,
    "roberta": DECODER,
    "roberta-prelayernorm": DECODER,
    "roc_bert": DECODER,
    "roformer": DECODER,
    "rwkv": ("hidden_size=32 attention_hidden_size=32 vocab_size=512",),
    "stablelm": ("", "use_parallel_residual=True"),
    "whisper": HALF,
    "xlm-roberta": DECODER,
    "xlm-roberta-xl": DECODER,
    "xlstm": ("hidden_size=32 num_heads=4 embedding_dim=32 vocab_size=512",),
    "xmod": ("default_language='en_XX'", "default_language='en_XX' is_decoder=True"),
}
"""Options of the cases by model type: features that are off by default, and other kinds of blocks."""

NARROW_ALREADY = ("mamba2", "rwkv", "xlstm")
"""Model types whose options are narrow themselves, because their widths cannot be narrowed."""

LONGROPE: dict[str, Any] = {
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 48,
        "long_factor": [1.0 + i for i in range(48)],
    },
}
"""The parameters of the option `rope_type='longrope'`: RoPE as in Phi-3's models with a context of 128k tokens."""

WHOLE = ("gpt_neo", "gemma3n_text")
"""Model types whose other options do not allow fewer layers."""

FEWER_LAYERS = {"num_hidden_layers": 6}
"""Enough for every pattern of layers, and quick."""

WORDS = {
    "in parallel": "parallel",
    "no normalization layer was found between": "no norm",
    "×": "scaled",
    "normalizes the residual stream": "post-norm",
    "makes one contribution": "one addition",
    "accounts for the residual stream": "not found",
    "the MLP's contribution was not found": "not found",
    "no attention": "no attention",
    "dense": "dense",
    "not a mixture of experts": "dense",
    "no module outputs the linear projection": "not found",
    "no normalization layer was found after": "not found",
    "not a row per token": "no rows",
}
"""Wording of the table for a missing hook point, by reason."""

REFUSALS = {
    "encoder-decoder": "encoder-decoder",
    "not a causal decoder": "reads ahead",
    "does not count positions from 0": "other positions",
    "has no AutoModelForCausalLM": "not causal",
    "keeps no cache": "no cache",
    "does not continue from its cache": "other cache",
    "has no cache that this engine": "other cache",
    "runs more than once": "repeated layers",
}
"""Wording of the table for a rejected model, by reason."""


def cases() -> list[str]:
    """Return all cases, in the order of the table."""
    kinds = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, key=lambda name: name.replace("-", "_"))
    return [f"{kind} {options}".strip() for kind in kinds for options in OPTIONS.get(kind, ("",))]


def configuration(case: str, **others: object) -> PretrainedConfig:
    """Return the configuration of a case. Its own options come before others."""
    model_type, *options = case.split()
    given = {name: ast.literal_eval(value) for name, _, value in (option.partition("=") for option in options)}
    if given.get("rope_type") == "longrope":
        del given["rope_type"]
        given |= LONGROPE
    return AutoConfig.for_model(model_type, **others | given)


def in_six_layers(case: str) -> PretrainedConfig:
    """Return the configuration of a case with its first layers only, where that can be built."""
    return configuration(case, **({} if case in WHOLE else FEWER_LAYERS))


def cell(structure: ModelStructure, name: str) -> str:
    """Return the table's wording for a hook point."""
    if name in MODEL_HOOK_POINTS:
        reasons = [structure.missing[name]] if name in structure.missing else []
        somewhere = name in structure.taps
    else:
        reasons, somewhere = list(structure.absences(name)), bool(structure.locations(name))
    words = [next((word for said, word in WORDS.items() if said in reason), reason) for reason in reasons]
    return " / ".join(dict.fromkeys(["✓"] * somewhere + words))


def refusal(reason: str) -> str:
    """Return the table's wording for a rejected model."""
    return next((words for said, words in REFUSALS.items() if said in reason), "refused")
