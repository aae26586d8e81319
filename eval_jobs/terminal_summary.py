"""Prints the scores of a run in the terminal, with a warning for each reason to distrust them."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from roentgen.runs import Run
from roentgen.runs.failures import shorten
from roentgen.runs.run_comparison import RunComparison

TOO_MANY = 0.10
"""Share of truncated or unparsable outputs above which the accuracy reflects the token budget more than the model."""


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print a line without markup, highlighting or wrapping."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_summary(run: Run, summary: dict[str, Any], console: Console) -> None:
    """Print a run's scores and warnings, and the path of its report."""
    table = Table(title=f"{summary['model']} on {summary['problems']['source']}", title_justify="left")
    table.add_column("extractor")
    for column in ("correct", "accuracy", "95% interval", "± s.e.", "no answer"):
        table.add_column(column, justify="right")
    for name, scores in summary["extractors"].items():
        primary = name == summary["extractor"]
        table.add_row(
            f"→ {name}" if primary else f"  {name}",
            f"{scores['correct']}/{scores['n']}",
            percent(scores["value"]),
            interval(scores),
            percent(scores["standard_error"]),
            str(scores["unparsable"]),
            style="bold" if primary else None,
        )
    console.print(table)
    for line in (format_samples(summary), *_conditions(summary), *_facts(summary)):
        print_line(console, line)
    for warning in warnings(summary):
        print_line(console, f"warning: {warning}", style="yellow")
    print_line(console, f"report: {run.path / 'report.html'}")


def print_comparison(found: RunComparison, console: Console) -> None:
    """Print the comparison of two runs."""
    for name, one, other in found.configuration:
        print_line(console, f"  {name}: {one!r} → {other!r}")
    for pair in found.pairs:
        if pair.names != (None, None):
            print_line(console, " against ".join(_called(name) for name in pair.names))
        change = pair.difference
        if change.value is None:
            print_line(console, "the runs have no problem in common")
            continue
        print_line(console, f"problems in common: {change.problems}")
        print_line(console, f"first:  {percent(pair.first.value)} ({interval(asdict(pair.first))})")
        print_line(console, f"second: {percent(pair.second.value)} ({interval(asdict(pair.second))})")
        print_line(console, f"second − first: {format_difference(asdict(change))}")
        for what, problems in (("better", pair.gained), ("worse", pair.lost)):
            if problems:
                print_line(console, f"{what} in the second: {_some(problems, 20)}")
    if len(found.pairs) > 1:
        print_line(
            console, f"all pairs of variants together: second − first: {format_difference(asdict(found.difference))}"
        )
    for which, names in zip(("first", "second"), found.alone, strict=True):
        if names:
            print_line(
                console,
                f"not compared, because the other run has no such variant: {', '.join(map(_called, names))} of the {which}",
            )


def _called(variant: str | None) -> str:
    return "no variant" if variant is None else f"variant {variant}"


def format_difference(change: dict[str, Any]) -> str:
    """Format a paired difference, `+4.2 points (−1.0 to 9.4); of 120 problems 12 gained, 7 lost, p = 0.36`."""
    if change["value"] is None:
        return "no problem in common"
    low, high = change["low"], change["high"]
    span = "" if low is None else f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return (
        f"{100 * change['value']:+.1f} points{span}; of {format_count(change['problems'], 'problem')} "
        f"{change['gained']} gained, {change['lost']} lost, p = {change['p_value']:.2g}"
    )


def format_samples(summary: dict[str, Any]) -> str:
    """Format the number of scored samples, `120 of 120 samples scored: 40 problems × 3 epochs`."""
    problems = summary["problems"]
    parts = [format_count(int(problems["samples"]), "problem")]
    if problems.get("epochs", 1) > 1:
        parts.append(f"{problems['epochs']} epochs")
    if summary["variants"]:
        parts.append(f"{len(summary['variants'])} variants")
    failed = f", {summary['errors']} failed" if summary["errors"] else ""
    expected = format_count(int(summary["expected_samples"]), "sample")
    return f"{summary['samples']} of {expected} scored{failed}: {' × '.join(parts)}"


