"""The settings of `roentgen capture`, `inspect`, `verify-capture` and `roentgen probe steer`.

They are separate from the code that does the work, so that `--help` need not import torch.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from roentgen.contract import (
    DEFAULT_HOOK_POINTS,
    DEFAULT_LAYERS,
    STORED_DTYPE,
    ActivationRequest,
    AllowNonFinite,
    Device,
    Dtype,
    ModelName,
    PositionPolicy,
    Quantize,
    Revision,
    SessionId,
    SteeredPositions,
    StoredDtype,
    WrittenHookPoints,
    WrittenLayers,
    read_numbers,
)


class CaptureSettings(BaseModel):
    """The settings of `roentgen capture`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Path = Field(description="A run directory, or a JSON lines file (docs/capture.md).")
    model: str | None = Field(
        None, description="Model that reads the texts. Default: the run's own; for a file, the embedded one."
    )
    layers: WrittenLayers = DEFAULT_LAYERS
    hook_points: WrittenHookPoints = DEFAULT_HOOK_POINTS
    positions: PositionPolicy = "all"
    store_dtype: StoredDtype = Field("model", description=STORED_DTYPE)
    allow_non_finite: AllowNonFinite = False
    store: str | None = Field(None, description="Activation store. Default: the one with the run's activations.")
    session: SessionId | None = Field(
        None,
        description="Session to store in. Default: a name made of source, model and capture, so that the same command "
        "continues.",
    )
    batch: int = Field(32, ge=1, description="Maximum number of texts per forward pass.")
    batch_tokens: int = Field(
        0,
        ge=0,
        description="Maximum number of tokens per forward pass, padding included; 0 chooses a number for the device.",
    )
    chunk_size: int | None = Field(
        None, ge=1, description="Number of layers to capture per pass; fewer need less memory. Default: all."
    )
    revision: Revision = None
    dtype: Dtype | None = Field(None, description="Data type of weights and activations. Default: the run's own.")
    quantize: Quantize = None
    device: Device = Field("auto", description="Device that runs the model; auto uses a GPU if there is one.")

    @property
    def request(self) -> ActivationRequest:
        """The activations to capture."""
        return ActivationRequest(
            layers=self.layers,
            hook_points=self.hook_points,
            positions=self.positions,
            dtype=self.store_dtype,
            allow_non_finite=self.allow_non_finite,
        )


class InspectSettings(BaseModel):
    """The settings of `roentgen inspect`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelName
    config_only: bool = Field(
        False, description="Do not load the weights; verify on a narrow random model of the same configuration."
    )
    revision: Revision = None


class VerifySettings(BaseModel):
    """The settings of `roentgen verify-capture`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelName
    layers: WrittenLayers = Field("all", description="Layers to verify, such as 0,12,-1, or all.")
    hook_points: WrittenHookPoints | None = Field(
        None, description="Hook points to verify. Default: all that the model has."
    )
    requests: int = Field(16, ge=2, description="Number of requests to run.")
    prompts: Path | None = Field(
        None, description="File of prompts: one per line, or .jsonl with a field prompt or question."
    )
    revision: Revision = None
    dtype: Dtype = Field("auto", description="Data type of weights and activations.")
    quantize: Quantize = None
    device: Device = Field("auto", description="Device that runs the model; auto uses a GPU if there is one.")


class SteerSettings(BaseModel):
    """The settings of `roentgen probe steer`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe: Path = Field(description="A saved probe, FOLDER/NAME, or a run directory, for its best probe.")
    label: str = Field("correct", description="Label whose probes to use, if PROBE is a run.")
    problems: Path | None = Field(
        None, description="Run whose problems to use. Default: the run that contains the probe."
    )
    samples: int = Field(32, ge=2, description="Number of problems, from the start of the run.")
    scales: Annotated[tuple[float, ...], BeforeValidator(read_numbers)] = Field(
        (-1, -0.5, 0.5, 1),
        description="Steering strengths, comma-separated; 1 is the typical distance of a row from the mean.",
    )
    controls: int = Field(
        2, ge=0, description="Number of random control directions; as many orthogonal ones are added."
    )
    positions: SteeredPositions = "all"
    base_url: str | None = Field(None, description="Server of the probe's model. Default: start one.")
    model: str | None = Field(
        None, description="Location of the probe's model, if it is not the run's model or has been moved."
    )
    parallel: int = Field(16, ge=1, description="Number of concurrent requests.")
    seed: int = Field(0, description="Random seed of the directions, the order of requests and the bootstrap.")
    output: Path | None = Field(None, description="Output folder. Default: steering/NAME beside the probe.")
