"""`roentgen probe steer`: generates a run's problems with a saved probe's direction added, through a server.

    RUN/probes/<label>/steering/<probe>/
      outcomes.jsonl   every answer, in order of arrival
      steering.png     accuracy, parse rate and length over the scale
      steering.json    the report; written last

Problems, prompts, sampling and scorer are those of the run, so that "no steering" is the run's own condition. A scale of 1
adds a vector whose length is the typical distance of a row from the mean at the probe's hook point (the root of the summed
variances that the probe was standardized with), so that scales are comparable across layers and models.
"""

import asyncio
from collections.abc import Callable
from functools import partial

from openai import AsyncOpenAI
from rich.table import Table

from eval_jobs.extractors import UnknownScorerError
from eval_jobs.problems import Problem
from eval_jobs.rescoring import find_scorer, problem_of
from eval_jobs.verdicts import Output, Scorer, ScorerError, ScoringFailedError, run_scorer
from probes.steering import SweepError, SweepPlan, SweepReport, SweepTask, make_arms, run_sweep, summarize_sweep
from roentgen.api_keys import client_key
from roentgen.atomic_files import atomic_write, make_folder, write_json
from roentgen.contract import split_key
from roentgen.linear_probe import find_probe
from roentgen.runs import Run, same_question
from roentgen.serving.for_probes import RETRIES, model_server, served_name
from roentgen.workflows.command_settings import SteerSettings


def steer(settings: SteerSettings, stage: Callable[[str], None] = lambda text: None) -> SweepReport:
    """Generate a run's problems with and without steering, and write a report.

    Args:
        settings: the command's settings.
        stage: called with each stage.

    Raises:
        SavedProbeError: if the probe does not exist.
        RunError: if the run does not exist.
        SweepError: if the probe, the run and the server do not match, or a request fails.
    """
    path, saved = find_probe(settings.probe, settings.label)
    run = Run(settings.problems or path.parent.parent.parent)
    if len(saved.weight) > 1:
        raise SweepError(
            f"{path} has {len(saved.weight)} directions, one per class; allowed are probes with one direction"
        )
    tasks, posed = _tasks(run, settings.samples)
    card, unit = saved.card, float(saved.scale.norm())
    hook_point, layer = split_key(card.key)
    sampling = run.config.hashed["sampling"]
    output = settings.output or path.parent / "steering" / path.name
    make_folder(output)
    record = output / "outcomes.jsonl"
    record.write_text("")
    arms = make_arms(saved.direction[0], settings.scales, settings.controls, settings.seed)
    try:
        scorer = find_scorer(run.config)
    except UnknownScorerError as error:
        raise SweepError(str(error)) from error
    judge = partial(_judge, scorer.name, scorer.value, posed)
    with model_server(settings, run, saved, stage) as url:
        served = served_name(url, saved)
        plan = SweepPlan(
            served, hook_point, layer, settings.positions, unit, sampling, settings.parallel, settings.seed
        )
        stage(f"{len(tasks)} problems × {len(arms)} arms = {len(tasks) * len(arms)} requests")
        client = AsyncOpenAI(base_url=url, api_key=client_key(), max_retries=RETRIES, timeout=3600)
        outcomes = asyncio.run(run_sweep(client, plan, tasks, arms, judge, record, stage))
    report = SweepReport(
        probe=str(path),
        model=card.model,
        revision=card.revision,
        label=card.label,
        key=card.key,
        positions=settings.positions,
        unit=unit,
        problems=len(tasks),
        seen=run.path == path.parent.parent.parent,
        seed=settings.seed,
        sampling=sampling,
        findings=summarize_sweep(outcomes, settings.seed),
    )
    with atomic_write(output / "steering.png") as temporary:
        report.draw().savefig(temporary, format="png")
    write_json(output / "steering.json", report.to_json())
    return report


def render(report: SweepReport) -> Table:
    """Format the report as a table."""
    name = report.probe.rpartition("/")[2]
    title = f"{name}, {report.problems} problems; a scale of 1 adds {report.unit:.3g} [95% interval]"
    table = Table(title=title, title_justify="left")
    for column in ("along", "scale", "accuracy", "Δ accuracy", "parse rate", "length"):
        table.add_column(column, justify="left" if column == "along" else "right", overflow="fold")
    for finding in report.findings:
        many = f" × {finding.directions}" if finding.directions > 1 else ""
        length = finding.values["length"]
        table.add_row(
            finding.along + many,
            "" if finding.along == "nothing" else f"{finding.scale:+g}",
            str(finding.values["accuracy"]),
            str(finding.differences.get("accuracy", "")),
            str(finding.values["parse_rate"]),
            f"{length.value:.0f} [{length.low:.0f}, {length.high:.0f}]",
        )
    return table


def _tasks(run: Run, samples: int) -> tuple[list[SweepTask], dict[str, Problem]]:
    """Return the first problems of a run, each once, as tasks and by id."""
    if run.config.hashed.get("mode") == "with-tools":
        raise SweepError(f"{run.path} used tools, which a sweep does not support; use a run without tools")
    tasks: dict[str, SweepTask] = {}
    problems: dict[str, Problem] = {}
    answered = [sample for sample in run.read_samples().by_name() if sample.error is None]
    posed: set[int] = set()  # the same question with two ids is one problem
    for sample, problem in zip(answered, same_question([sample.posed for sample in answered]), strict=True):
        if problem not in posed and len(tasks) < samples:
            posed.add(problem)
            tasks[sample.problem_id] = SweepTask(sample.problem_id, sample.prompt_messages)
            problems[sample.problem_id] = problem_of(sample)
    if not tasks:
        raise SweepError(f"{run.path} has no answered problems")
    return list(tasks.values()), problems


async def _judge(
    name: str, scorer: Scorer, problems: dict[str, Problem], text: str, problem_id: str
) -> tuple[bool, bool]:
    try:
        verdict = await run_scorer(name, scorer, Output(text), problems[problem_id])
    except (ScorerError, ScoringFailedError) as error:
        raise SweepError(f"{problem_id}: {error}") from error
    return verdict.answer is not None, verdict.correct
