"""Stored rollouts, each with its probe's score of every generated token and the text up to it."""

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
    """One rollout. Places are those of its generated tokens, from 0."""

    sample: Sample
    """Whose it is."""
    group: int
    """The number of its problem, or of its template."""
    rows: Float[Tensor, "fed d"]
    """Of every generated token that has one: all but the last."""
    counted: Bool[np.ndarray, "fed"]
    """Which of these count."""
    text: str
    """What was generated."""
    ends: Int[np.ndarray, "tokens"]
    """The character behind each token."""
    begins: int
    """The character at which what is read begins: that of the reasoning, if only this counts."""
    thought: int | None
    """How many tokens the model had generated when it ended its reasoning by itself; None if it did not, or all count."""

    @property
    def n_tokens(self) -> int:
        """Tokens generated."""
        return len(self.ends)

    def text_up_to(self, place: int) -> str:
        """Return what was said up to and with a token."""
        return self.text[self.begins : self.ends[place]]

    def sentence_ends(self) -> list[int]:
        """Return the tokens with which a sentence, or a line, has ended, of those that count."""
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
        session: a session that was captured of the run's answers, instead of the run's own rows.
        samples: the most to read, in the order of their names; None for all.

    Raises:
        ProbeDataError: if rows of generated tokens were not stored, the key was not, or no model's reasoning is marked.
        RunError: if the run has no activations.
        StoreError: if a session cannot be read.
    """
    if run.config.hashed.get("mode") == "with-tools":
        raise ProbeDataError(
            f"{run.path} was answered with tools: its answers are several generations; take a run without"
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
        raise ProbeDataError(f"where: no answer of {run.path} has a reasoning between {THINK_START} and {THINK_END}")
    groups = same_template([sample.posed for sample, *_ in found])
    return [
        StopTrace(sample, group, rows, counted, text, ends, begins, thought)
        for group, (sample, rows, counted, text, ends, begins, thought) in zip(groups, found, strict=True)
    ]


def _reasoning(
    token_ids: Sequence[int], texts: list[str], n_prompt: int, ends: Int[np.ndarray, "tokens"]
) -> tuple[Bool[np.ndarray, "fed"], int, int | None]:
    """Return which of the tokens that have a row belong to the reasoning, where it begins, and when it has ended."""
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
