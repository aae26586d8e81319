"""Rows of prompts that vLLM finds in its prefix cache, tested without vLLM: its cache and its model's rows are simulated.

A simulated row depends on all tokens before it and on their steering, as in a model. So rows of another prompt, of another
position or of a steered prompt have other values.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roentgen.contract import Positions
from roentgen.linear_probe import LinearProbe
from serve_app.capture.probe_scores import RequestProbe, RequestScores
from serve_app.capture.rows import CapturePlan
from serve_app.capture.steering import SteeringVector
from serve_app.capture.structure import Tap
from serve_app.engines.protocol import GenerationJob, Sampling
from serve_app.engines.vllm.collecting import Collector
from serve_app.engines.vllm.prefix_rows import PrefixRows
from serve_app.engines.vllm.salts import Salts, rows_needed
from serve_app.engines.vllm.worker_messages import CaptureRequest

SIZE, WIDTH = 4, 3
PLACES = {name: Tap(f"layers.{name}", "output") for name in "abc"}
POLICIES = ["all", "prompt", "generated", "last_prompt", "last", "stride:3", "mean_prompt", "mean_generated"]
PROBE_WEIGHTS = LinearProbe(torch.ones(1, WIDTH), torch.zeros(1), torch.zeros(WIDTH), torch.ones(WIDTH))
ROW = WIDTH * 4


def job(
    prompt: list[int],
    policy: str | None = "all",
    keys: str = "ab",
    *,
    probed: bool = False,
    salt: str | None = None,
    steered: str | None = None,
    first: int = 0,
) -> GenerationJob:
    plan = None
    if policy is not None:
        plan = CapturePlan({key: PLACES[key] for key in keys}, Positions.parse(policy), "model", first=first)
    added = SteeringVector("a", PLACES["a"], torch.ones(WIDTH), Positions.parse(steered)) if steered else None
    return GenerationJob(
        prompt_ids=prompt,
        sampling=Sampling(8),
        on_event=print,
        capture=plan,
        steering=(added,) if added else (),
        probes=(RequestProbe("p", "c", PLACES["c"], PROBE_WEIGHTS, "label"),) if probed else (),
        cache_salt=salt,
    )


def states(asked: GenerationJob, tokens: list[int], start: int = 0, state: int = 0) -> list[int]:
    """What the model remembers after each token from `start` on, when it remembers `state` of those before."""
    found = []
    for at in range(start, len(tokens)):
        steered = any(
            steering_vector.wanted(len(asked.prompt_ids), range(at, at + 1)) for steering_vector in asked.steering
        )
        state = (state * 31 + tokens[at] + 1000 * steered) % 99991
        found.append(state)
    return found


def preview(cache_support: list[int], key: str, span: range) -> torch.Tensor:
    """What a place shows at some positions of a sequence."""
    rows = [[float(cache_support[at]), float(ord(key)), float(at)] for at in span]
    return torch.tensor(rows).reshape(len(span), WIDTH)


@dataclass
class Running:
    """A request in vLLM: its tokens, how many have been read, and the model's state after each."""

    asked: GenerationJob
    tokens: list[int]
    piece: int
    salt: str | None
    cache_support: list[int]
    at: int = 0

    def next(self) -> range:
        """The positions that the next step reads."""
        n_prompt = len(self.asked.prompt_ids)
        return range(self.at, min(self.at + self.piece, n_prompt) if self.at < n_prompt else self.at + 1)


