"""The contents of config.json: everything needed to run an evaluation again."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, Field


class RunConfig(BaseModel):
    """The contents of config.json."""

    run_id: str
    """Id of the run and of its session in the store."""
    created: str
    """Creation time in ISO format."""
    config_hash: str
    """Hash of `hashed`."""
    hashed: dict[str, Any]
    """What makes two runs comparable: model, revision, dtype, prompt, variant, sampling, tools, capture."""
    problems: dict[str, Any]
    """The problems: source, number, epochs."""
    settings: dict[str, Any]
    """All other settings: parallelism, addresses, scoring."""
    prompt: dict[str, Any]
    """The prompt as data."""
    versions: dict[str, str]
    """Versions of the relevant packages."""
    git_revision: str | None = None
    """Revision of the working tree, if it is one."""
    variants: dict[str, dict[str, str]] = Field(default_factory=dict)
    """Prompt prefixes of a run with variants: each one's `prefix` and `config_hash`."""

    scorers: dict[str, dict[str, str | None]] = Field(default_factory=dict)
    """Custom scorers by name: the `reference` that finds each (None for a function given in Python), and the `hash` of its
    source."""

    @property
    def set_name(self) -> str:
        """Prefix of its sample ids; older runs use "gsm8k" throughout."""
        return str(self.problems.get("name") or "gsm8k")

    @property
    def model_root(self) -> str:
        """Where its model can be loaded from; runs of older versions record only the name they were given."""
        served = self.settings.get("served") or {}
        return str(served.get("root") or self.settings.get("model") or self.hashed["model"])

    @property
    def extractor(self) -> str | None:
        """The primary extractor, whose verdicts count; None if the run has none."""
        return self.settings.get("extractor")

    @property
    def config_hashes(self) -> list[str]:
        """The configuration hashes of its samples: one per variant, or the run's own."""
        return [variant["config_hash"] for variant in self.variants.values()] or [self.config_hash]


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the differences of two nested mappings: the dotted name and both values, None where a key is missing."""
    for key in one | other:
        here, there = one.get(key), other.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            yield from differences(here, there, f"{prefix}{key}.")
        elif here != there:
            yield f"{prefix}{key}", here, there
