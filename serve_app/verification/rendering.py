"""Formats a verification report for a terminal: a line per hook point and layer, the requests, and the verdict."""

from collections import Counter
from itertools import groupby

from rich.console import Group
from rich.table import Table
from rich.text import Text

from serve_app.verification.verification_report import (
    MAX_ERROR,
    MEAN_COSINE,
    MIN_COSINE,
    QuantizationEffect,
    VerificationReport,
)


def render(report: VerificationReport) -> Group:
    """Format a report for a terminal."""
    table = Table("hook point", "layer", "rows", "max error", "mean error", "mean cosine", "min cosine")
    ordered = sorted(report.deviations, key=lambda d: (d.layer is None, d.hook_point, d.layer or 0))
    for _, group in groupby(ordered, key=lambda d: d.hook_point):
        for d in group:
            table.add_row(
                d.hook_point,
                "" if d.layer is None else str(d.layer),
                f"{d.rows:,}",
                f"{d.max_error:.1e}",
                f"{d.mean_error:.1e}",
                f"{d.mean_cosine:.7f}",
                f"{d.min_cosine:.7f}",
            )
        table.add_section()
    effect = [] if report.quantization is None else _effect(report.quantization)
    return Group(table, *(Text(line) for line in _ran(report)), *effect, *_verdict(report))


def _effect(effect: QuantizationEffect) -> list[Text]:
    """Format the difference between the quantized model and the one with plain weights."""
    ordered = sorted(effect.deviations, key=lambda d: d.hook_point)
    lines = [f"weights quantized with {effect.method}; on the same tokens, plain weights give"]
    for hook_point, group in groupby(ordered, key=lambda d: d.hook_point):
        them = list(group)
        rows = sum(d.rows for d in them)
        error, cosine = (sum(getattr(d, name) * d.rows for d in them) / rows for name in ("mean_error", "mean_cosine"))
        lowest = min(d.min_cosine for d in them)
        lines.append(f"  {hook_point}: mean difference {error:.2%}, mean cosine {cosine:.5f}, lowest {lowest:.4f}")
    lines.append(
        f"  another most likely token at {effect.other_choices:,} of {effect.positions:,} positions; mean divergence "
        f"{effect.mean_divergence:.1e} nats"
    )
    return [Text(line) for line in lines]


def _ran(report: VerificationReport) -> list[str]:
    """Format the requests, and the differing greedy choices."""
    ends = Counter(r.ended for r in report.rollouts)
    policies = sorted({r.positions for r in report.rollouts if r.positions})
    lines = [
        f"{len(report.rollouts)} requests, up to {report.together} at the same time; ended by "
        + ", ".join(f"{how} {count}" for how, count in ends.most_common())
        + f"; positions {', '.join(policies)}",
        f"log-probabilities differ by at most {report.max_logprob_error:.1e}",
    ]
    greedy = sum(r.n_completion for r in report.rollouts if r.sampling == "greedy")
    lines.append(f"{greedy:,} greedy tokens, {len(report.divergences)} not the most likely one when run alone")
    lines += [
        f"  request {d.request}, token {d.index}: {d.chosen}, alone {d.expected}; margin {d.margin:.1e}, "
        f"rounding explains {d.rounding:.1e}"
        for d in report.divergences
    ]
    return lines


def _verdict(report: VerificationReport) -> list[Text]:
    full, half = f"every row's error ≤ {MAX_ERROR:.0e}", f"mean cosine ≥ {MEAN_COSINE}, every row's ≥ {MIN_COSINE}"
    rule = full if report.dtype == "float32" else half
    where = f"{report.model} {report.revision}, {report.dtype}, {report.device}: {rule}"
    if report.ok:
        return [Text(f"passed  {where}", style="green")]
    return [Text(f"failed  {where}", style="red"), *(Text(f"  {problem}", style="red") for problem in report.problems)]
