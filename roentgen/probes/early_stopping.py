"""`roentgen probe stop`: what a probe that ends answers early would save, and cost, on a run's stored rows.

    RUN/stopping/<label>/<probe>/
      stopping.json    every setting, those that were chosen, and what a server did with the probe's; written last
      stopping.png     accuracy against tokens
      stopping.html    both on one page that needs nothing else
      live.jsonl       with --confirm, every answer of the server, as it came

The verdicts are those of the run's own scorer, on the text up to where an answer is stopped. With --confirm a server answers
the problems that nothing was chosen on once more, with the probe's setting as the requests' `stop_when`.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from eval_jobs.extractors import UnknownScorerError
from eval_jobs.rescoring import find_scorer, problem_of
from eval_jobs.verdicts import Output, ScorerError, ScoringFailedError, run_scorer
from probes import ProbeDataError
from probes.steering import Arm, SweepTask, run_sweep
from probes.stopping import (
    LiveFinding,
    Reading,
    Stop,
    StopReport,
    StopTrace,
    live_finding,
    make_settings,
    read_traces,
    render_page,
    summarize_stops,
    sweep,
)
from probes.stopping.findings import rows, split_halves
from probes.stopping.stop_settings import all_scores, random_directions
from roentgen.api_keys import client_key
from roentgen.atomic_files import atomic_write, make_folder, write_json
from roentgen.linear_probe import LinearProbe, SavedProbe, find_probe, load_probe
from roentgen.options import read_options
from roentgen.runs import Run, Sample
from roentgen.stop_rule import StopSettings

T = TypeVar("T")


def stop(
    run: Any,
    probe: Any = None,
    *,
    stage: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> StopReport:
    """Estimate on a run's stored rows what early stopping by a probe would save and cost, compared with simpler rules.

    Args:
        run: a run, or its folder, with activations of generated tokens.
        probe: a saved probe's path FOLDER/NAME, the result of `roentgen.probes.train`, or a `SavedProbe`; None for the run's
            best probe.
        stage: called with each stage.
        options: options of `roentgen probe stop` (docs/probes.md): above, lengths, where, then, max_loss, controls, samples,
            session, confirm, base_url, model, parallel, label, seed, output.

    Returns:
        The report; its `stop_when` can be passed to a request or to `Model.generate`.

    Raises:
        OptionError: if an option is not allowed.
        SavedProbeError: if the probe does not exist.
        RunError: if the run does not exist or has no activations.
        ProbeDataError: if the probe does not fit the stored rows.
        StoreError: if a session cannot be read.
        SweepError: with `confirm`, if the server does not have the probe's model, or a request fails.
    """
    options["run"] = getattr(run, "path", run)
    own = getattr(probe, "probe", probe)
    if isinstance(own, SavedProbe):
        named = Path(getattr(probe, "folder", "")) / own.card.name
    else:
        options["probe"], own = probe, None
    settings = read_options(StopSettings, options)
    if own is None:
        named, own = _named(settings)
    return _sweep(settings, named, own, stage)


def _named(settings: StopSettings) -> tuple[Path, SavedProbe]:
    """Return the chosen probe and its path."""
    if settings.probe is None:
        return find_probe(settings.run, settings.label)
    path = settings.probe.expanduser().absolute()
    return path, load_probe(path.parent, path.name)


def _sweep(settings: StopSettings, path: Path, probe: SavedProbe, stage: Callable[[str], None]) -> StopReport:
    """Sweep the settings of a probe over a run's stored rows, and write what they would have done."""
    run = Run(settings.run)
    if len(probe.weight) > 1:
        raise ProbeDataError(f"{path} has {len(probe.weight)} outputs, one per class; only a probe with one can stop")
    stage("reading stored rows")
    where = settings.counts
    traces = read_traces(run, probe.card.key, where, settings.session, settings.samples)
    choosing = split_halves([trace.group for trace in traces], settings.seed)
    if not choosing.any() or choosing.all():
        raise ProbeDataError(f"{run.path} has answers to one problem only; settings are chosen on half of the problems")
    linear_probes: list[LinearProbe] = [probe, *random_directions(probe, settings.controls, settings.seed)]
    scores = all_scores(linear_probes, traces)
    halves = [[found for found, mine in zip(own, choosing, strict=True) if mine] for own in scores]
    half = [trace for trace, mine in zip(traces, choosing, strict=True) if mine]
    tried = make_settings(half, halves, settings.lengths, settings.above)
    stage(f"{len(tried)} settings on {len(traces)} answers")
    judge = _judge_of(run)
    stops = _complete(sweep(traces, scores, tried, settings.then, judge))
    whole, chosen, findings = summarize_stops(traces, tried, stops, choosing, settings.max_loss, settings.seed)
    groups = np.array([trace.group for trace in traces])
    output = settings.output or run.path / "stopping" / path.parent.name / path.name
    report = StopReport(
        run=str(run.path), probe=str(path), key=probe.card.key, where=where, then=settings.then, max_loss=settings.max_loss,
        seen=path.is_relative_to(run.path), samples=(int(choosing.sum()), int((~choosing).sum())),
        problems=(len(np.unique(groups[choosing])), len(np.unique(groups[~choosing]))), seed=settings.seed,
        whole=whole, chosen=chosen, findings=findings, folder=str(output),
    )  # fmt: skip
    make_folder(output)
    if settings.confirm and report.probes_own is not None:
        own = stops[tried.index(report.probes_own.setting)]
        reported = [(trace, one) for trace, one, mine in zip(traces, own, choosing, strict=True) if not mine]
        live = _confirm(settings, run, probe, report, reported, output / "live.jsonl", stage)
        report = replace(report, live=live)
    _write(report, output)
    return report


