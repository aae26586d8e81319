"""Every choice of an evaluation, checked once, with messages that name the option; everything after may rely on it."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from eval_jobs import EvalError
from eval_jobs.addresses import split
from eval_jobs.prompts import PROMPTS, Prompt, choose_prompt
from eval_jobs.scoring import EXTRACTORS
from eval_jobs.selection import Selection
from roentgen.cluster import check_address
from roentgen.contract import DEFAULT_HOOK_POINTS, DEFAULT_LAYERS, Positions

EMBEDDED_MODEL = "smollm2-135m"

SERVER_OPTIONS = ("store", "dtype", "revision", "device")
"""Options of the server: they can be given only to one that this command starts."""


class SettingsError(EvalError):
    """Settings that cannot be; the message has a line per option."""


class EvalSettings(BaseModel):
    """A field is the command line's option of the same name.

    Attributes:
        problems: a source in `problems.SOURCES`, or the path of a file in GSM8K's format.
        samples: how many problems.
        offset: how many problems to leave out before them.
        sample_ids: exactly these problems, by number or id.
        shuffle: take the problems in an order drawn from `seed`.
        epochs: samples per problem.
        mode: `no-tools`, or `with-tools` for a calculator.
        max_turns: requests per sample, at most, with tools.
        max_tokens: most tokens to generate per request.
        temperature: 0 is greedy.
        top_p: nucleus of the sampling.
        seed: of the sampling; epoch e samples with seed + e - 1.
        prompt: a name in `prompts.PROMPTS`.
        prompt_file: a text with `{question}` in it, instead.
        system: the system's message, instead of the prompt's own.
        variants: a file of prompt prefixes, each of which all problems are posed under.
        extractor: the primary one, a name in `scoring.EXTRACTORS`; the prompt's own if absent.
        parallel: requests in flight, or "auto" for as many as make the server faster.
        request_timeout: seconds one request may take, retries and waiting included.
        fail_on_error: stop after so many failed samples; None only if many fail in a row.
        dry_run: say what would be run and how much would be stored, and stop.
        model: the model's name; the server's only one if absent.
        collect_activations: whether to keep activations.
        layers: which layers, or "all".
        hook_points: which hook points.
        positions: which positions, a policy of `contract.Positions`.
        allow_non_finite: keep rows that hold NaN or infinity, which otherwise fail their sample.
        output: the run directory; made up if absent.
        new: start another run even if an unfinished one could be continued.
        base_url: the server, `http://HOST:PORT/v1`; several with commas between them, if it has several.
        ray_address: "local" or HOST:PORT.
        store: where a server started here keeps activations.
        dtype: in which precision a server started here loads the model.
        revision: which revision of the model a server started here loads.
        device: where a server started here runs the model.
        verbose: show Ray's log and tracebacks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    problems: str = "arithmetic"
    samples: int = Field(default=3, ge=1)
    offset: int = Field(default=0, ge=0)
    sample_ids: tuple[str, ...] | None = None
    shuffle: bool = False
    epochs: int = Field(default=1, ge=1, le=10_000)
    mode: Literal["no-tools", "with-tools"] = "no-tools"
    max_turns: int = Field(default=10, ge=1, le=100)
    max_tokens: int = Field(default=512, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    prompt: str = "answer-line"
    prompt_file: Path | None = None
    system: str | None = None
    variants: Path | None = None
    extractor: str | None = None
    parallel: int | Literal["auto"] = 1
    request_timeout: float = Field(default=600.0, gt=0, le=86_400)
    fail_on_error: int | None = Field(default=None, ge=1)
    dry_run: bool = False
    model: str | None = None
    collect_activations: bool = False
    layers: tuple[int, ...] | Literal["all"] = DEFAULT_LAYERS
    hook_points: tuple[str, ...] = DEFAULT_HOOK_POINTS
    positions: str = "all"
    allow_non_finite: bool = False
    output: Path | None = None
    new: bool = False
    base_url: str | None = None
    ray_address: str | None = None
    store: str | None = None
    dtype: str | None = None
    revision: str | None = None
    device: str | None = None
    verbose: bool = False

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

    @field_validator("sample_ids", mode="before")
    @classmethod
    def _read_sample_ids(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = tuple(name.strip() for name in value.split(","))
        if "" in names:
            raise ValueError(f"{value!r} has nothing between two commas, or nothing at all")
        return names

    @field_validator("layers", mode="before")
    @classmethod
    def _read_layers(cls, value: Any) -> Any:
        if not isinstance(value, str) or value == "all":
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            raise ValueError(f"{value!r} is not a list of layers; allowed are 8,12,16 and the like, or all") from None

    @field_validator("hook_points", mode="before")
    @classmethod
    def _read_hook_points(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("layers", "hook_points")
    @classmethod
    def _no_empty_list(cls, value: Any) -> Any:
        if isinstance(value, tuple) and (not value or "" in value):
            raise ValueError(f"{','.join(map(str, value))!r} has nothing between two commas, or nothing at all")
        return value

    @field_validator("positions")
    @classmethod
    def _known_positions(cls, value: str) -> str:
        return str(Positions.parse(value))

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
            PromptError: if the prompt's file cannot be used.
        """
        return choose_prompt(self.prompt, self.prompt_file, self.system)

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
        return {**kept, "allow_non_finite": True} if self.allow_non_finite else kept


def check_settings(**values: Any) -> EvalSettings:
    """Make settings from the command line's values.

    Raises:
        SettingsError: if one is not allowed, naming its option.
    """
    try:
        return EvalSettings(**values)
    except ValidationError as error:
        lines = [_spell(problem["loc"], problem["msg"], problem["input"]) for problem in error.errors()]
        raise SettingsError("\n".join(lines)) from error


def _one_of(value: str, allowed: dict[str, Any]) -> str:
    if value not in allowed:
        raise ValueError(f"{value!r} is unknown; allowed are {', '.join(allowed)}")
    return value


def _spell(location: tuple[int | str, ...], message: str, value: Any) -> str:
    """Spell one of pydantic's errors; those of our own validators name the value already."""
    text = message.removeprefix("Value error, ")
    if not location:
        return text
    given = "" if text != message else f" (given: {value!r})"
    return f"--{str(location[0]).replace('_', '-')}: {text[:1].lower() if given else text[:1]}{text[1:]}{given}"
