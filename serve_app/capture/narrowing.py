"""Finds a model's hook points from its configuration alone: no weights, no download, no accelerator.

The location of hook points depends on how layers are connected, not on how wide they are. So a random model of the same
configuration is built with the same layers in the same pattern, but narrow, and the resolver verifies its hook points as it
would on the weights. A configuration's widths depend on one another in ways that only its own model class knows (heads divide
the width of the stream, rotations divide a head's). So there are two ways to narrow, tried in turn: to four heads, and with
all heads, each of them narrow.
"""

import copy
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from serve_app.capture.resolver import EXPERTS, ResolutionError, resolve_structure
from serve_app.capture.structure import ModelStructure

log = logging.getLogger(__name__)

STAND_IN = "a narrowed random model of this configuration"

MOST_PARAMETERS = 300_000_000
"""Largest number of parameters of a stand-in (1.2 GB in float32)."""

HEAD_WIDTH = 8

ROTATION = ("rope_parameters", "rope_scaling")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Fields that describe rotary positions, and fields of the largest number of positions."""

STREAM = ("hidden_size", "n_embd", "d_model", "emb_dim", "word_embed_proj_dim")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
HEAD_WIDTHS = ("head_dim", "kv_channels", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim")
"""Fields of the width of the residual stream, of the numbers of heads, and of the widths of a head."""

NARROW = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 16,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", "dff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "expert_ffn_hidden_size"), 48),
    "moe_shared_expert_intermediate_size": 16,
    **dict.fromkeys(EXPERTS, 24),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k"), 4),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), HEAD_WIDTH),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 20),
    "qk_head_dim": 2 * HEAD_WIDTH,
    "rotary_dim": HEAD_WIDTH // 2,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), HEAD_WIDTH),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_dt_rank"), 16),
}
"""Largest value of each of these fields in a narrow configuration, whatever the heads are.

The number of experts differs from every other width, so a router cannot be mistaken for another projection.
"""


THRESHOLD = re.compile(r"^(?!.*expert).*(window|chunk|topk|top_k|original_max|compress|block|stride|local|sparse)")
"""Fields of numbers of tokens beyond which a model computes in another way, and of other small numbers."""

MOST_LAYERS = 12
"""Largest number of layers of a stand-in; enough for every known pattern of layers."""

STAND_INS = ((True, True, True), (False, True, True), (False, False, True), (False, True, False), (False, False, False))
"""Ways to build a stand-in, tried in turn: whether to cut layers, to narrow to four heads, and to keep the model's rotation
and thresholds."""

SHORT, LONG = 8, 16
"""Thresholds of a stand-in: of windows and chunks, and of the context that a rotation was first trained on."""


def stand_in(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel | None:
    """Build a narrow random model in float32 that treats positions and batches like a model of this configuration.

    Its layers and its rotation of positions are the model's. Windows, chunks and similar limits are a few tokens wide, so
    short sequences cross them. Its weights are large enough for attention to prefer some tokens to others. Its first layers
    stand for all layers, where a configuration with fewer layers can be built.

    Returns:
        The model on the CPU; None if no such model could be built and run.
    """
    tokens = torch.arange(2 * LONG).view(1, -1)
    for fewer_layers, four_heads, whole in STAND_INS:
        narrow = narrowed(config, four_heads=four_heads, keep_positions=whole)
        if whole:
            _shorten(narrow)
        if fewer_layers:
            _cut_layers(narrow, MOST_LAYERS)
        try:
            model = _random_model(narrow, model_class._from_config)
            _sharpen(model)
            with torch.inference_mode():
                output = model(input_ids=tokens, use_cache=False)
        except Exception:
            log.debug("no stand-in with %s", (fewer_layers, four_heads, whole), exc_info=True)
            continue
        if bool(output.logits.isfinite().all()):
            return model
    return None


def thresholds(config: PretrainedConfig) -> dict[str, int]:
    """Return the numbers of tokens beyond which a model computes in another way, by field."""
    found: dict[str, int] = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            found |= thresholds(value)
        elif isinstance(value, dict) and name in ROTATION:
            inner = (
                value
                if "rope_type" in value
                else {k: v for d in value.values() if isinstance(d, dict) for k, v in d.items()}
            )
            found |= {key: n for key, n in inner.items() if THRESHOLD.search(key) and isinstance(n, int)}
        elif THRESHOLD.search(name) and isinstance(value, int) and not isinstance(value, bool) and value > LONG:
            found[name] = value
    return found


def rotation_limit(config: PretrainedConfig) -> int | None:
    """Return the tokens beyond which a rotation uses other frequencies (LongRoPE, arXiv 2402.13753); None for no limit."""
    text = config.get_text_config()
    rotation = getattr(text, "rope_parameters", None) or {}
    for part in (rotation, *rotation.values()):
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            limit = part.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            return int(limit or text.max_position_embeddings)
    return None


def _shorten(config: PretrainedConfig) -> None:
    """Lower a configuration's thresholds, in place."""
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            _shorten(value)
        elif isinstance(value, dict) and name in ROTATION:
            for part in (value, *value.values()):
                if isinstance(part, dict) and "original_max_position_embeddings" in part:
                    part["original_max_position_embeddings"] = LONG
        elif THRESHOLD.search(name) and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, name, min(value, LONG if "original_max" in name else SHORT))


