"""Joins an inspect_ai task's scores to the sessions that its log names; the hook runs it at the end of the task."""

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from anyio.to_thread import run_sync
from inspect_ai.log import read_eval_log_samples

from roentgen import api_keys
from roentgen.harnesses.inspect_log import references, scored_sample
from roentgen.harnesses.join import JoinReport, ServedTarget, join_scored
from roentgen.harnesses.scored import ScoredSample

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample

log = logging.getLogger(__name__)


async def join_task(of: "EvalLog") -> dict[str, JoinReport]:
    """Join a task's scores to the sessions of its model calls; return the reports by the sessions' addresses.

    Raises:
        StoreError: if a server refuses the labels.
    """
    by_session: dict[str, list[ScoredSample]] = defaultdict(list)
    for sample in _samples(of):
        ids: dict[str, list[str]] = defaultdict(list)
        for reference in references(sample):
            ids[reference["session"]] += reference["rollout_ids"]
        for session, named in ids.items():
            by_session[session].append(replace(scored_sample(sample), rollout_ids=tuple(dict.fromkeys(named))))
    reports = {}
    for session, samples in by_session.items():
        target = ServedTarget(session, api_keys.client_key())
        reports[session] = report = await run_sync(join_scored, samples, target)
        for reason, names in report.unmatched.items():
            log.warning(
                "the scores of %d samples were not joined to %s (%s): %s",
                len(names),
                session,
                reason,
                ", ".join(names[:5]),
            )
        log.info("joined the scores of %d of %d samples to %s", report.matched, report.samples, session)
    return reports


def _samples(of: "EvalLog") -> Iterator["EvalSample"]:
    """Yield a log's samples; logs of an eval set have none, and are read from their location."""
    if of.samples is not None:
        yield from of.samples
    elif of.location:
        yield from read_eval_log_samples(of.location, all_samples_required=False)
