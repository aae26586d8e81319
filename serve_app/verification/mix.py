"""The requests of a verification, which differ in everything that matters to a batch.

They have prompts and completions of different lengths, greedy and sampled; every position policy; all keys, few keys and none.
One ends at a stop string, one at a stop token, one is cancelled, and one reads a finished answer again without generating.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from roentgen.contract import Positions
from roentgen.errors import RoentgenError
from serve_app.capture.rows import CapturePlan
from serve_app.capture.structure import Tap
from serve_app.engines.protocol import Sampling
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.models.context import UNBOUNDED

REQUESTS = 16
POLICIES = ("all", "generated", "prompt", "mean_generated", "stride:3", "last", "mean_prompt", "last_prompt")
LENGTHS = (24, 24, 7, 24, 18, 48, 1, 13)
"""Maximum numbers of tokens of the requests, in turn; a completion of one token has no generated row."""

SCOUTED = 1
"""The prompt whose greedy continuation gives the stop string and the stop token."""

Kind = Literal["free", "stop string", "stop token", "cancelled", "read again"]
KINDS: dict[int, Kind] = {1: "stop string", 3: "stop token", 5: "cancelled", 6: "read again"}
"""Special requests, by number; the others generate until they end."""

BUILT_IN_PROMPTS = (
    "The capital of France is",
    "Question: Tom has 3 bags of 4 apples and gives 5 of them away. How many apples does he have left?\nAnswer:",
    "Once",
    "def add(a, b):\n    return",
    "A train leaves at nine in the morning and travels for two hours and a half at eighty kilometres an hour. It then "
    "stands still for twenty minutes, because a cow stands on the track. When it goes on, the",
    "1, 2, 3, 4, 5, 6, 7,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three states of water are ice, liquid and",
)


class VerificationError(RoentgenError):
    """A verification is not possible with these options; the message says why."""


@dataclass(frozen=True)
class MixRequest:
    """One request of the mix."""

    number: int
    """Its number, from 0."""
    prompt_ids: list[int]
    """The prompt's tokens."""
    sampling: Sampling
    """Sampling parameters."""
    plan: CapturePlan | None
    """The capture; None for none."""
    kind: Kind
    """The kind of request."""
    score_prompt: bool
    """Whether it requests log-probabilities of the prompt."""


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a file: one per line, or the `prompt` or `question` of each line of a `.jsonl` file.

    Raises:
        VerificationError: if the file cannot be read, is empty, or a line has no prompt.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix == ".jsonl":
            objects = [json.loads(line) for line in lines]
            lines = [str(item.get("prompt") or item["question"]) for item in objects]
    except (OSError, ValueError) as error:  # ValueError: bad JSON or bad Unicode
        raise VerificationError(f"--prompts: {path}: {error}") from error
    except (KeyError, AttributeError) as error:
        raise VerificationError(f"--prompts: {path}: every line requires a field 'prompt' or 'question'") from error
    if not lines:
        raise VerificationError(f"--prompts: {path} has no prompts")
    return lines


def tokenized(model: LoadedModel, prompts: Sequence[str]) -> list[list[int]]:
    """Tokenize prompts; truncate those that leave no room for the longest completion in the context."""
    room = (model.context_length or UNBOUNDED) - max(LENGTHS) - 1
    return [list(model.tokenizer(prompt)["input_ids"])[:room] for prompt in prompts]


def make_requests(
    model: LoadedModel, taps: dict[str, Tap], prompts: list[list[int]], count: int, scouted: list[int]
) -> list[MixRequest]:
    """Create the requests.

    Args:
        model: the model.
        taps: taps by stored key; the first 8 requests capture all of them, with one position policy each, the others a part
            or nothing.
        prompts: the prompts' tokens, used in turn.
        count: number of requests.
        scouted: the greedy completion of `prompts[SCOUTED]`, from which stop string and stop token are chosen.
    """
    return [_request(model, taps, prompts, number, scouted) for number in range(count)]


def _request(
    model: LoadedModel, taps: dict[str, Tap], prompts: list[list[int]], number: int, scouted: list[int]
) -> MixRequest:
    kind = KINDS.get(number, "free")
    scouts_prompt = prompts[SCOUTED % len(prompts)]
    prompt = prompts[number % len(prompts)] if kind in ("free", "cancelled") else scouts_prompt
    sampling = Sampling(LENGTHS[number % len(LENGTHS)], temperature=0)
    kept = taps if number < len(POLICIES) else _part(taps, number)
    plan = CapturePlan(kept, Positions.parse(POLICIES[number % len(POLICIES)]), "model") if kept else None
    match kind:
        case "stop string":
            sampling = replace(sampling, stop=_stop_string(model, scouted))
        case "stop token":
            sampling = replace(sampling, stop_token_ids=frozenset(scouted[len(scouted) // 2 :][:1]))
        case "cancelled":
            sampling = replace(sampling, min_tokens=sampling.max_tokens)
        case "read again" if plan is not None:
            # Rows of the second half of the prompt and of the answer, except its last token.
            plan = replace(plan, n_prompt=len(prompt), first=len(prompt) // 2, stop=len(prompt) + len(scouted) - 1)
            prompt, sampling = prompt + scouted, replace(sampling, max_tokens=0)
        case "free" if number % 2:
            sampling = replace(sampling, temperature=0.8, top_p=0.95, seed=number)
    return MixRequest(number, prompt, sampling, plan, kind, score_prompt=kind == "read again" or number % 4 == 0)


def _part(taps: dict[str, Tap], number: int) -> dict[str, Tap]:
    """Return every third key; none for every fourth request."""
    return {} if number % 4 == 3 else {key: taps[key] for key in list(taps)[number % 3 :: 3]}


def _stop_string(model: LoadedModel, scouted: list[int]) -> tuple[str, ...]:
    """Return the text of a token in the second half of a completion; empty if there is no printable one."""
    pieces = [model.tokenizer.decode([token]) for token in scouted[len(scouted) // 2 :]]
    return tuple(piece for piece in pieces if piece.strip() and piece.isprintable() and "\ufffd" not in piece)[:1]