def _complete(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, on a thread of its own: where a notebook calls, an event loop runs already."""
    with ThreadPoolExecutor(1) as beside:
        return beside.submit(asyncio.run, work).result()


def render(report: StopReport) -> Group:
    """Return what was found as something rich can print."""
    title = f"{Path(report.probe).name}: {report.where} tokens, then {report.then}; {report.samples[1]} answers [95% interval]"
    table = Table(title=title, title_justify="left")
    for column in ("stopped by", "setting", "accuracy", "Δ accuracy", "tokens", "saved"):
        table.add_column(column, overflow="fold")
    for row in rows(report):
        table.add_row(*row)
    return Group(table, *(Text(f"! {note}", "yellow") for note in report.notes()))


def _write(report: StopReport, output: Path) -> None:
    page, picture = render_page(report)
    for name, content in (("stopping.png", picture), ("stopping.html", page.encode())):
        with atomic_write(output / name) as temporary:
            temporary.write_bytes(content)
    write_json(output / "stopping.json", report.to_json())


def _judge_of(run: Run) -> Callable[[str, Sample], Any]:
    """Return what reads a run's answers as its own scorer does.

    Raises:
        ProbeDataError: if the scorer is not to be found.
    """
    try:
        scorer = find_scorer(run.config)
    except UnknownScorerError as error:
        raise ProbeDataError(str(error)) from error

    async def judge(text: str, sample: Sample) -> Reading:
        try:
            verdict = await run_scorer(scorer.name, scorer.value, Output(text), problem_of(sample))
        except (ScorerError, ScoringFailedError) as error:
            raise ProbeDataError(f"{sample.sample_id}: {error}") from error
        return Reading(verdict.answer, verdict.correct)

    return judge


@dataclass(frozen=True)
class _LivePlan:
    """How answers are asked for: with the probe's numbers, and when they act."""

    model: str
    sampling: dict[str, Any]
    epochs: dict[str, int]
    """Of each sample, which attempt it is: each has a seed of its own."""
    parallel: int
    seed: int
    probe: dict[str, Any] = field(repr=False)
    reasons: bool
    """Whether an answer that ends in the reasoning is read there."""

    def parameters(self, task: SweepTask, arm: Arm) -> dict[str, Any]:
        """Return a request's parameters but for its messages."""
        own = {"model": self.model, "extra_body": {"probes": [self.probe]}, **self.sampling}
        if "seed" in own:
            own["seed"] += self.epochs[task.problem_id] - 1
        return own

    def judged_text(self, message: Any) -> str:
        """Return the text of a reply that is judged."""
        thought = (message.model_extra or {}).get("reasoning_content") if self.reasons else None
        return message.content or thought or ""


def _confirm(
    settings: StopSettings,
    run: Run,
    probe: SavedProbe,
    report: StopReport,
    expected: Sequence[tuple[StopTrace, Stop]],
    record: Path,
    stage: Callable[[str], None],
) -> LiveFinding:
    """Have a server answer the reported half's problems with the chosen setting."""
    from openai import AsyncOpenAI  # what a sweep of stored rows needs none of

    from roentgen.serving.for_probes import RETRIES, model_server, served_name

    samples = {trace.sample.sample_id: trace.sample for trace, _ in expected}
    tasks = [SweepTask(name, sample.prompt_messages) for name, sample in samples.items()]
    numbers = {
        "name": "stops", "key": probe.card.key, "weight": probe.weight[0].tolist(), "bias": float(probe.bias[0]),
        "mean": probe.mean.tolist(), "scale": probe.scale.tolist(), "stop_when": report.stop_when,
    }  # fmt: skip
    read = _judge_of(run)

    async def judge(text: str, sample_id: str) -> tuple[bool, bool]:
        found = await read(text, samples[sample_id])
        return found.answer is not None, found.correct

    record.write_text("")
    with model_server(settings, run, probe, stage) as url:
        plan = _LivePlan(
            served_name(url, probe),
            run.config.hashed["sampling"],
            {name: sample.epoch for name, sample in samples.items()},
            settings.parallel,
            settings.seed,
            numbers,
            reasons=report.where == "reasoning" and report.then == "stop",
        )
        stage(f"{len(tasks)} answers, stopped live")
        client = AsyncOpenAI(base_url=url, api_key=client_key(), max_retries=RETRIES, timeout=3600)
        outcomes = _complete(run_sweep(client, plan, tasks, [Arm("nothing")], judge, record, stage))
    own = {outcome.problem_id: outcome for outcome in outcomes}
    ordered = [own[trace.sample.sample_id] for trace, _ in expected]
    return live_finding(
        np.array([outcome.correct for outcome in ordered]),
        np.array([outcome.tokens for outcome in ordered]),
        np.array([bool(outcome.acted) for outcome in ordered]),
        np.array([stop.tokens for _, stop in expected]),
        [trace.group for trace, _ in expected],
        settings.seed,
    )
