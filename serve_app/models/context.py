"""Reads a model's context length from its configuration, under any of the usual names.

Models with rotary or learned positions have a limit. Those without (ALiBi, recurrent states) may have none: such a model takes
a sequence of any length, bounded by memory only. None stands for no limit.
"""

from transformers import PretrainedConfig, PreTrainedTokenizerBase

LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "seq_len",
    "max_target_positions",
    "context_length",
    "max_context_length",
    "model_max_length",
)
"""Names of the largest number of tokens of a sequence in configurations, the most common first."""

UNBOUNDED = 131_072
"""Most tokens of one sequence if the model has no limit: a request without `max_tokens` must still end."""

MOST_SANE = 10_000_000
"""Largest plausible limit of a tokenizer; one without a limit has 10^30."""


def context_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """Return the largest number of tokens of a sequence; None if there is no limit.

    Args:
        config: the model's configuration.
        tokenizer: the model's tokenizer, which may have a limit if the configuration has none.
    """
    text = config.get_text_config(decoder=True)
    limits = [getattr(text, name, None) for name in LIMITS]
    if tokenizer is not None and tokenizer.model_max_length <= MOST_SANE:
        limits.append(int(tokenizer.model_max_length))
    return next((n for n in limits if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
