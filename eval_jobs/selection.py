"""Which of a source's problems are posed, and which solved ones are shown before each.

Taken are `--sample-ids`, or else `--samples` problems after the first `--offset`, of the source in its own order or, with
`--shuffle`, in one drawn from `--seed`.

Shots are drawn from a source of solved problems, GSM8K's training set by default, as lm-evaluation-harness draws them: one
generator, seeded with 1234, draws for problem after problem of the source. So problem i is shown the same shots here and there
(there, if all before it are posed).
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from eval_jobs.problems import Problem, ProblemError, describe_source, read_source
from roentgen.contract import canonical_hash

SHOTS_SEED = 1234
DEFAULT_SHOTS = "gsm8k-train"
LOOKED_AT = 50_000
"""So many problems of a source are shuffled, or looked through for an id; larger ones are generated, in random order anyway."""


class Selection(BaseModel):
    """Which problems."""

    model_config = ConfigDict(frozen=True)

    source: Any
    """What `read_source` takes: a name, a reference, a dataset, a file's path, or a function."""
    columns: dict[str, str] | None = None
    """Of a field of a problem, the column that it is taken from."""
    fields: tuple[str, ...] | None = None
    """The further fields to keep; None keeps all."""
    samples: int = Field(ge=1)
    """How many samples."""
    offset: int = Field(default=0, ge=0)
    """How many to leave out before them."""
    sample_ids: tuple[str, ...] | None = None
    """Exactly these, by number ("17") or id ("gsm8k-test-0017"); nothing else is looked at."""
    shuffle_seed: int | None = None
    """Of the order they are taken in; None keeps the source's."""
    shots: int = Field(default=0, ge=0)
    """How many solved problems are shown before each."""
    shots_source: str = DEFAULT_SHOTS
    """Where they are drawn from."""


def load_problems(selection: Selection) -> list[Problem]:
    """Return the problems of a selection; fewer than asked for if the source has fewer.

    Raises:
        ProblemError: if the source cannot be read, nothing is left of it, or an id is not in it.
    """
    found = read_source(selection.source, selection.columns, selection.fields)
    name = describe_source(selection.source)
    if selection.shots:
        found = _with_shots(found, selection.shots, selection.shots_source)
    if selection.sample_ids is not None:
        return _named(found, selection.sample_ids, name)
    if selection.shuffle_seed is not None:
        found = iter(_shuffled(found, selection))
    problems = list(islice(found, selection.offset, selection.offset + selection.samples))
    if not problems:
        after = f" after the first {selection.offset}" if selection.offset else ""
        raise ProblemError(f"--problems: {name} has no problems{after}")
    posed = Counter(problem.problem_id for problem in problems)
    if twice := [problem_id for problem_id, times in posed.items() if times > 1]:
        raise ProblemError(f"--problems: {name}: several problems are called {twice[0]!r}; a problem_id names one")
    return problems


def pool_hash(source: str = DEFAULT_SHOTS) -> str:
    """Return a hash of what shots are drawn from, and how."""
    return canonical_hash([SHOTS_SEED, [[shot.question, shot.solution] for shot in read_source(source)]])


def _named(found: Iterator[Problem], names: Sequence[str], source: str) -> list[Problem]:
    """Return the problems of these names, in the order of the source."""
    left = {name.strip(): None for name in names}
    problems = []
    for problem in islice(found, LOOKED_AT):
        names_of_it = {problem.problem_id, str(problem.number)} & left.keys()
        if names_of_it:
            problems.append(problem)
            for name in names_of_it:
                del left[name]
            if not left:
                break
    if left:
        raise ProblemError(f"--sample-ids: {source} has no problem {', '.join(left)}; ids are numbers or problem_ids")
    return problems


def _shuffled(found: Iterator[Problem], selection: Selection) -> list[Problem]:
    problems = list(islice(found, LOOKED_AT + 1))
    if len(problems) > LOOKED_AT:
        raise ProblemError(
            f"--shuffle: {describe_source(selection.source)} is generated, in random order: take others with --offset"
        )
    random.Random(selection.shuffle_seed).shuffle(problems)
    return problems


def _with_shots(found: Iterator[Problem], shots: int, source: str) -> Iterator[Problem]:
    pool = list(read_source(source))
    if len(pool) < shots:
        raise ProblemError(f"--drawn-shots: {shots} is more than the {len(pool)} problems of {source}")
    generator = random.Random(SHOTS_SEED)
    for problem in found:
        yield replace(problem, shots=tuple(generator.sample(pool, shots)))
