"""Every choice of an evaluation, checked once, with messages that name the option; everything after may rely on it."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from eval_jobs import EvalError
from eval_jobs.addresses import split
from eval_jobs.problems import SOURCES
from eval_jobs.prompts import PROMPTS, Prompt, choose_prompt
from eval_jobs.scoring import EXTRACTORS
from eval_jobs.selection import Selection
from roentgen.cluster import check_address
from roentgen.contract import (
    DEFAULT_HOOK_POINTS,
    DEFAULT_LAYERS,
    STORED_DTYPE,
    AllowNonFinite,
    Device,
    Dtype,
    MaxTokens,
    PositionPolicy,
    Revision,
    StoredDtype,
    Temperature,
    TopP,
    WrittenHookPoints,
    WrittenLayers,
    read_names,
)
from roentgen.defaults import EMBEDDED_MODEL
from roentgen.options import read_options

SERVER_OPTIONS = ("store", "dtype", "revision", "device")
"""Options of the server: they can be given only to one that this command starts."""


CAPTURE_OPTIONS = ("layers", "hook_points", "positions", "store_dtype", "allow_non_finite")
"""Options that say what to keep of activations."""


class SettingsError(EvalError):
    """Settings that cannot be; the message has a line per option."""


class EvalSettings(BaseModel):
    """A field is the command line's option of the same name (`roentgen.options`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    problems: str = Field("arithmetic", description=f"{', '.join(SOURCES)}, or a .jsonl file in GSM8K's format.")
    samples: int = Field(3, ge=1, description="How many problems.")
    offset: int = Field(0, ge=0, description="How many problems to leave out before them.")
    sample_ids: Annotated[tuple[str, ...] | None, BeforeValidator(read_names)] = Field(
        None, description="Exactly these problems: 3,17 or gsm8k-test-0017."
    )
    shuffle: bool = Field(False, description="Take problems in an order drawn from --seed.")
    epochs: int = Field(1, ge=1, le=10_000, description="Samples per problem.")
    mode: Literal["no-tools", "with-tools"] = Field("no-tools", description="Without tools, or with a calculator.")
    max_turns: int = Field(10, ge=1, le=100, description="Requests per sample, at most, with tools.")
    max_tokens: MaxTokens = 512
    parallel: int | Literal["auto"] = Field(
        1, description="Requests in flight, or auto for as many as make the server faster."
    )
    model: str | None = Field(
        None, description=f"The model; {EMBEDDED_MODEL} on a server started here, else the server's own."
    )
    layers: WrittenLayers = DEFAULT_LAYERS
    hook_points: WrittenHookPoints = DEFAULT_HOOK_POINTS
    positions: PositionPolicy = "all"
    collect_activations: bool = Field(False, description="Keep activations.")
    store_dtype: StoredDtype = Field("model", description=STORED_DTYPE)
    allow_non_finite: AllowNonFinite = False
    output: Path | None = Field(None, description="The run directory; made up under results/ if absent.")
    base_url: str | None = Field(
        None,
        description="An OpenAI-compatible server, http://HOST:PORT/v1; several, with commas between them, if it has several.",
    )
    ray_address: str | None = Field(None, description="The Ray cluster: local or HOST:PORT.")
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the sampling; epoch e samples with seed + e - 1.")
    prompt: str = Field("answer-line", description=f"{', '.join(PROMPTS)}.")
    prompt_file: Path | None = Field(None, description="A text with {question} in it, instead.")
    system: str | None = Field(None, description="The system's message, instead of the prompt's own.")
    fixed_shots: int | None = Field(
        None,
        ge=0,
        description="Solved problems before every problem, always the same, instead of the prompt's shots: the first of its "
        "own fixed ones, or of GSM8K's training set.",
    )
    variants: Path | None = Field(
        None, description="A YAML file of names and prompt prefixes: all problems under each."
    )
    extractor: str | None = Field(
        None, description=f"The primary one of {', '.join(EXTRACTORS)}; the prompt's own if absent. All are reported."
    )
    request_timeout: float = Field(
        600.0, gt=0, le=86_400, description="Seconds one request may take, retries and waiting included."
    )
    fail_on_error: int | None = Field(
        None, ge=1, description="Stop after this many failed samples; if absent, only if many fail in a row."
    )
    dry_run: bool = Field(False, description="Say what would be run and how much would be stored, and stop.")
    new: bool = Field(False, description="Start another run instead of continuing one.")
    store: str | None = Field(None, description="Where a server started here keeps activations.")
    dtype: Dtype | None = Field(None, description="Precision of a model loaded here.")
    revision: Revision = None
    device: Device | None = Field(None, description="Device of a model loaded here.")
    verbose: bool = Field(False, description="Show Ray's log, and tracebacks.")

    @field_validator("prompt")
    @classmethod
    def _known_prompt(cls, value: str) -> str:
        return _one_of(value, PROMPTS)

    @field_validator("extractor")
    @classmethod
    def _known_extractor(cls, value: str | None) -> str | None:
        return value if value is None else _one_of(value, EXTRACTORS)

    @field_validator("parallel", mode="before")
    @classmethod
    def _read_parallel(cls, value: Any) -> Any:
        if value == "auto":
            return value
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = 0
        if number < 1:
            raise ValueError(f"{value!r} is not allowed; allowed are whole numbers from 1, and auto")
        return number

    @field_validator("output", "prompt_file", "variants")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        # At once, because a Ray job's tasks have another working directory.
        return value.expanduser().absolute() if value is not None else None

    @field_validator("base_url")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        return ",".join(split(value)) if value is not None else None

    @field_validator("ray_address")
    @classmethod
    def _no_guessing(cls, value: str | None) -> str | None:
        return value if value is None else check_address(value)

    @model_validator(mode="after")
    def _no_two_outputs(self) -> Self:
        if self.output is not None and self.new:
            raise ValueError("--new makes up a folder of its own, so it cannot be given together with --output")
        return self

    @model_validator(mode="after")
    def _ids_are_all(self) -> Self:
        if self.sample_ids is not None and (self.offset or self.shuffle):
            raise ValueError(
                "--sample-ids names the problems, so it cannot be given together with --offset or --shuffle"
            )
        return self

    @property
    def chosen_prompt(self) -> Prompt:
        """How problems are posed.

        Raises:
            PromptError: if the prompt's file cannot be used, or there are fewer fixed shots.
            ProblemError: if fixed shots cannot be read.
        """
        return choose_prompt(self.prompt, self.prompt_file, self.system, self.fixed_shots)

    @property
    def selection(self) -> Selection:
        """Which problems are posed."""
        return Selection(
            source=self.problems,
            samples=self.samples,
            offset=self.offset,
            sample_ids=self.sample_ids,
            shuffle_seed=self.seed if self.shuffle else None,
            shots=self.chosen_prompt.shots,
        )

    @property
    def sampling(self) -> dict[str, Any]:
        """What of the settings goes into every request."""
        return self.model_dump(include={"max_tokens", "temperature", "top_p", "seed"})

    @property
    def capture(self) -> dict[str, Any] | None:
        """What to keep of the model's activations; None if nothing."""
        if not self.collect_activations:
            return None
        kept = self.model_dump(mode="json", include={"layers", "hook_points", "positions"})
        # Said only where it is asked for: it would make another configuration of every run there is.
        if self.store_dtype != "model":
            kept["dtype"] = self.store_dtype
        return {**kept, "allow_non_finite": True} if self.allow_non_finite else kept


def check_settings(**values: Any) -> EvalSettings:
    """Make settings from the command line's values.

    Raises:
        SettingsError: if one is not allowed, naming its option.
    """
    return read_options(EvalSettings, values, SettingsError)


def _one_of(value: str, allowed: dict[str, Any]) -> str:
    if value not in allowed:
        raise ValueError(f"{value!r} is unknown; allowed are {', '.join(allowed)}")
    return value