def _cut_layers(config: PretrainedConfig, most: int) -> None:
    """Cut a configuration to its first layers, in place, with its lists of a value per layer."""
    for part in vars(config).values():
        if isinstance(part, PretrainedConfig):
            _cut_layers(part, most)
    n_layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(n_layers, int) or n_layers <= most:
        return
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == n_layers:
            setattr(config, name, value[:most])
    config.num_hidden_layers = most


def _sharpen(model: PreTrainedModel) -> None:
    """Scale a random model's matrices in place, so that outputs are as large as inputs."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and 0 < (spread := float(parameter.detach().std())) < 0.1:
            parameter.data *= parameter.shape[-1] ** -0.5 / spread


def resolve_config(config: PretrainedConfig, model_name: str) -> ModelStructure:
    """Find and verify a model's hook points on a narrow random model of its configuration.

    Returns:
        The structure, with the configuration's own number of layers and width.

    Raises:
        ResolutionError: if no narrow model could be built and resolved; the message has the reason for each.
    """
    errors: list[str] = []
    for four_heads in (True, False):
        narrow = narrowed(config, four_heads=four_heads)
        try:
            with one_thread():
                structure = resolve_structure(_random_model(narrow), model_name)
        except ResolutionError as error:
            errors.append(str(error))
        else:
            width = structure.d_model * _width(config) // _width(narrow)
            return dataclasses.replace(structure, d_model=width, verified_on=STAND_IN)
    raise ResolutionError(
        f"the configuration alone is not enough; give the weights: {'; '.join(dict.fromkeys(errors))}"
    )


def narrowed(config: PretrainedConfig, *, four_heads: bool, keep_positions: bool = False) -> PretrainedConfig:
    """Copy a configuration with narrow widths and few experts, but all its layers.

    Args:
        config: of a whole model, or of one of its parts.
        four_heads: narrow to four heads; otherwise keep all heads.
        keep_positions: keep the rotation of positions, which may have a number per dimension, and the number of positions.
    """
    narrow = copy.deepcopy(config)
    fields = vars(narrow)
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            setattr(narrow, name, narrowed(value, four_heads=four_heads, keep_positions=keep_positions))
        elif isinstance(value, int) and value > NARROW.get(name, value) and not (keep_positions and name in POSITIONS):
            setattr(narrow, name, NARROW[name])
        elif isinstance(value, dict) and name in ROTATION:
            setattr(narrow, name, _fewer_factors(value) if keep_positions else _plain_rotation(value))
    heads = next((n for name in HEADS if isinstance(n := fields.get(name), int)), None)
    if heads is not None:
        kept = 4 if four_heads else heads
        for name in HEADS:
            if name in fields:
                setattr(narrow, name, kept)
        for name in KEY_VALUE_HEADS:
            if four_heads and isinstance(n := fields.get(name), int):
                setattr(narrow, name, 1 if n == 1 else 4 if n == heads else 2)
        for name in HEAD_WIDTHS:
            if isinstance(fields.get(name), int):
                setattr(narrow, name, HEAD_WIDTH)
        for name in STREAM:
            if isinstance(fields.get(name), int):
                setattr(narrow, name, kept * HEAD_WIDTH)
    if isinstance(pad := fields.get("pad_token_id"), int):
        narrow.pad_token_id = min(pad, NARROW["vocab_size"] - 1)
    narrow.quantization_config = None
    return narrow


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: for such small matrices, distributing work takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _plain_rotation(parameters: dict[str, Any]) -> dict[str, Any]:
    """Drop the scaling of rotary positions, which may have a number per dimension; it does not move hook points."""
    plain = {name: _plain_rotation(value) if isinstance(value, dict) else value for name, value in parameters.items()}
    return plain | {"rope_type": "default"} if "rope_type" in parameters else plain


def _fewer_factors(parameters: dict[str, Any]) -> dict[str, Any]:
    """Keep the scaling of rotary positions, with as many factors per dimension as a narrow head needs."""
    pairs = int(HEAD_WIDTH * parameters.get("partial_rotary_factor", 1)) // 2
    kept: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            kept[name] = _fewer_factors(value)
        elif name in ("short_factor", "long_factor") and isinstance(value, list):
            kept[name] = [value[i * len(value) // pairs] for i in range(pairs)]
        else:
            kept[name] = value
    return kept


def _width(config: PretrainedConfig) -> int:
    """Return the width of the residual stream."""
    return int(config.get_text_config().hidden_size)


def _random_model(
    config: PretrainedConfig, build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
) -> PreTrainedModel:
    """Build a random model without constant parameters, so that its norms can be told from one another."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in build(config, dtype=torch.float32).parameters())
        if size > MOST_PARAMETERS:
            raise ResolutionError(f"narrowed, it still has {size:,} parameters")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build(config, dtype=torch.float32).eval()
            for parameter in model.parameters():
                if parameter.numel() > 1 and parameter.min() == parameter.max():
                    parameter.data += 0.3 * torch.randn_like(parameter)
    except ResolutionError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ResolutionError(f"no narrow model of it can be built ({type(error).__name__}: {reason})") from error
    return model
