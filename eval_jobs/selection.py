"""Selects the problems of a source to pose, and the solved problems shown before each.

The selection is `--sample-ids`, or else `--samples` problems after the first `--offset`, in the source's order or, with
`--shuffle`, in an order drawn from `--seed`.

Shots are drawn from a source of solved problems, by default GSM8K's training set, as lm-evaluation-harness draws them: one
generator, seeded with 1234, draws for one problem of the source after the other. Problem i therefore gets the same shots
here as there (if the harness poses all problems before it).
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
"""Number of problems that are shuffled or searched for an id; larger sources are generated, in random order anyway."""


class Selection(BaseModel):
    """A selection of problems."""

    model_config = ConfigDict(frozen=True)

    source: Any
    """The source, as `read_source` takes it: a name, a reference, a dataset, a file's path, or a function."""
    columns: dict[str, str] | None = None
    """Maps a problem's field to the column that holds it."""
    fields: tuple[str, ...] | None = None
    """Additional fields to keep; None keeps all."""
    samples: int = Field(ge=1)
    """Number of problems."""
    offset: int = Field(default=0, ge=0)
    """Number of problems to skip first."""
    sample_ids: tuple[str, ...] | None = None
    """Exactly these problems, by number ("17") or id ("gsm8k-test-0017"); the other criteria are ignored."""
    shuffle_seed: int | None = None
    """Seed of the shuffle; None keeps the source's order."""
    shots: int = Field(default=0, ge=0)
    """Number of solved problems drawn for each problem."""
    shots_source: str = DEFAULT_SHOTS
    """The source of the solved problems."""


def load_problems(selection: Selection) -> list[Problem]:
    """Return the problems of a selection; fewer than requested if the source has fewer.

    Raises:
        ProblemError: if the source cannot be read, no problem remains, or an id is unknown.
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
        raise ProblemError(f"--problems: {name}: several problems have the problem_id {twice[0]!r}; ids must be unique")
    return problems


def pool_hash(source: str = DEFAULT_SHOTS) -> str:
    """Return a hash of the pool of shots and of how they are drawn."""
    return canonical_hash([SHOTS_SEED, [[shot.question, shot.solution] for shot in read_source(source)]])


def _named(found: Iterator[Problem], names: Sequence[str], source: str) -> list[Problem]:
    """Return the problems with these names, in the source's order."""
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
            f"--shuffle: {describe_source(selection.source)} is generated in random order: use --offset instead"
        )
    random.Random(selection.shuffle_seed).shuffle(problems)
    return problems


def _with_shots(found: Iterator[Problem], shots: int, source: str) -> Iterator[Problem]:
    pool = list(read_source(source))
    if len(pool) < shots:
        raise ProblemError(f"--drawn-shots: {shots} exceeds the {len(pool)} problems of {source}")
    generator = random.Random(SHOTS_SEED)
    for problem in found:
        yield replace(problem, shots=tuple(generator.sample(pool, shots)))
