"""The server's configuration, validated once, where the application is built; and which model it is to serve.

The two are apart because they change apart: a `ServerConfig` holds for as long as the server runs, a `ModelChoice` until
another model is loaded.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from roentgen.contract import DEFAULT_TAPS_NAME, Device, Dtype, ModelName, Quantize, Revision
from roentgen.defaults import EMBEDDED_MODEL, STORE
from roentgen.model_names import canonical_name
from serve_app.models.savepoints import Savepoint, unique_names

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


DeviceMap = Annotated[Literal["auto", "balanced", "sequential"] | dict[str, str | int], BeforeValidator(_json)]
Spread = Annotated[
    DeviceMap | None,
    Field(
        description="With transformers: spread a model larger than one device over a replica's GPUs and memory, as accelerate "
        "does: auto, balanced, sequential, or a JSON object that gives each module path its device (0, 1, cpu, disk)."
    ),
]
TrustRemoteCode = Annotated[
    bool, Field(description="Run code that comes with a model; a client's load also needs the server to allow it.")
]


class ModelChoice(BaseModel):
    """Which model to serve and how: the body of `POST /v1/models/load`, and what Serve hands to every replica."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_id: Annotated[ModelName, AfterValidator(canonical_name)]
    revision: Revision = None
    device_map: Spread = None
    trust_remote_code: TrustRemoteCode = False
    savepoints: Annotated[tuple[Savepoint, ...], AfterValidator(unique_names)] = Field(
        (),
        max_length=256,
        description="Hook points with names of their own; one that the model does not have fails the load.",
    )


class ServerConfig(BaseModel):
    """What `roentgen serve`, `serve run serve_app.app:build key=value …` and serve.yaml can set.

    `json_schema_extra` says how `roentgen serve` spells a field that it does not call by its name (`roentgen.options`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[ModelName, AfterValidator(canonical_name)] = EMBEDDED_MODEL
    revision: Revision = None
    dtype: Dtype = Field(
        "auto",
        description="Precision of weights and activations; auto is bfloat16 where the device computes in it, else float32.",
    )
    quantize: Quantize = None
    device: Device = Field("auto", description="Where the model runs; auto takes a GPU if there is one.")
    engine: EngineName = Field(
        "auto", description="What generates; auto takes vLLM where it is installed and there is a CUDA GPU."
    )
    capture: bool = Field(
        True,
        description="Whether requests may capture, steer and probe. With vLLM, a server that does not is plain vLLM.",
    )
    taps: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (DEFAULT_TAPS_NAME,),
        description="With vLLM, which compiles the model: the hook points that requests may name: resid_mid (of all layers), "
        "layers.12.resid_mid, or a module path that ends in .input or .output. default stands for resid_post, ln_attn, ln_mlp "
        "and the norms that a request reads which names none: default,resid_mid adds one, resid_post alone narrows.",
    )
    eager: bool = Field(
        False,
        description="Run the model module by module, not compiled: slower, but with vLLM requests may then name any module.",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, description="With vLLM: GPUs of one node that a replica's model is split over."
    )
    device_map: Spread = None
    allowed_models: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (),
        description="A model that clients may load in its place, written as they will ask; may be repeated.",
        json_schema_extra={"flags": ["--allow-model"], "repeated": True},
    )
    trust_remote_code: TrustRemoteCode = Field(
        False, json_schema_extra={"flags": ["--trust-remote-code/--no-trust-remote-code"]}
    )
    store: Annotated[str, AfterValidator(_absolute)] = Field(
        STORE, validate_default=True, description="The activation store: a folder, or s3://BUCKET/FOLDER."
    )
    probes: Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_all_absolute)] = Field(
        (),
        description="A folder, on each replica's machine, whose saved probes requests may name; may be repeated.",
        json_schema_extra={"repeated": True},
    )
    max_batch: int = Field(32, ge=1, description="Requests generated together.")
    max_queue: int = Field(256, ge=0, description="Requests waiting for that; beyond, 429.")
    max_prefill_tokens: int = Field(
        0,
        ge=0,
        description="Prompt tokens read in one forward, which running requests wait for; 0 for what suits the device.",
    )
    max_cache_tokens: int = Field(0, ge=0, description="Size of the KV cache; 0 for what the free memory allows.")
    prefix_cache: bool = Field(
        True,
        description="Whether what has been read of a prompt is kept for the next one that begins in the same way; rows and "
        "tokens are the same without.",
        json_schema_extra={"flags": ["--prefix-cache/--no-prefix-cache"]},
    )
    batch_invariant: bool = Field(
        False,
        description="Same tokens, scores and rows, to the last bit, whatever runs beside a request; slower "
        "(docs/reproducibility.md).",
        json_schema_extra={"flags": ["--batch-invariant/--no-batch-invariant"]},
    )
    request_timeout_s: float = Field(
        3600,
        gt=0,
        description="Seconds that a request may take, its time in the queue included; beyond, 408.",
        json_schema_extra={"flags": ["--request-timeout"]},
    )
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (),
        description="An origin whose pages may use the server from a browser, as https://app.example, or * for every one; "
        "may be repeated. None may by default.",
        json_schema_extra={"flags": ["--cors-origin"], "repeated": True},
    )
    max_body_bytes: int = Field(32_000_000, ge=1, description="The largest request body; beyond, 413.")
    max_inline_bytes: int = Field(
        64_000_000, ge=0, description="The largest reply that may carry activations' values (return: sample or full)."
    )
    threads: int = Field(
        0, ge=0, description="Torch threads of a replica; 0 for one per core (Ray would otherwise allow one)."
    )
    num_gpus: float = Field(0, ge=0, description="GPUs per replica; 0 for one where there are any.")
    num_replicas: int = Field(1, ge=1, description="Copies of the model.")
    max_replicas: int = Field(
        0,
        ge=0,
        description="If more than the copies to begin with: Serve starts more, up to this, while there is much to do.",
    )
    max_replicas_per_node: int = Field(0, ge=0, description="0 for as many as there is room for.")
    num_ingresses: int = Field(
        1, ge=1, description="Copies of the ingress, on as many nodes: the nodes whose proxy answers."
    )

    @model_validator(mode="after")
    def _one_engine(self) -> Self:
        """Refuse what the engine chosen does not have."""
        if self.engine == "vllm" and self.device_map is not None:
            raise ValueError("device_map: vLLM spreads a model over GPUs by tensor_parallel_size")
        if self.engine == "vllm" and self.quantize is not None:
            raise ValueError(
                f"quantize: vLLM does not turn weights into {self.quantize} on a CPU; set engine=transformers, or give a model "
                "that comes quantized"
            )
        if self.quantize is not None and (self.device == "cuda" or self.device_map is not None):
            raise ValueError(f"quantize: {self.quantize} is computed on a CPU: set device=cpu, and no device_map")
        if self.engine != "vllm" and self.tensor_parallel_size > 1:
            raise ValueError("tensor_parallel_size is vLLM's: set engine=vllm")
        if self.engine == "vllm" and self.device == "cpu" and self.batch_invariant:
            raise ValueError("batch_invariant: vLLM has it on CUDA GPUs only; set engine=transformers")
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
