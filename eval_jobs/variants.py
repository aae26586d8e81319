"""Variants: the same problems under several prompt prefixes, in one run.

A variant is a name and a prefix of the last user message:

    calm: Take your time. There is no hurry.
    impatient: Hurry up! I need this now.
    plain: ""

Each variant has its own configuration hash, so samples and activations of different variants never mix. The first variant
is the baseline of comparisons.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval_jobs import EvalError
from eval_jobs.problems import Problem
from roentgen.runs import RunConfig

_NAME = re.compile(r"[A-Za-z0-9.-]{1,32}")


class VariantError(EvalError):
    """The file of variants cannot be used; the message names it."""


@dataclass(frozen=True)
class Variant:
    """A named prompt prefix of a run."""

    name: str | None
    """Its name; None in a run without variants."""
    prefix: str
    """Prefix of the last user message."""
    config_hash: str
    """Hash of the configuration with this prefix."""


# Slots, as in `Problem`: pickling an object without them creates its `__dict__` permanently, and a driver may hold millions
# of attempts.
@dataclass(frozen=True, slots=True)
class Attempt:
    """One problem, to be posed once under one variant."""

    problem: Problem
    """The problem."""
    variant: Variant
    """The variant."""
    epoch: int = 1
    """Number of the attempt, from 1."""
    set_name: str = "gsm8k"
    """Prefix of the run's sample ids."""

    @property
    def identity(self) -> tuple[str, str, int]:
        """Identity of the attempt across runs; equal to that of its `Sample`."""
        return self.variant.config_hash, self.problem.problem_id, self.epoch

    @property
    def sample_id(self) -> str:
        """Name of the sample's files."""
        epoch = f"_e{self.epoch}" if self.epoch > 1 else ""
        variant = f"_v-{self.variant.name}" if self.variant.name else ""
        return f"{self.set_name}_{self.problem.number:04d}{epoch}{variant}"


def attempts_of(config: RunConfig, problems: Sequence[Problem]) -> list[Attempt]:
    """Return a run's attempts, problem by problem, so that an interrupted run has complete problems.

    The variants are the recorded ones: their file may have been edited since.
    """
    recorded = [Variant(name, variant["prefix"], variant["config_hash"]) for name, variant in config.variants.items()]
    variants, epochs = (
        recorded or [Variant(None, "", config.config_hash)],
        range(1, config.problems.get("epochs", 1) + 1),
    )
    name = config.set_name
    return [Attempt(problem, variant, epoch, name) for problem in problems for epoch in epochs for variant in variants]


def read_variants(path: Path) -> dict[str, str]:
    """Read named prefixes from a file, in its order.

    Raises:
        VariantError: if the file cannot be read or is not a mapping of names to texts.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise VariantError(f"--variants: {path} cannot be read: {error}") from error
    if not isinstance(content, Mapping) or len(content) < 2:
        raise VariantError(f"--variants: {path} is not a mapping of two or more names to prefixes")
    return {_check_name(name, path): _check_prefix(name, prefix, path) for name, prefix in content.items()}


def _check_name(name: Any, path: Path) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise VariantError(
            f"--variants: {path}: {name!r} is not a valid name; allowed are 1 to 32 letters, digits, . and -"
        )
    return name


def _check_prefix(name: str, prefix: Any, path: Path) -> str:
    if not isinstance(prefix, str):
        raise VariantError(f"--variants: {path}: {name} must be a text (empty for none), not {prefix!r}")
    return prefix.strip()
