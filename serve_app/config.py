"""The server's configuration, and the choice of a model; both are validated once, where the application is built.

They are two classes because they change separately: a `ServerConfig` is fixed while the server runs, and a `ModelChoice` is
replaced when another model is loaded.
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
    # A replica's working directory differs from that of the command that configures it.
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _all_absolute(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(Path(path).expanduser().absolute()) for path in paths)


def _json(value: Any) -> Any:
    """Parse a JSON object that a command line passed as text."""
    return json.loads(value) if isinstance(value, str) and value.lstrip().startswith("{") else value


def _names(value: Any) -> Any:
    """Parse a list that a command line passed as text: JSON, or comma-separated."""
    if not isinstance(value, str):
        return value
    return json.loads(value) if value.lstrip().startswith("[") else [name for name in value.split(",") if name]


DeviceMap = Annotated[Literal["auto", "balanced", "sequential"] | dict[str, str | int], BeforeValidator(_json)]
Spread = Annotated[
    DeviceMap | None,
    Field(
        description="Split a model that is larger than one device over a replica's GPUs and memory, as accelerate does: auto, "
        "balanced, sequential, or a JSON object that maps module paths to devices (0, 1, cpu, disk). transformers engine only."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    Field(
        description="Run Python code from the model's repository. A client may load such a model only if the server allows it."
    ),
]


class ModelChoice(BaseModel):
    """Which model to serve, and how. It is the body of `POST /v1/models/load`, and Serve passes it to every replica."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_id: Annotated[ModelName, AfterValidator(canonical_name)]
    revision: Revision = None
    device_map: Spread = None
    trust_remote_code: TrustRemoteCode = False
    savepoints: Annotated[tuple[Savepoint, ...], AfterValidator(unique_names)] = Field(
        (),
        max_length=256,
        description="User-defined names for hook points. Loading fails if the model lacks one of them.",
    )


