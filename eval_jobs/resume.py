"""Creates the run directory of a new evaluation, or finds the run to continue.

`--output` names the folder, which is either new or holds a run of this configuration. Without it, the newest unfinished run
of this configuration and these problems under `results/` is continued; `--new` starts another run. Two configurations never
share a folder: their samples would look alike and mean different things.

A run may grow. More problems, epochs or variants add samples and change none of the recorded ones, so they are not part of
the run's identity: config.json is updated, and only new attempts are made. All recorded problems must be posed again
verbatim; a run never shrinks.
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
from eval_jobs.hashed_config import ServedModelInfo, hashed_configuration, variants_of
from eval_jobs.problems import Problem, ProblemError, describe_source, set_name
from eval_jobs.prompts import PROMPTS
from eval_jobs.records import gold_of
from eval_jobs.selection import Selection, load_problems
from eval_jobs.settings import EvalSettings
from roentgen import defaults
from roentgen.contract import canonical_hash, check_session_id
from roentgen.runs import Run, RunConfig, create_named_run, create_run, find_unfinished
from roentgen.runs.config import differences
from roentgen.version import __version__

RESULTS = Path(defaults.RESULTS)
VERSIONED = ("ray", "openai", "datasets", "reasoning-gym", "torch", "transformers", "nnsight")
RUN_ID_STEM = 50
RESCORE = (
    "\n(`roentgen score RUN --extractor …` scores all answers of the run with another extractor, or an edited one.)"
)


class OtherConfigurationError(EvalError):
    """The output folder holds a run of a different configuration; the message lists the differences."""


def open_run(settings: EvalSettings, problems: Sequence[Problem], served: ServedModelInfo, base_url: str) -> Run:
    """Return the run to record into: an existing run that these settings continue, or a new one.

    Raises:
        OtherConfigurationError: if `--output` holds a run of a different configuration.
        RunError: if the folder cannot be written, or its run is damaged.
    """
    config = _describe(settings, problems, served, base_url)
    if settings.output is not None:
        if not (settings.output / "config.json").exists():
            return create_run(settings.output, config)
        return _continued(Run(settings.output), config, settings, problems)
    unfinished = None if settings.new else find_unfinished(RESULTS, config.config_hash, config.problems)
    chosen = settings.extractor is not None
    asked = _comparable(config, chosen)
    if (
        unfinished is not None
        and _comparable(unfinished.config, chosen) == asked
        and unfinished.config.variants == config.variants
    ):
        return unfinished
    return create_named_run((RESULTS / folder_name(settings, len(problems), served.id)).absolute(), config)


def check_output(settings: EvalSettings, problems: Sequence[Problem]) -> None:
    """Check, before a model is served, that the settings continue the run in the output folder, whichever model is served.

    Raises:
        OtherConfigurationError: if they do not; the message lists the differences.
        RunError: if the run in the folder is damaged.
    """
    if settings.output is None or not (settings.output / "config.json").exists():
        return
    run, settings = Run(settings.output), keep_recorded_settings(settings)
    hashed = run.config.hashed
    served = ServedModelInfo(
        hashed["model"], hashed.get("revision"), hashed.get("dtype"), quantization=hashed.get("quantization")
    )
    _continued(run, _describe(settings, problems, served, ""), settings, problems)


def _continued(run: Run, config: RunConfig, settings: EvalSettings, problems: Sequence[Problem]) -> Run:
    """Return a run, extended by new problems, epochs or variants.

    Raises:
        OtherConfigurationError: if the settings describe a different run; the message lists the differences.
    """
    asked, recorded = (_comparable(one, settings.extractor is not None) for one in (config, run.config))
    different = [*differences(recorded, asked), *_lost(run.config, config, settings, problems)]
    if different:
        raise OtherConfigurationError(
            f"{run.path} holds a run with a different configuration; choose another --output. (More --samples, --epochs or "
            "--variants would extend it.) Differences:\n"
            + "\n".join(f"  {name}: {old!r} in the folder, {new!r} requested" for name, old, new in different)
            + (RESCORE if any(name == "extractor" for name, _, _ in different) else "")
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


def _lost(
    recorded: RunConfig, asked: RunConfig, settings: EvalSettings, problems: Sequence[Problem]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield recorded parts of a run that would be missing or different: the name, and both values."""
    epochs, more = (int(config.problems.get("epochs", 1)) for config in (recorded, asked))
    if more < epochs:
        yield "problems.epochs", epochs, more
    old, new = ({name: v["prefix"] for name, v in config.variants.items()} for config in (recorded, asked))
    if bool(old) != bool(new):
        yield "variants", list(old) or None, list(new) or None
    else:
        yield from ((f"variants.{name}", was, new.get(name)) for name, was in old.items() if new.get(name) != was)
    if recorded.problems["hash"] == asked.problems["hash"] or recorded.problems["source"] != asked.problems["source"]:
        return
    before, after = (
        {name: config.settings.get(name) for name in ("offset", "sample_ids", "shuffle")}
        | {"samples": config.problems["samples"]}
        for config in (recorded, asked)
    )
    posed = _posed(recorded, settings)
    if posed is None or problems_hash(posed) != recorded.problems["hash"]:
        yield "problems.hash", recorded.problems["hash"], asked.problems["hash"]
    elif not {_words(problem) for problem in posed} <= {_words(problem) for problem in problems}:
        yield from differences(before, after, "problems.")


