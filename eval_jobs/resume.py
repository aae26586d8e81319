"""The run directory: made for a new evaluation, or found and continued.

With `--output` the folder is given, and it either is new or holds a run of this configuration. Without it the newest unfinished
run of this configuration and these problems under `results/` is continued (`--new` starts another). A folder is never shared by
two configurations: their samples would look alike and mean different things.

A run may grow. More problems, more epochs and more variants make it longer and change no sample that it has, so they are no
part of what it is: the configuration in the folder takes them in, and only what is new is asked. Everything that was posed has
to be posed again, word for word; a run never shrinks.
"""

import platform
import re
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from eval_jobs import EvalError
from eval_jobs.config import ServedModel, hashed_configuration, variants_of
from eval_jobs.problems import SOURCES, Problem, ProblemError
from eval_jobs.prompts import PROMPTS
from eval_jobs.selection import Selection, load_problems
from eval_jobs.settings import EvalSettings
from roentgen.contract import canonical_hash, check_session_id
from roentgen.runs import Run, RunConfig, create_run, find_unfinished
from roentgen.version import __version__

RESULTS = Path("results")
VERSIONED = ("ray", "openai", "datasets", "reasoning-gym", "torch", "transformers", "nnsight")
RUN_ID_STEM = 50
SET_NAME = 40
"""Letters of a file's name that its samples are called after."""


class OtherConfigurationError(EvalError):
    """The output folder holds a run of another configuration; the message lists what differs."""


def open_run(settings: EvalSettings, problems: Sequence[Problem], served: ServedModel, base_url: str) -> Run:
    """Return the run to record into: the one that these settings continue, or a new one.

    Raises:
        OtherConfigurationError: if `--output` holds a run of another configuration.
        RunError: if the folder cannot be written, or a run in it is damaged.
    """
    config = _describe(settings, problems, served, base_url)
    if settings.output is not None:
        if not (settings.output / "config.json").exists():
            return create_run(settings.output, config)
        return _continued(Run(settings.output), config, settings, problems)
    unfinished = None if settings.new else find_unfinished(RESULTS, config.config_hash, config.problems)
    asked = _comparable(config, settings.extractor)
    if (
        unfinished is not None
        and _comparable(unfinished.config, settings.extractor) == asked
        and unfinished.config.variants == config.variants
    ):
        return unfinished
    return create_run((RESULTS / folder_name(settings, len(problems), served.id)).absolute(), config)


def check_output(settings: EvalSettings, problems: Sequence[Problem]) -> None:
    """Refuse an output folder that these settings do not continue, whatever model is served: before one is.

    Raises:
        OtherConfigurationError: saying what differs.
        RunError: if the run in the folder is damaged.
    """
    if settings.output is None or not (settings.output / "config.json").exists():
        return
    run, settings = Run(settings.output), as_begun(settings)
    hashed = run.config.hashed
    served = ServedModel(hashed["model"], hashed.get("revision"), hashed.get("dtype"))
    _continued(run, _describe(settings, problems, served, ""), settings, problems)


def _continued(run: Run, config: RunConfig, settings: EvalSettings, problems: Sequence[Problem]) -> Run:
    """Return a run with what it is asked to grow by.

    Raises:
        OtherConfigurationError: if that is another run, saying what differs.
    """
    asked, begun = (_comparable(one, settings.extractor) for one in (config, run.config))
    different = [*differences(begun, asked), *_lost(run.config, config, problems)]
    if different:
        raise OtherConfigurationError(
            f"{run.path} holds a run of another configuration; choose another --output. (With more --samples, --epochs or "
            "--variants it would grow.) What differs:\n"
            + "\n".join(f"  {name}: {old!r} in the folder, {new!r} asked for" for name, old, new in different)
        )
    wanted = {**config.problems, "name": run.config.set_name}
    if {**run.config.problems, "name": run.config.set_name} == wanted and run.config.variants == config.variants:
        return run
    return Run(
        run.path,
        run.config.model_copy(
            update={
                "problems": wanted,
                "variants": config.variants,
                "settings": {**config.settings, "extractor": run.config.settings["extractor"]},
            }
        ),
    )


def _lost(begun: RunConfig, asked: RunConfig, problems: Sequence[Problem]) -> Iterator[tuple[str, Any, Any]]:
    """Yield what of a run would not be posed again, or otherwise: its name, and both values."""
    epochs, more = (int(config.problems.get("epochs", 1)) for config in (begun, asked))
    if more < epochs:
        yield "problems.epochs", epochs, more
    old, new = ({name: v["prefix"] for name, v in config.variants.items()} for config in (begun, asked))
    if bool(old) != bool(new):
        yield "variants", list(old) or None, list(new) or None
    else:
        yield from ((f"variants.{name}", was, new.get(name)) for name, was in old.items() if new.get(name) != was)
    if begun.problems["hash"] == asked.problems["hash"] or begun.problems["source"] != asked.problems["source"]:
        return
    before, after = (
        {name: config.settings.get(name) for name in ("offset", "sample_ids", "shuffle")}
        | {"samples": config.problems["samples"]}
        for config in (begun, asked)
    )
    posed = _posed(begun)
    if posed is None or problems_hash(posed) != begun.problems["hash"]:
        yield "problems.hash", begun.problems["hash"], asked.problems["hash"]
    elif not {_words(problem) for problem in posed} <= {_words(problem) for problem in problems}:
        yield from differences(before, after, "problems.")


