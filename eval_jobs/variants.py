"""Variants: the same problems under several prompt prefixes, in one run.

A variant is a name and what is put before the user's last message:

    calm: Take your time. There is no hurry.
    impatient: Hurry up! I need this now.
    plain: ""

Each has a configuration hash of its own, so its samples and activations never mix with another's. The first is what the
others are compared with.
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
    """A file of variants cannot be used; the message names it."""


@dataclass(frozen=True)
class Variant:
    """One configuration of a run."""

    name: str | None
    """What people call it; None of a run without variants."""
    prefix: str
    """What is put before the user's last message."""
    config_hash: str
    """Of the configuration with this prefix."""


# With slots, as a `Problem`: to be sent to a task, an object without them is given a dict that it keeps, and a driver may hold
# millions of these.
@dataclass(frozen=True, slots=True)
class Attempt:
    """One problem, to be posed once under one variant."""

    problem: Problem
    """What is asked."""
    variant: Variant
    """How."""
    epoch: int = 1
    """Which of several attempts, from 1."""
    set_name: str = "gsm8k"
    """What the run's samples are called after."""

    @property
    def identity(self) -> tuple[str, str, int]:
        """What makes it the same attempt when it is made again; a `Sample` has the same."""
        return self.variant.config_hash, self.problem.problem_id, self.epoch

    @property
    def sample_id(self) -> str:
        """What names its files."""
        epoch = f"_e{self.epoch}" if self.epoch > 1 else ""
        variant = f"_v-{self.variant.name}" if self.variant.name else ""
        return f"{self.set_name}_{self.problem.number:04d}{epoch}{variant}"


def attempts_of(config: RunConfig, problems: Sequence[Problem]) -> list[Attempt]:
    """Return what a run is to do, problem by problem, so that a run that is stopped has all of some problems.

    The variants are those that the run was made with: the file that they came from may have been edited since.
    """
    recorded = [Variant(name, variant["prefix"], variant["config_hash"]) for name, variant in config.variants.items()]
    variants, epochs = (
        recorded or [Variant(None, "", config.config_hash)],
        range(1, config.problems.get("epochs", 1) + 1),
    )
    name = config.set_name
    return [Attempt(problem, variant, epoch, name) for problem in problems for epoch in epochs for variant in variants]


def read_variants(path: Path) -> dict[str, str]:
    """Return a file's prefixes by their names, in its order.

    Raises:
        VariantError: if it cannot be read, or is not a mapping of names to texts.
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
        raise VariantError(f"--variants: {path}: {name!r} is no name; allowed are 1 to 32 letters, digits, . and -")
    return name


def _check_prefix(name: str, prefix: Any, path: Path) -> str:
    if not isinstance(prefix, str):
        raise VariantError(f"--variants: {path}: {name} must be a text (empty for none), not {prefix!r}")
    return prefix.strip()
