"""An inspect_scout scanner that reads probe scores of a transcript from its log.

    scan([probe_scores(at="mean_generated")], transcripts_from("logs"))

The provider `roentgen/…` with `-M probes=…` adds every probe's scores to each output's metadata. The scanner returns one result
per transcript: a value per probe, of one call or aggregated over the calls.
"""

from collections import defaultdict
from statistics import fmean
from typing import Any, Literal

from inspect_scout import Reference, Result, Scanner, Transcript, scanner

from roentgen.harnesses.inspect_log import REFERENCE

At = Literal["last_prompt", "last", "mean_generated", "max_generated"]
Over = Literal["last", "first", "mean", "max", "min"]


@scanner(events=["model"])
def probe_scores(probe: str | None = None, at: At = "last_prompt", over: Over = "last") -> Scanner[Transcript]:
    """Read probes' scores of a transcript's model calls.

    Args:
        probe: name of one probe, whose score is the result; None for an object with the scores of all probes.
        at: which of a call's scores to use: at the prompt's last token, at the last token, or over the generated tokens.
        over: which of a transcript's calls to use, or how to aggregate them.
    """

    async def scan(transcript: Transcript) -> Result:
        calls: dict[str, list[Any]] = defaultdict(list)
        seen: list[Reference] = []
        for event in transcript.events:
            if event.event != "model":
                continue
            for one in (event.output.metadata or {}).get(REFERENCE, {}).get("probes", []):
                if probe in (None, one["probe"]) and one.get(at) is not None:
                    calls[one["probe"]].append(one[at])
                    seen.append(Reference(type="event", id=event.uuid or ""))
        values = {name: _over(scores, over) for name, scores in calls.items()}
        explained = f"{at}, {over} of {max(map(len, calls.values()))} calls" if calls else "no call has scores"
        value = values.get(probe) if probe is not None else (values or None)
        return Result(value=value, explanation=explained, references=seen, metadata={"calls": dict(calls)})

    return scan


def _over(scores: list[Any], over: Over) -> Any:
    if over in ("last", "first") or isinstance(scores[0], list):  # a list of scores has no mean or order
        return scores[0 if over == "first" else -1]
    return fmean(scores) if over == "mean" else max(scores) if over == "max" else min(scores)
