"""Finds rotary embeddings that depend on the length of a sequence, and resets them between sequences.

With dynamic NTK scaling (`rope_type: "dynamic"`), transformers' rotary embedding keeps the frequencies of the longest sequence
so far, and uses them for shorter sequences too. A request's values would then depend on earlier requests.
"""

from torch import nn


def depends_on_length(model: nn.Module) -> bool:
    """Whether a token's rotation depends on the current or later length of its sequence."""
    return any(getattr(module, "rope_type", None) in ("dynamic", "longrope") for module in model.modules())


def forget_lengths(model: nn.Module) -> None:
    """Reset a model's rotary embeddings to their original frequencies, before a new sequence is read."""
    for module in model.modules():
        if getattr(module, "rope_type", None) != "dynamic" or module.max_seq_len_cached == module.original_max_seq_len:
            continue
        module.max_seq_len_cached = module.original_max_seq_len
        frequencies = module.get_buffer("inv_freq")
        module.inv_freq = module.get_buffer("original_inv_freq").to(frequencies.device)
