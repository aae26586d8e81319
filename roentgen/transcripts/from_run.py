"""Reads transcripts from a run directory: each answer of each finished sample, under its original rollout key.

A sample with several turns yields one transcript per turn, whose prompt is everything before the answer. If the store still
holds the rollout, its exact tokens are included, because tokenizing a text does not always reproduce the sampled tokens.
"""

from collections.abc import Callable, Iterator
from typing import Any

from roentgen.contract import LabelValue, RolloutKey, plain_labels
from roentgen.runs import RolloutRef, Run, Sample
from roentgen.store import Session, StoreError
from roentgen.tokenized_text import Segment, TokenizedText
from roentgen.transcripts.transcript import KnownTokens, Transcript, TranscriptError


def read_run(run: Run, say: Callable[[str], None]) -> list[Transcript]:
    """Read every answer of a run.

    Args:
        run: the run.
        say: called with a line about missing data and its consequence.

    Raises:
        RunError: if the record is damaged.
        TranscriptError: if the run has no answers.
    """
    recorded = run.read_samples()
    samples = [sample for sample in recorded if sample.error is None]
    if not samples:
        raise TranscriptError(f"{run.path} has no answers to read: none of its {len(recorded)} samples is finished")
    known = _known_tokens(run, samples, say)
    return [transcript for sample in samples for transcript in _transcripts(run, sample, known)]


def _transcripts(run: Run, sample: Sample, known: dict[str, KnownTokens]) -> Iterator[Transcript]:
    spoken = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
    # Assistant messages may be part of a prompt as examples; the model's own follow the last user message.
    told = max((i for i, message in enumerate(sample.messages) if message["role"] == "user"), default=-1)
    answers = spoken[-len(sample.rollouts) :] if sample.rollouts else [i for i in spoken if i > told]
    refs = {ref.turn: ref for ref in sample.rollouts}
    extractor = run.config.settings.get("extractor")
    labels: dict[str, LabelValue] = {
        **plain_labels(sample.fields),
        **sample.values,
        "problem_id": sample.problem_id,
        "sample_id": sample.sample_id,
        "gold": sample.gold,
        "answer": sample.answers.get(extractor) if extractor else None,
        "correct": sample.correct,
    }
    for turn, at in enumerate(answers):
        last = at == answers[-1]
        yield Transcript(
            key=RolloutKey(config_hash=sample.config_hash, problem_id=sample.problem_id, epoch=sample.epoch, turn=turn),
            prompt=tuple(sample.messages[:at]),
            completion=sample.messages[at].get("content") or "",
            finish_reason="length" if last and sample.finish_reason == "length" else "stop",
            labels=labels,
            tokens=known.get(refs[turn].rollout_id) if turn in refs else None,
        )


def _known_tokens(run: Run, samples: list[Sample], say: Callable[[str], None]) -> dict[str, KnownTokens]:
    """Return the stored tokens of the samples' rollouts by rollout id; missing ones are reported through `say`."""
    by_session: dict[str, list[RolloutRef]] = {}
    for sample in samples:
        for ref in sample.rollouts:
            by_session.setdefault(run.session_uri(ref), []).append(ref)
    known: dict[str, KnownTokens] = {}
    for uri, refs in by_session.items():
        try:
            session = Session.open(uri)
            found = session.rollouts(ids=[ref.rollout_id for ref in refs])
            rows = {row["rollout_id"]: row for row in found.to_dict("records")}
            for ref in refs:
                if ref.rollout_id in rows:
                    known[ref.rollout_id] = _tokens(session, rows[ref.rollout_id])
        except StoreError as error:
            say(f"the sampled tokens are unavailable ({error}): the texts are tokenized again")
    return known


def _tokens(session: Session, row: dict[Any, Any]) -> KnownTokens:
    spec = session.spec(row["shard"])
    sequence = TokenizedText(
        text=row["text"],
        token_ids=[int(token) for token in row["token_ids"]],
        token_offsets=[int(offset) for offset in row["token_offsets"]],
        segments=[Segment(s["role"], int(s["start"]), int(s["stop"])) for s in row["segments"]],
        n_prompt=int(row["n_prompt"]),
    )
    return KnownTokens(spec.model, spec.revision, sequence)
