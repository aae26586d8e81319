"""What makes two runs comparable: the part of the settings, and of what is served, that changes what the model does.

Its hash is in every sample and in every rollout's key, so two samples with the same hash and problem are the same sample:
that is what resuming and counting once rest on. How many problems, how many at once and how answers are read are left out on
purpose.
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
    """What the server says of the model; all but the id is None where the server is not Roentgen's."""

    id: str
    """The name to ask for."""
    revision: str | None = None
    """What pins its weights."""
    dtype: str | None = None
    """Of weights and activations."""
    num_layers: int | None = None
    """Decoder layers."""
    d_model: int | None = None
    """Width of the residual stream."""
    root: str | None = None
    """What leads to it from anywhere: its folder, or its hub id. It says where the weights lie and not which they are, so no
    hash has it: a folder that is moved is the same model."""
    quantization: str | None = None
    """How the weights are quantized; None also if they are not."""


def hashed_configuration(settings: EvalSettings, served: ServedModelInfo) -> dict[str, Any]:
    """Return what changes what the model does: two runs are comparable if it is equal (`roentgen.contract.canonical_hash`)."""
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
    """Return the configurations that each problem is posed under: one per prefix, or the run's own.

    Raises:
        VariantError: if the file of variants cannot be used.
    """
    if settings.variants is None:
        return [Variant(None, "", canonical_hash(hashed))]
    return [
        Variant(name, prefix, canonical_hash({**hashed, "variant": {"name": name, "prefix": prefix}}))
        for name, prefix in read_variants(settings.variants).items()
    ]
