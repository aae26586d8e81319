"""Reads stored rollouts with the rows and the text of their generated tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.errors import ProbeDataError
from roentgen.contract import count_rows
from roentgen.linear_probe import LinearProbe
from roentgen.runs import Run, Sample, same_template
from roentgen.stop_rule import CountedTokens, ReasoningTokens
from roentgen.tokenized_text import sentence_ends, token_texts

THINK_START, THINK_END = "<think>", "</think>"


@dataclass(frozen=True, eq=False)
class StopTrace:
    """A rollout. Indices count its generated tokens from 0."""

    sample: Sample
    """The sample."""
    group: int
    """The number of its problem, or of its template."""
    rows: Float[Tensor, "fed d"]
    """Row of every generated token that has one: all but the last."""
    counted: Bool[np.ndarray, "fed"]
    """Which of these tokens count."""
    text: str
    """The generated text."""
    ends: Int[np.ndarray, "tokens"]
    """End of each token in the text, exclusive."""
    begins: int
    """Start of the text that is read: that of the reasoning, if only the reasoning counts."""
    thought: int | None
    """Number of tokens generated when the model ended its reasoning; None if it did not, or if all tokens count."""

    @property
    def n_tokens(self) -> int:
        """Tokens generated."""
        return len(self.ends)

    def text_up_to(self, place: int) -> str:
        """Return the text up to and including a token."""
        return self.text[self.begins : self.ends[place]]

    def sentence_ends(self) -> list[int]:
        """Return the counted tokens that end a sentence or a line."""
        places = sentence_ends(self.text, self.ends, self.begins)
        return [place for place in places if place < len(self.counted) and self.counted[place]]


def read_traces(
    run: Run, key: str, where: CountedTokens, session: str | None = None, samples: int | None = None
) -> list[StopTrace]:
    """Read the rollouts of a run's samples.

    Args:
        run: the run.
        key: the stored key that the probe reads.
        where: which tokens count.
        session: a session captured from the run's answers, instead of the run's own rows.
        samples: maximum number of samples to read, sorted by name; None for all.

    Raises:
        ProbeDataError: if rows of generated tokens or the key were not stored, or no reasoning is marked.
        RunError: if the run has no activations.
        StoreError: if a session cannot be read.
    """
    if run.config.hashed.get("mode") == "with-tools":
        raise ProbeDataError(
            f"{run.path} used tools, so its answers consist of several generations; use a run without tools"
        )
    found: list[tuple[Sample, Tensor, Bool[np.ndarray, "fed"], str, Int[np.ndarray, "tokens"], int, int | None]] = []
    for part in run.stored(session=session):
        keys = part.session.keys()
        if key not in keys:
            raise ProbeDataError(f"{part.session.uri} has no rows of {key}; it has {', '.join(keys)}")
        items = part.session.activations(key, where=part.rollouts)
        for sample, item, (_, row) in zip(part.samples, items, part.rollouts.iterrows(), strict=True):
            if samples is not None and len(found) >= samples:
                break
            n_prompt, n_completion = int(row["n_prompt"]), int(row["n_completion"])
            if n_completion == 0:
                continue
            fed = range(n_prompt, count_rows(n_prompt, n_completion))
            generated = item.position >= n_prompt
            if item.position[generated].tolist() != list(fed):
                raise ProbeDataError(
                    f"the rows of {sample.sample_id}'s generated tokens were not stored; evaluate again with --positions all, "
                    f"or `roentgen capture {run.path} --positions all`"
                )
            text, offsets = str(row["text"]), [int(offset) for offset in row["token_offsets"]]
            start = offsets[n_prompt]
            ends = np.array([*offsets[n_prompt + 1 :], len(text)]) - start
            counted, begins, thought = np.ones(len(fed), dtype=bool), 0, None
            if where == "reasoning":
                counted, begins, thought = _reasoning(row["token_ids"], token_texts(text, offsets), n_prompt, ends)
            rows = item.values[torch.from_numpy(np.flatnonzero(generated))]
            found.append((sample, rows, counted, text[start:], ends, begins, thought))
    if where == "reasoning" and not any(counted.any() for _, _, counted, *_ in found):
        raise ProbeDataError(f"where: no answer of {run.path} contains reasoning between {THINK_START} and {THINK_END}")
    groups = same_template([sample.posed for sample, *_ in found])
    return [
        StopTrace(sample, group, rows, counted, text, ends, begins, thought)
        for group, (sample, rows, counted, text, ends, begins, thought) in zip(groups, found, strict=True)
    ]


def _reasoning(
    token_ids: Sequence[int], texts: list[str], n_prompt: int, ends: Int[np.ndarray, "tokens"]
) -> tuple[Bool[np.ndarray, "fed"], int, int | None]:
    """Return which tokens with a row belong to the reasoning, where it begins, and after how many tokens it ended."""
    ids = dict(zip(texts, (int(token) for token in token_ids), strict=True))
    marks = ReasoningTokens(ids.get(THINK_START, -1), ids.get(THINK_END, -1))
    own = [int(token) for token in token_ids[n_prompt:]]
    inside, state = marks.follow(own, marks.begins([int(token) for token in token_ids[:n_prompt]]))
    first = int(np.argmax(inside)) if inside.any() else 0
    return inside[:-1], int(ends[first - 1]) if first else 0, own.index(marks.end) + 1 if state == "after" else None


def scores_of(linear_probe: LinearProbe, trace: StopTrace) -> Float[np.ndarray, "fed"]:
    """Score a rollout's tokens with a probe of one output."""
    found: Float[np.ndarray, "fed"] = linear_probe.scores(trace.rows.flatten(1))[:, 0].numpy()
    return found
