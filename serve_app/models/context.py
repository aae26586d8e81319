"""How long a sequence may be: what a model's configuration says of it, under any of the names there are for that.

Models with rotary or learned positions say a number. Those without (ALiBi, recurrent states) may say none: such a model takes
a sequence of any length, and memory alone bounds it. None stands for that, everywhere.
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
"""What configurations call the most tokens of a sequence, the commonest name first."""

UNBOUNDED = 131_072
"""The most tokens of one sequence where the model says no limit: a request that names none must end all the same."""

MOST_SANE = 10_000_000
"""A tokenizer without a limit says 10^30."""


def context_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """Return the most tokens a sequence may have, None if nothing says so.

    Args:
        config: the model's.
        tokenizer: the model's, which may say a limit where the configuration does not.
    """
    text = config.get_text_config(decoder=True)
    said = [getattr(text, name, None) for name in LIMITS]
    if tokenizer is not None and tokenizer.model_max_length <= MOST_SANE:
        said.append(int(tokenizer.model_max_length))
    return next((n for n in said if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
