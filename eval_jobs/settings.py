"""The settings of an evaluation, validated once, with messages that name the option. All other modules rely on this
validation."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SkipValidation,
    field_validator,
    model_validator,
)

from eval_jobs import EvalError
from eval_jobs.addresses import split
from eval_jobs.extractors import EXTRACTORS, choose_scorer
from eval_jobs.problems import SOURCES, Problem, ProblemSource, describe_source, is_number
from eval_jobs.prompts import ANSWER_LINE, ANSWER_TEXT, PROMPTS, Pose, Prompt, choose_prompt, find_prompt
from eval_jobs.selection import Selection
from eval_jobs.verdicts import Scorer
from roentgen.contract import (
    DEFAULT_HOOK_POINTS,
    DEFAULT_LAYERS,
    STORED_DTYPE,
    AllowNonFinite,
    Device,
    Dtype,
    MaxTokens,
    PositionPolicy,
    Quantize,
    Revision,
    StoredDtype,
    Temperature,
    TopP,
    WrittenHookPoints,
    WrittenLayers,
    read_names,
)
from roentgen.defaults import EMBEDDED_MODEL
from roentgen.extensions import Extension, given, preview
from roentgen.options import read_options
from roentgen.ray_connection import check_address

SERVER_OPTIONS = ("store", "dtype", "quantize", "revision", "device")
"""Options of the server: allowed only if this command starts the server."""


CAPTURE_OPTIONS = ("layers", "hook_points", "positions", "store_dtype", "allow_non_finite")
"""Options that choose which activations to capture."""


REFERENCE = "module:name or path/to/file.py:name"


class SettingsError(EvalError):
    """Settings are invalid; the message has one line per option."""


def _read_columns(value: Any) -> Any:
    """Parse `question=problem,answer=solution`; a mapping is returned as it is."""
    if not isinstance(value, str):
        return dict(value) if isinstance(value, Mapping) else value
    pairs = [part.partition("=") for part in value.split(",")]
    if wrong := [name for name, sign, column in pairs if not (name.strip() and sign and column.strip())]:
        raise ValueError(f"{value!r} is not a mapping at {wrong[0]!r}; write question=COLUMN,answer=COLUMN")
    return {name.strip(): column.strip() for name, _, column in pairs}


def _by_name(value: Any) -> Any:
    """Return the name under which a run records a prompt or a scorer given as an object."""
    return value if value is None or isinstance(value, str) else getattr(value, "name", None) or given(value).name


SourceName = Annotated[
    SkipValidation[str | ProblemSource], PlainSerializer(lambda v: v if isinstance(v, str) else describe_source(v))
]
PromptName = Annotated[SkipValidation[str | Prompt | Pose | None], PlainSerializer(_by_name)]
ScorerName = Annotated[SkipValidation[str | Scorer | None], PlainSerializer(_by_name)]
"""A name on the command line, or an object in Python; recorded by name."""


class EvalSettings(BaseModel):
    """The settings of an evaluation. Each field is the command-line option of the same name (`roentgen.options`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    problems: SourceName = Field(
        "arithmetic",
        description=f"{', '.join(SOURCES.built_in)}; a .jsonl, .csv or .parquet file with question and answer; "
        f"hf:OWNER/NAME?split=SPLIT; or {REFERENCE}.",
    )
    columns: Annotated[dict[str, str] | None, BeforeValidator(_read_columns)] = Field(
        None, description="Columns to take fields from: question=COLUMN,answer=COLUMN,problem_id=COLUMN."
    )
    fields: Annotated[tuple[str, ...] | None, BeforeValidator(read_names)] = Field(
        None, description="Additional record fields to keep, comma-separated; all if absent."
    )
    samples: int = Field(3, ge=1, description="Number of problems.")
    offset: int = Field(0, ge=0, description="Number of problems to skip first.")
    sample_ids: Annotated[tuple[str, ...] | None, BeforeValidator(read_names)] = Field(
        None, description="Evaluate exactly these problems: 3,17 or gsm8k-test-0017."
    )
    shuffle: bool = Field(False, description="Shuffle the problems, seeded by --seed.")
    epochs: int = Field(1, ge=1, le=10_000, description="Samples per problem.")
    mode: Literal["no-tools", "with-tools"] = Field("no-tools", description="Whether the model may call a calculator.")
    max_turns: int = Field(10, ge=1, le=100, description="Maximum requests per sample, with tools.")
    max_tokens: MaxTokens = 512
    parallel: int | Literal["auto"] = Field(
        1, description="Requests in flight; auto adapts the number to the server's throughput."
    )
    model: str | None = Field(
        None, description=f"The model; by default {EMBEDDED_MODEL}, or the one that the server at --base-url serves."
    )
    layers: WrittenLayers = DEFAULT_LAYERS
    hook_points: WrittenHookPoints = DEFAULT_HOOK_POINTS
    positions: PositionPolicy = "all"
    collect_activations: bool = Field(False, description="Store activations.")
    store_dtype: StoredDtype = Field("model", description=STORED_DTYPE)
    allow_non_finite: AllowNonFinite = False
    output: Path | None = Field(None, description="The run directory; a new one under results/ if absent.")
    base_url: str | None = Field(
        None,
        description="An OpenAI-compatible server, http://HOST:PORT/v1; several addresses of one server are comma-separated.",
    )
    ray_address: str | None = Field(None, description="The Ray cluster: local or HOST:PORT.")
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    seed: int = Field(0, ge=0, lt=2**63, description="Sampling seed; epoch e samples with seed + e - 1.")
    prompt: PromptName = Field(
        None,
        description=f"{', '.join(PROMPTS.built_in)}; a text with {{question}} in it; or {REFERENCE}. If absent, "
        "answer-line, or answer-text where answers are texts.",
    )
    prompt_file: Path | None = Field(
        None, description="A file with a prompt: a text with {question}, or a Jinja template."
    )
    system: str | None = Field(None, description="System message, instead of the prompt's own.")
    fixed_shots: int | None = Field(
        None,
        ge=0,
        description="Number of solved problems shown before every problem, instead of the prompt's shots: "
        "the first of the prompt's fixed shots, or of --shots-source.",
    )
    drawn_shots: int | None = Field(
        None,
        ge=0,
        description="Number of solved problems drawn from --shots-source for each problem, instead of the prompt's shots.",
    )
    shots_source: str | None = Field(
        None, description="Source of the solved problems, as for --problems; GSM8K's training set if absent."
    )
    variants: Path | None = Field(
        None, description="A YAML file of named prompt prefixes; every problem is posed under each."
    )
    extractor: ScorerName = Field(
        None,
        description=f"The primary extractor: {', '.join(EXTRACTORS)}, or your own scorer, {REFERENCE}; the prompt's own if "
        "absent. All extractors are reported.",
        json_schema_extra={"flags": ["--extractor", "--scorer"]},
    )
    request_timeout: float = Field(
        600.0, gt=0, le=86_400, description="Timeout of a request in seconds, including retries and queueing."
    )
    fail_on_error: int | None = Field(
        None, ge=1, description="Stop after this many failed samples; by default only if many fail in a row."
    )
    dry_run: bool = Field(False, description="Print what would run and how much would be stored, without running it.")
    new: bool = Field(False, description="Start a new run instead of continuing an unfinished one.")
    store: str | None = Field(None, description="The store of a server started by this command.")
    dtype: Dtype | None = Field(None, description="Precision of a model loaded by this command.")
    quantize: Quantize = None
    revision: Revision = None
    device: Device | None = Field(None, description="Device of a model loaded by this command.")
    verbose: bool = Field(False, description="Show Ray's log and tracebacks.")

    @field_validator("problems")
    @classmethod
    def _known_source(cls, value: Any) -> Any:
        if not isinstance(value, str) and not callable(value):
            raise ValueError(f"{preview(value)} is no source; allowed are a name, a path, a reference, and a function")
        return value

    @field_validator("prompt")
    @classmethod
    def _known_prompt(cls, value: Any) -> Any:
        if isinstance(value, str):
            return _checked(find_prompt, value)
        if value is not None and not isinstance(value, Prompt) and not callable(value):
            raise ValueError(
                f"{preview(value)} is no prompt; allowed are a name, a text, a Prompt, and a function of a problem"
            )
        return value

    @field_validator("extractor")
    @classmethod
    def _known_scorer(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, str) and not callable(value):
            raise ValueError(
                f"{preview(value)} is no scorer; allowed are a name, a reference, and a function (output, problem)"
            )
        return value if value is None else _checked(choose_scorer, value)

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
        # Resolved here, because a Ray job's tasks have another working directory.
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
            raise ValueError("--new creates a folder, so it cannot be combined with --output")
        return self

    @model_validator(mode="after")
    def _one_kind_of_shots(self) -> Self:
        if self.fixed_shots is not None and self.drawn_shots is not None:
            raise ValueError("--fixed-shots and --drawn-shots are mutually exclusive")
        return self

    @model_validator(mode="after")
    def _ids_are_all(self) -> Self:
        if self.sample_ids is not None and (self.offset or self.shuffle):
            raise ValueError("--sample-ids selects the problems, so it cannot be combined with --offset or --shuffle")
        return self

    @property
    def chosen_prompt(self) -> Prompt:
        """The prompt that poses the problems.

        Raises:
            PromptError: if the prompt's file cannot be used, or there are too few fixed shots.
            ProblemError: if fixed shots cannot be read.
        """
        chosen = self.prompt if self.prompt is not None else ANSWER_LINE
        return choose_prompt(
            chosen, self.prompt_file, self.system, self.fixed_shots, self.shots_source, self.drawn_shots
        )

    @property
    def chosen_scorer(self) -> Extension[Scorer]:
        """The primary scorer.

        Raises:
            UnknownScorerError: if it is not found.
            PromptError: if no scorer was chosen, and the prompt, which then determines it, cannot be used.
            ProblemError: likewise, if the prompt's shots cannot be read.
        """
        return choose_scorer(self.extractor or self.chosen_prompt.extractor)

    def suited_to(self, problems: Sequence[Problem]) -> Self:
        """Return the settings with the default prompt for these problems, if none was chosen."""
        if self.prompt is not None or self.prompt_file is not None:
            return self
        numbers = all(is_number(problem.gold) for problem in problems)
        return self.model_copy(update={"prompt": (ANSWER_LINE if numbers else ANSWER_TEXT).name})

    @property
    def selection(self) -> Selection:
        """The selection of problems."""
        prompt = self.chosen_prompt
        return Selection(
            source=self.problems,
            columns=self.columns,
            fields=self.fields,
            samples=self.samples,
            offset=self.offset,
            sample_ids=self.sample_ids,
            shuffle_seed=self.seed if self.shuffle else None,
            shots=prompt.shots,
            shots_source=prompt.shots_source,
        )

    @property
    def sampling(self) -> dict[str, Any]:
        """The parameters of every request."""
        return self.model_dump(include={"max_tokens", "temperature", "top_p", "seed"})

    @property
    def capture(self) -> dict[str, Any] | None:
        """The activations to capture; None if activations are not collected."""
        if not self.collect_activations:
            return None
        kept = self.model_dump(mode="json", include={"layers", "hook_points", "positions"})
        # Included only if it was chosen: otherwise the configuration hash of existing runs would change.
        if self.store_dtype != "model":
            kept["dtype"] = self.store_dtype
        return {**kept, "allow_non_finite": True} if self.allow_non_finite else kept


def check_settings(**values: Any) -> EvalSettings:
    """Validate the command line's values.

    Raises:
        SettingsError: if a value is not allowed; the message names its option.
    """
    return read_options(EvalSettings, values, SettingsError)


def _checked(find: Callable[[Any], Any], value: Any) -> Any:
    """Return `value` if `find` accepts it.

    Raises:
        ValueError: with the message of `find`, without the option's name.
    """
    try:
        find(value)
    except EvalError as error:
        raise ValueError(re.sub(r"^--\w+: ", "", str(error))) from error
    return value
