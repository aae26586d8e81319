"""Finds rotary embeddings that depend on a sequence's length, and makes them forget earlier sequences.

With dynamic NTK scaling (`rope_type: "dynamic"`), transformers' rotary embedding keeps the frequencies of the longest sequence
that it has seen, and takes them for shorter ones too. Then a request's values depend on requests before it.
"""

from torch import nn


def depends_on_length(model: nn.Module) -> bool:
    """Whether a token's rotation depends on how long its sequence is or will be."""
    return any(getattr(module, "rope_type", None) in ("dynamic", "longrope") for module in model.modules())


def forget_lengths(model: nn.Module) -> None:
    """Give a model's rotary embeddings the frequencies that they were made with, before a new sequence is read."""
    for module in model.modules():
        if getattr(module, "rope_type", None) != "dynamic" or module.max_seq_len_cached == module.original_max_seq_len:
            continue
        module.max_seq_len_cached = module.original_max_seq_len
        frequencies = module.get_buffer("inv_freq")
        module.inv_freq = module.get_buffer("original_inv_freq").to(frequencies.device)
