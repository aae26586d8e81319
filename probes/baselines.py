"""Baselines for a probe: everything simpler that could give the same predictions, evaluated on the same folds.

prevalence          predicts the training share of True: the accuracy and Brier score attainable without any input
prompt_length       long questions are hard, whatever the model represents response_length     so are long answers; unknown
before the answer is written, so unfair to early positions mean_logprob        the model's confidence in its tokens, with
the same caveat question_words      the words of the question (hashed counts, so nothing is learned from test questions)
shuffled_labels     the whole search on labels shuffled among problems: what the search finds in noise random_direction
one random direction per candidate instead of a fitted one, with the same search first_layer         the first key in the
model's order of execution: what the tokens alone show
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.feature_extraction.text import HashingVectorizer
from torch import Tensor

from probes.dataset import ProbeDataset
from probes.kinds.linear import Standardized

WORD_FEATURES = 512


def covariates(data: ProbeDataset) -> dict[str, Float[Tensor, "1 rows d"]]:
    """Return the features of the baselines without activations, by name."""
    found = {
        "prevalence": np.zeros(len(data.examples)),
        "prompt_length": np.array([float(example.n_prompt) for example in data.examples]),
        "response_length": np.array([float(example.n_completion) for example in data.examples]),
    }
    logprob = data.mean_logprob()
    if logprob is not None:
        found["mean_logprob"] = logprob
    features = {name: torch.from_numpy(values)[None, :, None] for name, values in found.items()}
    words = HashingVectorizer(n_features=WORD_FEATURES, alternate_sign=False, norm=None)
    counts = words.transform([example.question for example in data.examples]).toarray()
    return features | {"question_words": torch.from_numpy(counts)[None]}


def random_projection(X: Float[Tensor, "models rows d"], seed: int) -> Float[Tensor, "models rows 1"]:
    """Project each model's standardized rows onto a random direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(X), X.shape[-1], 1, generator=generator, dtype=torch.float64).to(X.device)
    return Standardized.of(X).Z @ directions


def truncated(data: ProbeDataset) -> Bool[np.ndarray, "samples"]:
    """Return which examples were truncated."""
    return np.array([example.truncated for example in data.examples], dtype=bool)


def unread(data: ProbeDataset) -> Bool[np.ndarray, "samples"]:
    """Return in which examples no answer was found; all False if that is unknown."""
    return np.array([example.unread for example in data.examples], dtype=bool)
