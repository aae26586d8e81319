"""Two runs side by side: the statistics of `runs.run_comparison`, and the samples behind the problems whose verdict changed."""

from typing import Any

from roentgen.runs.run_comparison import Paired, compare
from roentgen.view.errors import ViewError
from roentgen.view.schemas import Changed, Comparison, Verdict
from roentgen.view.sources import OpenRun, OpenSource


def compare_sources(first: OpenSource, second: OpenSource) -> Comparison:
    """Compare two runs, like with like; the difference is the second minus the first.

    Raises:
        ViewError: if one is a session, which has no verdicts.
        RunError: if a record is damaged.
    """
    if not isinstance(first, OpenRun) or not isinstance(second, OpenRun):
        raise ViewError("compare: sessions have no verdicts; name two runs")
    found = compare(first.run, second.run)
    problems = [
        {name for (name,) in one.table.query("SELECT DISTINCT problem FROM samples").fetchall()}
        for one in (first, second)
    ]
    difference = found.difference
    return {
        "a": first.describe(),
        "b": second.describe(),
        "difference": {
            "value": difference.value, "low": difference.low, "high": difference.high, "n": difference.problems,
        },
        "mcnemar": {"p": difference.p_value, "only_a": difference.lost, "only_b": difference.gained},
        "configuration": found.configuration,
        "changed": [one for pair in found.pairs for one in _changed(first, second, pair)],
        "unmatched": {"a": len(problems[0] - problems[1]), "b": len(problems[1] - problems[0])},
    }  # fmt: skip


def _changed(first: OpenRun, second: OpenRun, pair: Paired) -> list[Changed]:
    problems = [*pair.gained, *pair.lost]
    before, after = _samples(first, problems, pair.names[0]), _samples(second, problems, pair.names[1])
    return [
        {"problem": name, "question": before[name]["question"], "a": _verdict(before[name]), "b": _verdict(after[name])}
        for name in problems
    ]


def _samples(run: OpenRun, problems: list[str], variant: str | None) -> dict[str, dict[str, Any]]:
    """Return the first finished sample of each problem under a variant."""
    rows = run.table.rows(
        "SELECT problem, sample_id, verdict, answer, question FROM samples "
        "WHERE list_contains(?, problem) AND variant IS NOT DISTINCT FROM ? AND error IS NULL ORDER BY place DESC",
        [problems, variant],
    )
    return {row["problem"]: row for row in rows}


def _verdict(row: dict[str, Any]) -> Verdict:
    return {"sample_id": row["sample_id"], "verdict": row["verdict"], "answer": row["answer"]}
