"""What config.json holds: all that is needed to run an evaluation again."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, Field


class RunConfig(BaseModel):
    """The contents of config.json."""

    run_id: str
    """Names the run and its session in the store."""
    created: str
    """ISO time."""
    config_hash: str
    """Hash of `hashed`."""
    hashed: dict[str, Any]
    """What makes two runs comparable: model, revision, dtype, prompt, variant, sampling, tools, capture."""
    problems: dict[str, Any]
    """Which problems: source, how many, how many samples each."""
    settings: dict[str, Any]
    """Everything else: parallelism, addresses, scoring."""
    prompt: dict[str, Any]
    """The prompt's text, as data."""
    versions: dict[str, str]
    """Of the packages that matter."""
    git_revision: str | None = None
    """Of the working tree, if it is one."""
    variants: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Of a run that poses its problems under several prompt prefixes, each one's `prefix` and `config_hash`."""

    scorers: dict[str, dict[str, str | None]] = Field(default_factory=dict)
    """Of scorers that are not built in, by name: the `reference` that finds each (None of a function given in Python), and the
    "hash" of its source."""

    @property
    def set_name(self) -> str:
        """What its samples are called after; those of older runs are all called after GSM8K."""
        return str(self.problems.get("name") or "gsm8k")

    @property
    def model_root(self) -> str:
        """What its model can be loaded from; runs of older versions have only the name that they were given."""
        served = self.settings.get("served") or {}
        return str(served.get("root") or self.settings.get("model") or self.hashed["model"])

    @property
    def extractor(self) -> str | None:
        """The primary extractor, whose verdicts count; None of a run that has none."""
        return self.settings.get("extractor")

    @property
    def config_hashes(self) -> list[str]:
        """The hashes that its samples may carry: one per variant, or the run's own."""
        return [variant["config_hash"] for variant in self.variants.values()] or [self.config_hash]


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs between two nested objects: its dotted name, and both values (None where there is none)."""
    for key in one | other:
        here, there = one.get(key), other.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            yield from differences(here, there, f"{prefix}{key}.")
        elif here != there:
            yield f"{prefix}{key}", here, there
