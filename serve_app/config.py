"""The server's configuration, validated once, where the application is built."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Dtype = Literal["auto", "float32", "float16", "bfloat16"]


def _absolute(path: str) -> str:
    # A replica has another working directory than the command that configures it.
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _json(value: Any) -> Any:
    """Read an object that was given as text, as command lines do."""
    return json.loads(value) if isinstance(value, str) and value.lstrip().startswith("{") else value


class ServerConfig(BaseModel):
    """What `roentgen serve`, `serve run serve_app.app:build key=value …` and serve.yaml can set.

    Attributes:
        model: "smollm2-135m" (embedded), a folder, or a hub id.
        revision: of a hub model.
        dtype: "auto" takes bfloat16 where the device computes in it, else float32.
        device: "auto" takes a GPU if there is one.
        device_map: spread a model larger than one device over a replica's GPUs and memory, as accelerate does: "auto",
            "balanced", "sequential", or a JSON object that gives each module path its device (0, 1, "cpu", "disk").
        store: the activation store's folder.
        max_batch: requests generated together.
        max_queue: requests waiting; beyond, 429.
        max_prefill_tokens: prompt tokens read in one forward, 0 for what suits the device; running requests wait for it.
        max_cache_tokens: size of the KV cache, 0 for what the free memory allows.
        request_timeout_s: the longest that a request may take, its time in the queue included; beyond, 408.
        max_body_bytes: the largest request body; beyond, 413.
        max_inline_bytes: the largest reply that may carry activations' values (`return: sample` or `full`).
        threads: torch threads of a replica, 0 for one per core (Ray would otherwise allow one).
        num_gpus: GPUs reserved per replica.
        num_replicas: copies of the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "smollm2-135m"
    revision: str | None = None
    dtype: Dtype = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_map: (
        Annotated[Literal["auto", "balanced", "sequential"] | dict[str, str | int], BeforeValidator(_json)] | None
    ) = None
    store: Annotated[str, AfterValidator(_absolute)] = Field(default="activations", validate_default=True)
    max_batch: int = Field(default=32, ge=1)
    max_queue: int = Field(default=256, ge=0)
    max_prefill_tokens: int = Field(default=0, ge=0)
    max_cache_tokens: int = Field(default=0, ge=0)
    request_timeout_s: float = Field(default=3600, gt=0)
    max_body_bytes: int = Field(default=32_000_000, ge=1)
    max_inline_bytes: int = Field(default=64_000_000, ge=0)
    threads: int = Field(default=0, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    num_replicas: int = Field(default=1, ge=1)
