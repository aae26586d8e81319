"""What a generation gives: the text, its tokens, and for every token that was fed what was captured and scored."""

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
"""The quantile of absolute scores that has the full color; those beyond have it too."""


@dataclass(frozen=True, eq=False, repr=False)
class Rollout:
    """One generation.

    `rollout["layers.12.resid_post"]` is what was captured there, `[rows, d_model]`, a row for each of `positions`. The last
    sampled token was never fed to the model, so it is in `token_ids` and not in `tokens`, and it has no row.
    """

    prompt: Any
    """As it was given: a text, or a conversation's messages."""
    text: str
    """The completion, without special tokens and stop strings."""
    finish_reason: str
    """"stop", or "length" if it was cut."""
    logprobs: list[float]
    """Of each completion token, when it was sampled; NaN for a marker that closed the reasoning, which nobody chose."""
    sequence: TokenizedText = field(repr=False)
    """Prompt and completion as the model saw them, special tokens included."""
    activations: Mapping[str, Float[Tensor, "rows ..."]] = field(default_factory=dict)
    """What was captured, per stored key."""
    positions: list[int] = field(default_factory=list)
    """The token that each captured row is of, a place in `tokens`; -1 for a mean over several."""
    scores: Mapping[str, Float[Tensor, "tokens ..."]] = field(default_factory=dict)
    """Per probe, its score of every token: `[len(tokens)]`, or `[len(tokens), outputs]` for one with several outputs."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """What came with a text that was read."""
    stop_reason: int | str | None = None
    """What ended it that was asked for: a stop string, a stop token, or a probe (`probe:NAME`)."""
    acted: Sequence[ProbeAction] = ()
    """What the scores of probes have done."""

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's tokens."""
        return self.sequence.token_ids[: self.sequence.n_prompt]

    @property
    def token_ids(self) -> list[int]:
        """The completion's tokens, the last one included."""
        return self.sequence.token_ids[self.sequence.n_prompt :]

    @property
    def tokens(self) -> list[str]:
        """The text of every token that was fed: the prompt's and the completion's, but for the last that was sampled.

        A token that is part of a character is empty, but for the first of its character.
        """
        return token_texts(self.sequence.text, self.sequence.token_offsets)[: self.sequence.n_rows]

    def keys(self) -> list[str]:
        """Return what was captured, as stored keys."""
        return list(self.activations)

    def __contains__(self, key: str) -> bool:
        return key in self.activations

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __getitem__(self, key: str) -> Float[Tensor, "rows ..."]:
        """Return the captured rows of a stored key.

        Raises:
            KeyError: naming what was captured.
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
        """Return the tokens as HTML, each on the color of its score.

        Args:
            probe: whose scores; the first probe's if absent.

        Raises:
            KeyError: naming the probes that there are.
        """
        if probe is not None and probe not in self.scores:
            raise KeyError(f"{probe!r} has not scored this; there are {', '.join(self.scores) or 'no scores'}")
        name = probe or next(iter(self.scores), None)
        scores = (
            [] if name is None else np.asarray(self.scores[name].float()).reshape(len(self.tokens), -1)[:, 0].tolist()
        )
        # The first token's row is often many times as long as all others: it would leave them without a color.
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