@dataclass
class Played:
    """What vLLM and the replica do around a collector: blocks count as cached as soon as they are scheduled."""

    rows: PrefixRows
    salts: Salts = field(default_factory=Salts)
    cached: dict[tuple[str | None, tuple[int, ...]], int] = field(default_factory=dict)
    found: int = 0
    renewed: int = 0

    def __post_init__(self) -> None:
        self.collector = Collector(torch.device("cpu"), self.rows)

    def begin(self, name: str, asked: GenerationJob, tokens: list[int], piece: int) -> Running:
        """Schedule a request; whole blocks of its prompt may be cached, but never its last token."""
        salt, count, state = self.salts.of(asked), 0, 0
        while (
            count + SIZE < len(asked.prompt_ids)
            and (known := self.cached.get((salt, tuple(tokens[: count + SIZE])))) is not None
        ):
            count, state = count + SIZE, known
        self.found += count
        request = CaptureRequest(name, asked.capture, asked.steering, asked.probes, asked.cache_salt)
        self.collector.begin(request, asked.prompt_ids)
        # Of found tokens only the state after the last counts: their rows are shown by nobody.
        return Running(asked, tokens, piece, salt, [0] * count + states(asked, tokens, count, state), count)

    def step(self, batch: dict[str, Running]) -> None:
        """Run a forward of the next tokens of requests, packed."""
        spans = {name: one.next() for name, one in batch.items()}
        step = self.collector.step(list(spans.items()))
        if step is not None:
            for visitor in (step.rows, step.fills, step.scores):
                for key, tap in (visitor.taps if visitor is not None else {}).items():
                    (place,) = (name for name, place in PLACES.items() if place == tap)
                    values = [preview(one.cache_support, place, spans[name]) for name, one in batch.items()]
                    if visitor is not None:
                        visitor(key, torch.cat(values))
            self.collector.done(step, None)
        for name, one in batch.items():
            one.at = spans[name].stop

    def schedule(self, one: Running) -> None:
        """Have the blocks found that a request's next step fills."""
        for end in range(SIZE, one.next().stop + 1, SIZE):
            if end > one.at:
                self.cached.setdefault((one.salt, tuple(one.tokens[:end])), one.cache_support[end - 1])

    def run(self, jobs: list[tuple[GenerationJob, list[int], int]], together: int = 2) -> None:
        """Run jobs, each with its completion and the longest piece of a prompt, so many at a time; check all they get."""
        waiting = [
            (f"{number}", asked, asked.prompt_ids + said, piece) for number, (asked, said, piece) in enumerate(jobs)
        ]
        running: dict[str, Running] = {}
        while waiting or running:
            for one in running.values():
                self.schedule(one)
            while waiting and len(running) < together:
                name, *rest = waiting.pop(0)
                running[name] = self.begin(name, *rest)
                self.schedule(running[name])
            self.step(running)
            for name, one in list(running.items()):
                n_prompt = len(one.asked.prompt_ids)
                if one.at == n_prompt and rows_needed(one.asked) and not self.collector.resumed(name):
                    self.collector.forget(name)
                    self.salts.renew(one.asked, one.salt)
                    self.renewed += 1
                    assert self.renewed < 100
                    del running[name]
                    waiting.insert(0, (f"{name}'", one.asked, one.tokens, one.piece))
                elif one.at >= max(len(one.tokens) - 1, n_prompt):
                    del running[name]
                    self.check(name, one.asked, one.tokens[: max(len(one.tokens) - 1, n_prompt)])

    def check(self, name: str, asked: GenerationJob, fed: list[int]) -> None:
        """Compare a finished job's rows with those of its whole sequence."""
        cache_support = states(asked, fed)
        if asked.probes:
            scores = RequestScores(asked.probes)
            scores.receive(self.collector.scores([name])[name])
            expected = preview(cache_support, "c", range(len(fed))).sum(1, keepdim=True)
            torch.testing.assert_close(scores.all()[0][: len(fed)], expected)
        if asked.capture is None:
            self.collector.forget(name)
            return
        positions = list(asked.capture.kept(len(asked.prompt_ids), 0, len(fed)))
        rows = self.collector.take(name, fed)
        pooled = asked.capture.positions.pooled
        assert rows.position.tolist() == ([-1] * bool(positions) if pooled else positions)
        for key in asked.capture.taps:
            expected = preview(cache_support, key, range(len(fed)))[positions]
            if pooled:
                expected = expected.mean(0, keepdim=True)[: len(rows.position)]
            torch.testing.assert_close(rows.tensors[key], expected)


def roomy() -> PrefixRows:
    return PrefixRows(SIZE, 1 << 20)


