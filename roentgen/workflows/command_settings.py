"""What `roentgen capture`, `inspect`, `verify-capture` and `roentgen probe steer` can be asked for.

The settings are apart from the work, which needs torch, so that the command line can show them without waiting for it.
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
    """What `roentgen capture` is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Path = Field(description="A run directory, or a JSON lines file (docs/capture.md).")
    model: str | None = Field(
        None, description="The model to read with; the run's own if absent, the embedded one for a file."
    )
    layers: WrittenLayers = DEFAULT_LAYERS
    hook_points: WrittenHookPoints = DEFAULT_HOOK_POINTS
    positions: PositionPolicy = "all"
    store_dtype: StoredDtype = Field("model", description=STORED_DTYPE)
    allow_non_finite: AllowNonFinite = False
    store: str | None = Field(
        None, description="Folder of the activation store; the one that the run's activations are in if absent."
    )
    session: SessionId | None = Field(
        None,
        description="Session to store in; if absent, named after source, model and capture: the same command continues.",
    )
    batch: int = Field(32, ge=1, description="Texts in one forward.")
    batch_tokens: int = Field(
        0, ge=0, description="Tokens in one forward, padding included; 0 for what suits the device."
    )
    chunk_size: int | None = Field(
        None, ge=1, description="Layers captured per pass, to need less memory; all in one if absent."
    )
    revision: Revision = None
    dtype: Dtype | None = Field(None, description="Precision to read in; the run's own if absent.")
    quantize: Quantize = None
    device: Device = Field("auto", description="Where the model runs; auto takes a GPU if there is one.")

    @property
    def request(self) -> ActivationRequest:
        """What to keep."""
        return ActivationRequest(
            layers=self.layers,
            hook_points=self.hook_points,
            positions=self.positions,
            dtype=self.store_dtype,
            allow_non_finite=self.allow_non_finite,
        )


class InspectSettings(BaseModel):
    """What `roentgen inspect` is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelName
    config_only: bool = Field(False, description="Leave the weights alone: verify on a narrow random model.")
    revision: Revision = None


class VerifySettings(BaseModel):
    """What `roentgen verify-capture` is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelName
    layers: WrittenLayers = Field("all", description="Layers to verify, such as 0,12,-1, or all.")
    hook_points: WrittenHookPoints | None = Field(
        None, description="Hook points to verify; by default all that the model has."
    )
    requests: int = Field(16, ge=2, description="Requests to run.")
    prompts: Path | None = Field(None, description="Prompts, one a line, or .jsonl with prompt or question.")
    revision: Revision = None
    dtype: Dtype = Field("auto", description="Precision of weights and activations.")
    quantize: Quantize = None
    device: Device = Field("auto", description="Where the model runs; auto takes a GPU if there is one.")


class SteerSettings(BaseModel):
    """What `roentgen probe steer` is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe: Path = Field(description="A saved probe, FOLDER/NAME; or a run, for its best.")
    label: str = Field("correct", description="Of a run: whose probes.")
    problems: Path | None = Field(
        None, description="A run whose problems to pose; else the run that the probe lies in."
    )
    samples: int = Field(32, ge=2, description="How many problems, the first of the run.")
    scales: Annotated[tuple[float, ...], BeforeValidator(read_numbers)] = Field(
        (-1, -0.5, 0.5, 1),
        description="How far to push, comma-separated; 1 is the typical distance of a row from the mean.",
    )
    controls: int = Field(2, ge=0, description="Random directions, and as many orthogonal ones.")
    positions: SteeredPositions = "all"
    base_url: str | None = Field(None, description="A server of the probe's model; else one is started.")
    model: str | None = Field(
        None, description="Where the probe's model is, if it was not the run's own or has been moved since."
    )
    parallel: int = Field(16, ge=1, description="Requests in flight.")
    seed: int = Field(0, description="Seed of the directions, the order of requests and the bootstrap.")
    output: Path | None = Field(None, description="The folder; else beside the probe, steering/NAME.")
