"""The server's configuration, validated once, where the application is built; and which model it is to serve.

The two are apart because they change apart: a `ServerConfig` holds for as long as the server runs, a `ModelChoice` until
another model is loaded (`replica.model_slot`).
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serve_app.models.savepoints import Savepoint, unique_names

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
EngineName = Literal["auto", "transformers", "vllm"]


def _absolute(path: str) -> str:
    # A replica has another working directory than the command that configures it.
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _all_absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(Path(path).expanduser().absolute()) for path in paths)


def _json(value: Any) -> Any:
    """Read an object that was given as text, as command lines do."""
    return json.loads(value) if isinstance(value, str) and value.lstrip().startswith("{") else value


def _names(value: Any) -> Any:
    """Read a list that was given as text, as command lines do."""
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.lstrip().startswith("[") else [name for name in value.split(",") if name]


DeviceMap = Annotated[
    Literal["auto", "balanced", "sequential"] | dict[str, str | int],
    BeforeValidator(_json),
]


class ModelChoice(BaseModel):
    """Which model to serve and how: the body of `POST /v1/models/load`, and what Serve hands to every replica.

    Attributes:
        model_id: "smollm2-135m" (embedded), a folder, or a hub id.
        revision: of a hub model.
        device_map: as `ServerConfig.device_map`.
        trust_remote_code: run code that comes with the model, if the server's configuration allows it.
        savepoints: hook points with names of their own; one that the model does not have fails the load.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_id: str = Field(min_length=1, max_length=1024)
    revision: str | None = Field(default=None, max_length=256)
    device_map: DeviceMap | None = None
    trust_remote_code: bool = False
    savepoints: Annotated[tuple[Savepoint, ...], AfterValidator(unique_names)] = Field(default=(), max_length=256)


class ServerConfig(BaseModel):
    """What `roentgen serve`, `serve run serve_app.app:build key=value …` and serve.yaml can set.

    Attributes:
        model: "smollm2-135m" (embedded), a folder, or a hub id.
        revision: of a hub model.
        dtype: "auto" takes bfloat16 where the device computes in it, else float32.
        device: "auto" takes a GPU if there is one.
        engine: what generates: "transformers", "vllm", or "auto", which takes vLLM where it is installed and there is a CUDA
            GPU.
        capture: whether requests may capture, steer and probe. With vLLM, a server that does not is plain vLLM: with prefix
            caching, chunked prefill and CUDA graphs.
        taps: with vLLM, the hook points that requests may name while CUDA graphs stay on: canonical names, or vLLM's module
            paths with `*` for a layer's number. Without any, every hook point is there, and there are no CUDA graphs.
        tensor_parallel_size: with vLLM, the GPUs of one node that a replica's model is split over.
        device_map: with transformers, spread a model larger than one device over a replica's GPUs and memory, as accelerate
            does: "auto", "balanced", "sequential", or a JSON object that gives each module path its device (0, 1, "cpu",
            "disk").
        allowed_models: models that clients may load in place of `model` (`POST /v1/models/load`), written as they will ask.
        trust_remote_code: whether code that comes with a model may run, of `model` or if a client's load asks for it.
        store: the activation store's folder.
        probes: folders on each replica's machine whose saved probes requests may name; nothing else is read.
        max_batch: requests generated together.
        max_queue: requests waiting; beyond, 429.
        max_prefill_tokens: prompt tokens read in one forward, 0 for what suits the device; running requests wait for it.
        max_cache_tokens: size of the KV cache, 0 for what the free memory allows.
        batch_invariant: whether a request's tokens, scores and rows must be the same whatever runs beside it, to the last bit
            (docs/reproducibility.md); it costs throughput.
        request_timeout_s: the longest that a request may take, its time in the queue included; beyond, 408.
        max_body_bytes: the largest request body; beyond, 413.
        max_inline_bytes: the largest reply that may carry activations' values (`return: sample` or `full`).
        threads: torch threads of a replica, 0 for one per core (Ray would otherwise allow one).
        num_gpus: GPUs reserved per replica.
        num_replicas: copies of the model.
        max_replicas: if more than `num_replicas`, Serve starts more copies, up to this, while there is much to do.
        max_replicas_per_node: 0 for as many as there is room for.
        num_ingresses: copies of the ingress, on as many nodes: the nodes whose proxy answers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "smollm2-135m"
    revision: str | None = None
    dtype: Dtype = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    engine: EngineName = "auto"
    capture: bool = True
    taps: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    tensor_parallel_size: int = Field(default=1, ge=1)
    device_map: DeviceMap | None = None
    allowed_models: Annotated[tuple[str, ...], BeforeValidator(_names)] = ()
    trust_remote_code: bool = False
    store: Annotated[str, AfterValidator(_absolute)] = Field(default="activations", validate_default=True)
    probes: Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_all_absolute)] = ()
    max_batch: int = Field(default=32, ge=1)
    max_queue: int = Field(default=256, ge=0)
    max_prefill_tokens: int = Field(default=0, ge=0)
    max_cache_tokens: int = Field(default=0, ge=0)
    batch_invariant: bool = False
    request_timeout_s: float = Field(default=3600, gt=0)
    max_body_bytes: int = Field(default=32_000_000, ge=1)
    max_inline_bytes: int = Field(default=64_000_000, ge=0)
    threads: int = Field(default=0, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    num_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=0, ge=0)
    max_replicas_per_node: int = Field(default=0, ge=0)
    num_ingresses: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_engine(self) -> Self:
        """Refuse what the engine chosen does not have."""
        if self.engine == "vllm" and self.device_map is not None:
            raise ValueError("device_map: vLLM spreads a model over GPUs by tensor_parallel_size")
        if self.engine != "vllm" and (self.taps or self.tensor_parallel_size > 1):
            raise ValueError("taps and tensor_parallel_size are vLLM's: set engine=vllm")
        if self.engine == "vllm" and self.device == "cpu" and self.batch_invariant:
            raise ValueError("batch_invariant: vLLM has it on CUDA GPUs only; set engine=transformers")
        if self.taps and not self.capture:
            raise ValueError("taps: a server that does not capture has no use for them")
        return self

    @property
    def choice(self) -> ModelChoice:
        """The model to start with."""
        return ModelChoice(
            model_id=self.model,
            revision=self.revision,
            device_map=self.device_map,
            trust_remote_code=self.trust_remote_code,
        )