def test_a_prompt_that_is_found_has_all_its_rows() -> None:
    """At all lengths around whole blocks, with every policy, in the step that reads it first and later."""
    for length in range(1, 3 * SIZE + 2):
        for policy in POLICIES:
            played = Played(roomy())
            prompt = list(range(length))
            played.run([(job(prompt, policy), [50, 51, 52], 100), (job(prompt, policy), [60], 100)] * 2)
            assert played.found == 3 * ((length - 1) // SIZE * SIZE)
            assert played.renewed == 0


def test_what_needs_no_row_of_its_prompt_shares_with_what_captures_nothing() -> None:
    played = Played(roomy())
    prompt = list(range(9))
    played.run([(job(prompt, None), [50], 100)], 1)
    played.run([(job(prompt, "last_prompt"), [50], 100), (job(prompt, "generated"), [50, 51], 100)], 1)
    assert played.found == 16
    played.run([(job(prompt, "all"), [50], 100)], 1)
    assert played.found == 16


def test_the_next_turn_finds_what_the_last_one_said() -> None:
    played = Played(roomy())
    prompt, said = list(range(6)), list(range(50, 59))
    played.run([(job(prompt), said, 100)])
    longer = prompt + said + [7, 8, 9]
    played.run([(job(longer, first=len(prompt + said) - 1), [70, 71], 100)])
    assert played.found == 12  # the last token that was said has passed through no model
    assert played.renewed == 0
    played.run([(job(longer), [70, 71], 100)])  # needs rows before the second turn, in the block where it begins
    assert played.renewed == 1


def test_rows_that_are_gone_are_computed_again_and_then_shared() -> None:
    """There is room for one block: vLLM still has the first prompt's block, but its rows have been dropped."""
    played = Played(PrefixRows(SIZE, 2 * SIZE * ROW))
    one, other = list(range(9)), list(range(100, 109))
    played.run([(job(one), [50], 100), (job(other), [50], 100), (job(one), [50], 100)], 1)
    assert (played.renewed, played.found) == (1, 8)


def test_clients_with_other_salts_and_steering_find_nothing_of_one_another() -> None:
    played, prompt = Played(roomy()), list(range(9))
    kinds = [{}, {"salt": "x"}, {"salt": "y"}, {"steered": "all"}, {"steered": "generated"}, {"keys": "b"}]
    played.run([(job(prompt, **kind), [50, 51], 100) for kind in kinds], 1)
    assert played.found == 0
    played.run([(job(prompt, **kind), [50, 51], 100) for kind in kinds], 1)
    assert played.found == 8 * len(kinds)


SHARED = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5], [9]]
MIXES = st.lists(
    st.tuples(
        st.sampled_from(SHARED),
        st.lists(st.integers(1, 2), max_size=5),  # the rest of the prompt
        st.lists(st.integers(1, 2), min_size=1, max_size=6),  # the completion
        st.sampled_from([*POLICIES, None]),
        st.sampled_from(["a", "ab", "ba", "c"]),
        st.booleans(),  # probed
        st.sampled_from([None, None, "x"]),
        st.sampled_from([None, None, "all", "generated", "prompt"]),
        st.integers(0, 6),  # first
        st.integers(1, 12),  # the longest piece of a prompt in a step
    ),
    min_size=1,
    max_size=8,
)


def jobs_of(mix: list[Any]) -> list[tuple[GenerationJob, list[int], int]]:
    return [
        (
            job(shared + rest, policy, keys, probed=probed, salt=salt, steered=steered, first=first),
            said,
            piece,
        )
        for shared, rest, said, policy, keys, probed, salt, steered, first, piece in mix
        if policy is not None or probed
    ]


@settings(max_examples=200, deadline=None)
@given(MIXES, st.integers(1, 4), st.sampled_from([0, 3 * ROW * SIZE, 1 << 20]))
def test_what_a_job_gets_does_not_depend_on_what_was_found(mix: list[Any], together: int, room: int) -> None:
    Played(PrefixRows(SIZE, room)).run(jobs_of(mix), together)


class OfTheBlockBefore(PrefixRows):
    """Gives rows of a neighbor."""

    def use(self, names, needed):  # type: ignore[no-untyped-def]
        blocks = super().use(names, needed)
        return blocks and [blocks[max(number - 1, 0)] for number in range(len(blocks))]


class WithoutSalt(Salts):
    """Lets vLLM find whatever has the same tokens."""

    def of(self, job: GenerationJob) -> None:
        return None


@pytest.mark.parametrize("broken", ["neighbor", "salt"])
def test_the_comparison_finds_what_is_wrong(broken: str) -> None:
    """The control: rows of a neighboring block, or steered rows reused by a request without steering."""
    prompt = list(range(14))
    if broken == "neighbor":
        played = Played(OfTheBlockBefore(SIZE, 1 << 20))
        jobs = [(job(prompt), [50], 100)] * 2
    else:
        played = Played(roomy(), salts=WithoutSalt())
        jobs = [
            (job(prompt, "last", steered="generated"), [50] * 9, 100),
            (job(prompt + [50] * 9, "last"), [50], 100),
        ]
    with pytest.raises(AssertionError):
        played.run(jobs, 1)
