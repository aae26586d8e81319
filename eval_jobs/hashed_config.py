"""The configuration that makes two runs comparable: the settings, and properties of the served model, that affect its
output.

Its hash is part of every sample and every rollout key. Two samples with the same hash, problem and epoch are the same
sample; resuming and deduplication rely on that. The number of problems, the concurrency and the extractor are deliberately
excluded.
"""

from dataclasses import dataclass
from typing import Any

from eval_jobs.selection import pool_hash
from eval_jobs.settings import EvalSettings
from eval_jobs.tools import TOOLS
from eval_jobs.variants import Variant, read_variants
from roentgen.contract import canonical_hash


@dataclass(frozen=True)
class ServedModelInfo:
    """The model that a server lists; only `id` is known for a server other than Roentgen's."""

    id: str
    """Name for requests."""
    revision: str | None = None
    """Revision of its weights."""
    dtype: str | None = None
    """Dtype of its weights and activations."""
    num_layers: int | None = None
    """Decoder layers."""
    d_model: int | None = None
    """Width of the residual stream."""
    root: str | None = None
    """The folder or hub id that it was loaded from. It locates the weights but does not identify them, so it is not hashed:
    a moved folder holds the same model."""
    quantization: str | None = None
    """Quantization of the weights; None if they are not quantized or it is unknown."""


def hashed_configuration(settings: EvalSettings, served: ServedModelInfo) -> dict[str, Any]:
    """Return the configuration that affects the model's output; runs are comparable if it is equal
    (`roentgen.contract.canonical_hash`)."""
    prompt = settings.chosen_prompt
    tools = list(TOOLS) if settings.mode == "with-tools" else []
    hashed: dict[str, Any] = {
        "model": served.id,
        "revision": served.revision,
        "dtype": served.dtype,
        "prompt": {"name": prompt.name, "hash": prompt.hash},
        "variant": None,
        "sampling": settings.sampling,
        "mode": settings.mode,
        "tools": tools,
        "capture": settings.capture,
    }
    if served.quantization is not None:
        hashed["quantization"] = served.quantization
    if prompt.shots:
        hashed["shots"] = pool_hash(prompt.shots_source)
    if tools:
        hashed["max_turns"] = settings.max_turns
        hashed["tool_definitions"] = canonical_hash([TOOLS[name].definition for name in tools])
    return hashed


def variants_of(settings: EvalSettings, hashed: dict[str, Any]) -> list[Variant]:
    """Return the variants that each problem is posed under: one per prefix, or a single unnamed one.

    Raises:
        VariantError: if the file of variants cannot be used.
    """
    if settings.variants is None:
        return [Variant(None, "", canonical_hash(hashed))]
    return [
        Variant(name, prefix, canonical_hash({**hashed, "variant": {"name": name, "prefix": prefix}}))
        for name, prefix in read_variants(settings.variants).items()
    ]
