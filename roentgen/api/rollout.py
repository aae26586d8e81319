"""`Rollout`, the result of one generation: text, tokens, captured activations and probe scores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from roentgen.contract import ProbeAction
from roentgen.model_names import suggest
from roentgen.pages import page_environment
from roentgen.tokenized_text import TokenizedText, token_texts

FULL_COLOR = 0.9
"""Quantile of absolute scores from which a token has the full color."""


@dataclass(frozen=True, eq=False, repr=False)
class Rollout:
    """One generation.

    `rollout["layers.12.resid_post"]` returns the captured rows of that key, `[rows, d_model]`, one for each of `positions`. The
    last sampled token was never fed to the model, so it is in `token_ids` but not in `tokens`, and has no row.
    """

    prompt: Any
    """The prompt as it was given: a text, or a list of messages."""
    text: str
    """The completion, without special tokens and stop strings."""
    finish_reason: str
    """"stop", or "length" if the maximum number of tokens was reached."""
    logprobs: list[float]
    """Log-probability of each completion token; NaN for a forced token, which the model did not sample."""
    sequence: TokenizedText = field(repr=False)
    """Tokenized prompt and completion, special tokens included."""
    activations: Mapping[str, Float[Tensor, "rows ..."]] = field(default_factory=dict)
    """Captured rows, by stored key."""
    positions: list[int] = field(default_factory=list)
    """Index in `tokens` of each captured row's token; -1 for a mean over several tokens."""
    scores: Mapping[str, Float[Tensor, "tokens ..."]] = field(default_factory=dict)
    """Each probe's scores of the tokens: `[len(tokens)]`, or `[len(tokens), outputs]` for a probe with several outputs."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """Labels of a text that was captured."""
    stop_reason: int | str | None = None
    """The requested stop string, stop token or probe (`probe:NAME`) that ended the generation; else None."""
    acted: Sequence[ProbeAction] = ()
    """Actions that probes took."""

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt."""
        return self.sequence.token_ids[: self.sequence.n_prompt]

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the completion, including the last one."""
        return self.sequence.token_ids[self.sequence.n_prompt :]

    @property
    def tokens(self) -> list[str]:
        """Texts of the tokens that were fed to the model: the prompt's and the completion's, except the last sampled one.

        Of the tokens that form one character, only the first has its text; the others are empty.
        """
        return token_texts(self.sequence.text, self.sequence.token_offsets)[: self.sequence.n_rows]

    def keys(self) -> list[str]:
        """Return the stored keys of the captured activations."""
        return list(self.activations)

    def __contains__(self, key: str) -> bool:
        return key in self.activations

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __getitem__(self, key: str) -> Float[Tensor, "rows ..."]:
        """Return the captured rows of a stored key.

        Raises:
            KeyError: if the key was not captured.
        """
        if key not in self.activations:
            there = self.keys()
            listed = ", ".join(there[:10]) + (f" and {len(there) - 10} more" if len(there) > 10 else "")
            raise KeyError(f"{key!r} was not captured; captured: {listed or 'nothing'}{suggest(key, there)}")
        return self.activations[key]

    def __repr__(self) -> str:
        kept = f", {len(self.activations)} keys × {len(self.positions)} rows" if self.activations else ""
        return f"Rollout({self.text!r}, {self.finish_reason}{kept})"

    def html(self, probe: str | None = None) -> str:
        """Return the tokens as HTML, colored by a probe's scores.

        Args:
            probe: name of the probe; None for the first.

        Raises:
            KeyError: if the probe did not score this rollout.
        """
        if probe is not None and probe not in self.scores:
            raise KeyError(f"{probe!r} did not score this rollout; scores: {', '.join(self.scores) or 'none'}")
        name = probe or next(iter(self.scores), None)
        scores = (
            [] if name is None else np.asarray(self.scores[name].float()).reshape(len(self.tokens), -1)[:, 0].tolist()
        )
        # The norm of the first token's row is often so large that all other tokens would have no color.
        full = float(np.quantile(np.abs(scores), FULL_COLOR, method="lower")) if scores else 0.0
        strengths = np.clip(np.array(scores) / (full or 1.0), -1, 1).tolist() or [0.0] * len(self.tokens)
        tokens = [
            {"text": text, "score": score, "strength": round(strength, 3), "spoken": place >= self.sequence.n_prompt}
            for place, (text, score, strength) in enumerate(
                zip(self.tokens, scores or [None] * len(self.tokens), strengths, strict=True)
            )
        ]
        template = page_environment("roentgen.pages").get_template("rollout.html")
        return template.render(tokens=tokens, probe=name, finish_reason=self.finish_reason, keys=self.keys())

    def _repr_html_(self) -> str:
        return self.html()