def format_count(number: int, noun: str) -> str:
    """Format a count with its noun, `1 problem`, `3 problems`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def warnings(summary: dict[str, Any]) -> list[str]:
    """Return warnings about a run's accuracy, one sentence each."""
    return list(_warnings(summary))


def percent(share: float | None) -> str:
    """Format a share, `37.5%`, or `–` for None. `0.0%` and `100.0%` are exact; shares that would round to them are `<0.1%`
    and `>99.9%`."""
    if share is None:
        return "–"
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{100 * share:.1f}%"


def interval(scores: dict[str, Any]) -> str:
    """Format an interval, `13.7–69.4%`."""
    return "–" if scores["low"] is None else f"{100 * scores['low']:.1f}–{100 * scores['high']:.1f}%"


def _conditions(summary: dict[str, Any]) -> Iterator[str]:
    """Format pass@k, maj@k and the variants, one line each."""
    yield from _several(summary["several_samples"])
    for name, variant in summary["variants"].items():
        against, scores = variant["against_first"], variant["accuracy"]
        change = "" if against is None else f"; against the first {format_difference(against)}"
        yield f"variant {name}: {scores['correct']}/{scores['n']}, {percent(scores['value'])} ({interval(scores)}){change}"
        yield from (f"  {line}" for line in _several(variant["several_samples"]))


def _several(several: dict[str, Any] | None) -> Iterator[str]:
    for name in ("pass_at_k", "maj_at_k") if several else ():
        found = ((k, estimate) for k, estimate in (several or {})[name].items() if estimate is not None)
        if spelled := ", ".join(
            f"k={k} {percent(e['value'])} ({interval(e)}, n={e['problems']} problems)" for k, e in found
        ):
            yield f"{name}: {spelled}"


def _facts(summary: dict[str, Any]) -> Iterator[str]:
    verdicts = summary["verdicts"]
    yield (
        f"verdicts of {summary['extractor']}: {verdicts['correct']} correct, {verdicts['wrong']} wrong, "
        f"{verdicts['no_answer']} no answer found"
    )
    cached = summary.get("cached_tokens")  # absent from summaries of older versions
    found = f" ({cached} of them cached)" if cached else ""
    yield f"tokens: {summary['prompt_tokens']} in{found}, {summary['completion_tokens']} out"
    timing = summary["timing"]
    if timing is not None and timing["tokens_per_second"] is not None:
        yield (
            f"time: {timing['wall_seconds']:.1f} s for {timing['samples']} samples, "
            f"{timing['tokens_per_second']:.1f} tokens/s"
        )
    activations = summary["activations"]
    if activations is not None:
        yield (
            f"activations: {activations['rollouts']} rollouts × {len(activations['keys'])} keys, "
            f"{activations['mean_rows']:.0f} rows each, in {activations['uri']}"
        )


def _warnings(summary: dict[str, Any]) -> Iterator[str]:
    n = summary["samples"]
    if summary["errors"]:
        total = n + summary["errors"]
        yield (
            f"failed samples: {summary['errors']} of {total} ({percent(summary['errors'] / total)}). They are excluded from "
            "all numbers. The field 'error' in samples.jsonl gives the reason; run the same command to retry them."
        )
        for failure in summary.get("failures", [])[:1]:
            message = shorten(failure["message"])
            yield f"most common error ({failure['count']} of {summary['errors']}): {message}. {failure['advice']}"
    if n and summary["truncated"] / n > TOO_MANY:
        yield f"{summary['truncated']} of {n} outputs were truncated at the token limit: raise --max-tokens."
    if n and summary["out_of_turns"] / n > TOO_MANY:
        yield f"{summary['out_of_turns']} of {n} samples called tools until the turn limit: raise --max-turns."
    if n and summary["unparsable"] / n > TOO_MANY:
        yield f"{summary['extractor']} found no answer in {summary['unparsable']} of {n} outputs."
    if summary.get("unread_but_right"):  # absent from summaries of older versions
        yield (
            f"{summary['extractor']} found no answer in {summary['unread_but_right']} outputs in which another extractor "
            "found the correct answer: see audit.jsonl."
        )
    if summary["disagreements"]:
        yield f"extractors disagree about {len(summary['disagreements'])} of {n} outputs: {_some(summary['disagreements'])}."


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