class ServerConfig(BaseModel):
    """The settings of a server: from `roentgen serve`, `serve run serve_app.app:build key=value …` or serve.yaml.

    `json_schema_extra` names the option of `roentgen serve` where it differs from the field's name (`roentgen.options`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[ModelName, AfterValidator(canonical_name)] = EMBEDDED_MODEL
    revision: Revision = None
    dtype: Dtype = Field(
        "auto",
        description="Data type of weights and activations; auto is bfloat16 if the device supports it, else float32.",
    )
    quantize: Quantize = None
    device: Device = Field("auto", description="Device that runs the model; auto uses a GPU if there is one.")
    engine: EngineName = Field(
        "auto", description="Inference engine; auto uses vLLM if it is installed and there is a CUDA GPU."
    )
    capture: bool = Field(
        True,
        description="Allow requests to capture activations, steer and probe. Without it, the vLLM engine is plain vLLM.",
    )
    taps: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (DEFAULT_TAPS_NAME,),
        description="vLLM engine only: the hook points that requests may name, comma-separated, because vLLM compiles the "
        "model. Allowed: resid_mid (in all layers), layers.12.resid_mid, or a module path ending in .input or .output. "
        "default stands for resid_post, ln_attn, ln_mlp and the norms that a request captures by default; default,resid_mid "
        "adds a hook point.",
    )
    eager: bool = Field(
        False,
        description="Do not compile the model. This is slower, but with vLLM requests may then name any module.",
    )
    compile_first: bool = Field(
        False,
        description="With transformers on a CPU: compile decoding steps before anything is served, if this machine has not "
        "compiled them yet. It takes one to two minutes. By default they are compiled while the server is idle.",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, description="Number of GPUs of one node that each replica's model is split over. vLLM engine only."
    )
    device_map: Spread = None
    allowed_models: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (),
        description="A model that clients may load in place of --model, by the name they will send. Repeatable.",
        json_schema_extra={"flags": ["--allow-model"], "repeated": True},
    )
    trust_remote_code: TrustRemoteCode = Field(
        False, json_schema_extra={"flags": ["--trust-remote-code/--no-trust-remote-code"]}
    )
    store: Annotated[str, AfterValidator(_absolute)] = Field(
        STORE, validate_default=True, description="Activation store: a folder, or s3://BUCKET/FOLDER."
    )
    probes: Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_all_absolute)] = Field(
        (),
        description="A folder of saved probes that requests may name; it must exist on each replica's machine. Repeatable.",
        json_schema_extra={"repeated": True},
    )
    view_runs: Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_all_absolute)] = Field(
        (),
        description="A run, or a folder of runs, that the page at /view shows beside the store's sessions. Repeatable.",
        json_schema_extra={"repeated": True},
    )
    max_batch: int = Field(32, ge=1, description="Maximum number of sequences in a batch.")
    max_queue: int = Field(256, ge=0, description="Maximum number of waiting sequences; further requests get 429.")
    max_prefill_tokens: int = Field(
        0,
        ge=0,
        description="Prefill chunk size in tokens; it bounds decode latency. 0 chooses a size for the device.",
    )
    max_cache_tokens: int = Field(0, ge=0, description="Size of the KV cache in tokens; 0 uses the free memory.")
    prefix_cache: bool = Field(
        True,
        description="Reuse the KV cache of earlier prompts with the same prefix. Captured rows and tokens do not depend on it.",
        json_schema_extra={"flags": ["--prefix-cache/--no-prefix-cache"]},
    )
    batch_invariant: bool = Field(
        False,
        description="Make tokens, scores and rows bitwise independent of the other requests in the batch. Slower "
        "(docs/reproducibility.md).",
        json_schema_extra={"flags": ["--batch-invariant/--no-batch-invariant"]},
    )
    request_timeout_s: float = Field(
        3600,
        gt=0,
        description="Time limit of a request in seconds, including its time in the queue; after it, 408.",
        json_schema_extra={"flags": ["--request-timeout"]},
    )
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (),
        description="An origin whose pages may call the server from a browser, such as https://app.example, or * for any "
        "origin. Repeatable; none by default.",
        json_schema_extra={"flags": ["--cors-origin"], "repeated": True},
    )
    max_body_bytes: int = Field(
        32_000_000, ge=1, description="Maximum size of a request body in bytes; larger bodies get 413."
    )
    max_inline_bytes: int = Field(
        64_000_000,
        ge=0,
        description="Maximum size in bytes of a reply that contains activation values (return: sample or full).",
    )
    threads: int = Field(
        0, ge=0, description="PyTorch threads per replica; 0 for one per core (Ray's own default is one thread)."
    )
    num_gpus: float = Field(0, ge=0, description="GPUs per replica; 0 for one if the cluster has GPUs.")
    num_replicas: int = Field(1, ge=1, description="Number of replicas of the model.")
    max_replicas: int = Field(
        0,
        ge=0,
        description="Maximum number of replicas under load. Serve scales between --num-replicas and this number if it is "
        "larger.",
    )
    max_replicas_per_node: int = Field(0, ge=0, description="Maximum number of replicas per node; 0 for no limit.")
    num_ingresses: int = Field(
        1,
        ge=1,
        description="Number of ingress replicas, each on its own node; the proxies of these nodes answer requests.",
    )

    @model_validator(mode="after")
    def _one_engine(self) -> Self:
        """Reject settings that the chosen engine does not support."""
        if self.engine == "vllm" and self.device_map is not None:
            raise ValueError(
                "device_map: the vLLM engine does not support it; split a model over GPUs with tensor_parallel_size"
            )
        if self.engine == "vllm" and self.quantize is not None:
            raise ValueError(
                f"quantize: the vLLM engine cannot quantize weights to {self.quantize}; set engine=transformers, or use a "
                "model that is already quantized"
            )
        if self.quantize is not None and (self.device == "cuda" or self.device_map is not None):
            raise ValueError(
                f"quantize: {self.quantize} is available only on a CPU; set device=cpu, without device_map"
            )
        if self.engine != "vllm" and self.tensor_parallel_size > 1:
            raise ValueError("tensor_parallel_size: only the vLLM engine supports it; set engine=vllm")
        if self.engine == "vllm" and self.device == "cpu" and self.batch_invariant:
            raise ValueError("batch_invariant: the vLLM engine supports it only on CUDA GPUs; set engine=transformers")
        return self

    @property
    def choice(self) -> ModelChoice:
        """The model that the server loads first."""
        return ModelChoice(
            model_id=self.model,
            revision=self.revision,
            device_map=self.device_map,
            trust_remote_code=self.trust_remote_code,
        )