def _posed(config: RunConfig, now: EvalSettings) -> list[Problem] | None:
    """Return the problems of a recorded run; None if its source no longer provides them."""
    settings = config.settings
    try:
        return load_problems(
            Selection(
                source=now.problems,  # the same source; a function given in Python cannot be found otherwise
                columns=settings.get("columns"),
                fields=settings.get("fields"),
                samples=config.problems["samples"],
                offset=settings.get("offset") or 0,
                sample_ids=settings.get("sample_ids"),
                shuffle_seed=settings.get("seed") if settings.get("shuffle") else None,
            )
        )
    except ProblemError:
        return None


def _words(problem: Problem) -> tuple[str, ...]:
    """Return the parts of a problem that are posed or scored, omitting parts that follow from its question and solution."""
    own = {**problem.fields} if gold_of(problem.solution) == problem.gold else {"": problem.gold, **problem.fields}
    said = (problem.problem_id, problem.question, problem.solution)
    return (*said, canonical_hash(own)) if own else said


def problems_hash(problems: Sequence[Problem]) -> str:
    """Return a hash of problems in their order."""
    return canonical_hash([list(_words(problem)) for problem in problems])


def folder_name(settings: EvalSettings, n: int, model: str) -> str:
    """Generate the name of a run's folder: `gsm8k_smollm2-135m_no_tools_n8_activations_20250912_140530`."""
    parts = [
        set_name(settings.problems),
        _slug(model.rstrip("/").rpartition("/")[2]),
        settings.mode.replace("-", "_"),
        f"n{n}",
    ]
    parts += ["activations"] if settings.collect_activations else []
    return "_".join([*parts, datetime.now().strftime("%Y%m%d_%H%M%S")])


def _describe(settings: EvalSettings, problems: Sequence[Problem], served: ServedModelInfo, base_url: str) -> RunConfig:
    """Return the contents of config.json: everything needed to run the evaluation again."""
    hashed = hashed_configuration(settings, served)
    prompt, scorer = settings.chosen_prompt, settings.chosen_scorer
    variants = [variant for variant in variants_of(settings, hashed) if variant.name is not None]
    name = settings.output.name if settings.output else folder_name(settings, len(problems), served.id)
    return RunConfig(
        run_id=_run_id(name),
        created=datetime.now(UTC).isoformat(),
        config_hash=canonical_hash(hashed),
        hashed=hashed,
        problems={
            "source": describe_source(settings.problems),
            "samples": len(problems),
            "epochs": settings.epochs,
            "hash": problems_hash(problems),
            "name": set_name(settings.problems),
        },
        settings={
            **settings.model_dump(mode="json"),
            "extractor": scorer.name,
            "base_url": base_url,
            "served": asdict(served),
        },
        prompt=prompt.described,
        variants={str(v.name): {"prefix": v.prefix, "config_hash": v.config_hash} for v in variants},
        scorers={} if scorer.built_in else {scorer.name: {"reference": scorer.reference, "hash": scorer.digest}},
        versions=_versions(),
        git_revision=_git_revision(),
    )


def keep_recorded_settings(settings: EvalSettings) -> EvalSettings:
    """Return the settings that continue the run in the output folder: it keeps its version of the prompt and its primary
    scorer.

    Raises:
        RunError: if the run in the folder is damaged.
        OtherConfigurationError: if its scorer can no longer be found.
    """
    if settings.output is None or not (settings.output / "config.json").exists():
        return settings
    recorded = Run(settings.output).config
    if settings.prompt_file is None:
        own = settings.prompt if settings.prompt is not None else recorded.prompt.get("name")
        older = f"{own}-{recorded.prompt.get('version')}"
        if recorded.prompt.get("name") == own and older in PROMPTS.built_in:
            settings = settings.model_copy(update={"prompt": older})
    primary = recorded.settings.get("extractor")
    if settings.extractor is None and primary in recorded.scorers:
        reference = recorded.scorers[primary]["reference"]
        if reference is None:
            raise OtherConfigurationError(
                f"{settings.output} is scored by {primary}, a function given in Python: pass it again"
            )
        settings = settings.model_copy(update={"extractor": reference})
    return settings


def _comparable(config: RunConfig, with_scorer: bool) -> dict[str, Any]:
    """Return what must be equal for samples to belong to one run of any length. If a scorer was chosen, that includes the
    primary scorer, which determines `correct`; otherwise a run keeps its own."""
    comparable = {**config.hashed, "problems": {"source": config.problems["source"]}}
    if not with_scorer:
        return comparable
    name = config.settings["extractor"]
    digest = config.scorers.get(name, {}).get("hash")
    return {**comparable, "extractor": name if digest is None else f"{name}, its source {digest}"}


def _run_id(name: str) -> str:
    """Return a run id, which is also the run's session id; the random suffix distinguishes equal folder names."""
    stem = _slug(name)[:RUN_ID_STEM].lstrip(".") or "run"
    return check_session_id(f"{stem}-{secrets.token_hex(3)}")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _versions() -> dict[str, str]:
    """Return the versions of the packages in this process; a remote server may have other versions."""
    found = {"python": platform.python_version(), "roentgen": __version__}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    """Return the commit of the working tree, marked -dirty if it has changes; None outside a working tree."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