def _posed(config: RunConfig) -> list[Problem] | None:
    """Return the problems that a run was made with, None if its source has them no more."""
    settings = config.settings
    try:
        return load_problems(
            Selection(
                source=config.problems["source"],
                samples=config.problems["samples"],
                offset=settings.get("offset") or 0,
                sample_ids=settings.get("sample_ids"),
                shuffle_seed=settings.get("seed") if settings.get("shuffle") else None,
            )
        )
    except ProblemError:
        return None


def _words(problem: Problem) -> tuple[str, str, str]:
    return problem.problem_id, problem.question, problem.solution


def problems_hash(problems: Sequence[Problem]) -> str:
    """Return a hash of problems, in their order."""
    return canonical_hash([list(_words(problem)) for problem in problems])


def set_name(source: str) -> str:
    """Return what a source's runs and samples are called after: its name, or its file's."""
    stem = source if source in SOURCES else Path(source).stem[:SET_NAME]
    return re.sub(r"[^A-Za-z0-9.-]+", "-", stem).strip(".-") or "problems"


def folder_name(settings: EvalSettings, n: int, model: str) -> str:
    """Make up a run's folder: `gsm8k_smollm2-135m_no_tools_n8_activations_20250912_140530`."""
    parts = [
        set_name(settings.problems),
        _slug(model.rstrip("/").rpartition("/")[2]),
        settings.mode.replace("-", "_"),
        f"n{n}",
    ]
    parts += ["activations"] if settings.collect_activations else []
    return "_".join([*parts, datetime.now().strftime("%Y%m%d_%H%M%S")])


def _describe(settings: EvalSettings, problems: Sequence[Problem], served: ServedModel, base_url: str) -> RunConfig:
    """Return all that is needed to run it again."""
    hashed = hashed_configuration(settings, served)
    prompt = settings.chosen_prompt
    variants = [variant for variant in variants_of(settings, hashed) if variant.name is not None]
    name = settings.output.name if settings.output else folder_name(settings, len(problems), served.id)
    return RunConfig(
        run_id=_run_id(name),
        created=datetime.now(UTC).isoformat(),
        config_hash=canonical_hash(hashed),
        hashed=hashed,
        problems={
            "source": settings.problems if settings.problems in SOURCES else str(Path(settings.problems).absolute()),
            "samples": len(problems),
            "epochs": settings.epochs,
            "hash": problems_hash(problems),
            "name": set_name(settings.problems),
        },
        settings={
            **settings.model_dump(mode="json"),
            "extractor": settings.extractor or prompt.extractor,
            "base_url": base_url,
            "served": asdict(served),
        },
        prompt={
            **asdict(prompt),  # with lists, as they come back from the file
            "stop": list(prompt.stop),
            "fixed_shots": [asdict(shot) for shot in prompt.fixed_shots],
            "hash": prompt.hash,
        },
        variants={str(v.name): {"prefix": v.prefix, "config_hash": v.config_hash} for v in variants},
        versions=_versions(),
        git_revision=_git_revision(),
    )


def as_begun(settings: EvalSettings) -> EvalSettings:
    """Return the settings with which the run in the output folder goes on: it keeps the version of the prompt that it began
    with.

    Raises:
        RunError: if the run in the folder is damaged.
    """
    if settings.output is None or not (settings.output / "config.json").exists() or settings.prompt_file is not None:
        return settings
    begun = Run(settings.output).config.prompt
    older = f"{settings.prompt}-{begun.get('version')}"
    if begun.get("name") == settings.prompt and older in PROMPTS:
        return settings.model_copy(update={"prompt": older})
    return settings


def _comparable(config: RunConfig, extractor: str | None) -> dict[str, Any]:
    """Return what must be equal for samples to belong to one run, however long: the primary extractor too, for `correct` is its
    word. A run keeps the one that it began with, unless another is asked for."""
    comparable = {**config.hashed, "problems": {"source": config.problems["source"]}}
    return comparable if extractor is None else {**comparable, "extractor": config.settings["extractor"]}


def differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs between two nested objects: its dotted name, and both values (None where there is none)."""
    for key in one | other:
        here, there = one.get(key), other.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            yield from differences(here, there, f"{prefix}{key}.")
        elif here != there:
            yield f"{prefix}{key}", here, there


def _run_id(name: str) -> str:
    """Return an id that is also the run's session in the store; the random end keeps equal folder names apart."""
    stem = _slug(name)[:RUN_ID_STEM].lstrip(".") or "run"
    return check_session_id(f"{stem}-{secrets.token_hex(3)}")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _versions() -> dict[str, str]:
    """Return the versions of the packages beside this process (a server elsewhere may have others)."""
    found = {"python": platform.python_version(), "roentgen": __version__}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    """Return the commit of this code, marked -dirty if it was changed since; None outside a working tree."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
