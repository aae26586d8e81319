"""Chooses the next token of each row of a batch, by each row's own settings and its own random stream."""

import torch
from jaxtyping import Float
from torch import Tensor

from serve_app.engines.protocol import Sampling


class Sampler:
    """One request's choice of tokens; its stream depends on its seed alone, never on the batch it runs in."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        # On the CPU whatever the model's device, so that a seed means the same everywhere.
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: Float[Tensor, "vocab"]) -> int:
        """Choose a token from one row's logits."""
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits.float().cpu() / self._sampling.temperature, dim=-1)
        if self._sampling.top_p < 1:
            probabilities = nucleus(probabilities, self._sampling.top_p)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def nucleus(probabilities: Float[Tensor, "vocab"], top_p: float) -> Float[Tensor, "vocab"]:
    """Keep the smallest set of tokens whose probability reaches `top_p` (Holtzman et al., arXiv 1904.09751).

    Returns:
        The kept probabilities, not normalised; zero elsewhere. The most likely token is always kept.
    """
    ordered, order = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    kept = torch.zeros_like(probabilities)
    chosen = order[before < top_p]
    kept[chosen] = probabilities[chosen]
    return kept


def token_logprobs(logits: Float[Tensor, "batch vocab"], tokens: list[int]) -> list[float]:
    """Return the log-probability of one token per row, under the unmodified distribution."""
    scores = logits.float()
    index = torch.tensor(tokens, device=logits.device)[:, None]
    values: list[float] = (scores.gather(1, index)[:, 0] - scores.logsumexp(dim=-1)).tolist()
    return values
