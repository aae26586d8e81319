"""Rows of prompts that vLLM finds in its prefix cache, without vLLM: what it finds is played, and what its model would give.

What a place shows of a token depends on all tokens before it and on what was added to them, as in a model. So rows of another
prompt, of another position or of a prompt that was steered are other numbers.
"""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roentgen.contract import Positions
from roentgen.linear_probe import Readout
from serve_app.capture.rows import CapturePlan
from serve_app.capture.scoring import RequestScores, Scorer
from serve_app.capture.steering import Addition
from serve_app.capture.structure import Tap
from serve_app.engines.protocol import GenerationJob, Sampling
from serve_app.engines.vllm.collecting import Collector
from serve_app.engines.vllm.orders import Order
from serve_app.engines.vllm.prefix_rows import PrefixRows
from serve_app.engines.vllm.salts import Salts, rows_needed

SIZE, WIDTH = 4, 3
PLACES = {name: Tap(f"layers.{name}", "output") for name in "abc"}
POLICIES = ["all", "prompt", "generated", "last_prompt", "last", "stride:3", "mean_prompt", "mean_generated"]
READOUT = Readout(torch.ones(1, WIDTH), torch.zeros(1), torch.zeros(WIDTH), torch.ones(WIDTH))
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
    added = Addition("a", PLACES["a"], torch.ones(WIDTH), Positions.parse(steered)) if steered else None
    return GenerationJob(
        prompt_ids=prompt,
        sampling=Sampling(8),
        listener=print,
        capture=plan,
        steering=(added,) if added else (),
        probes=(Scorer("p", "c", PLACES["c"], READOUT, "label"),) if probed else (),
        cache_salt=salt,
    )


def shown(asked: GenerationJob, tokens: list[int], key: str, span: range) -> torch.Tensor:
    """What a place shows at some positions of a sequence."""
    state, rows = 0, []
    for at, token in enumerate(tokens[: span.stop]):
        steered = any(addition.wanted(len(asked.prompt_ids), range(at, at + 1)) for addition in asked.steering)
        state = (state * 31 + token + 1000 * steered) % 99991
        rows.append([float(state), float(ord(key)), float(at)])
    return torch.tensor(rows)[span.start :].reshape(len(span), WIDTH)


@dataclass
class Played:
    """What vLLM and the replica do around a collector: blocks count as cached as soon as they are scheduled."""

    rows: PrefixRows
    salts: Salts = field(default_factory=Salts)
    cached: set[tuple[str | None, tuple[int, ...]]] = field(default_factory=set)
    found: int = 0
    renewed: int = 0

    def __post_init__(self) -> None:
        self.collector = Collector(torch.device("cpu"), self.rows)

    def find(self, asked: GenerationJob, tokens: list[int]) -> int:
        """How many tokens of a prompt are in vLLM's cache: whole blocks, and never the last token."""
        salt, count = self.salts.of(asked), 0
        while count + SIZE < len(tokens) and (salt, tuple(tokens[: count + SIZE])) in self.cached:
            count += SIZE
        return count

    def step(self, batch: list[tuple[str, GenerationJob, list[int], range]]) -> None:
        """Run a forward of spans of sequences, packed."""
        for _, asked, tokens, span in batch:
            for end in range(SIZE, span.stop + 1, SIZE):
                self.cached.add((self.salts.of(asked), tuple(tokens[:end])))
        step = self.collector.step([(name, span) for name, _, _, span in batch])
        if step is None:
            return
        for visitor in (step.rows, step.fills, step.scores):
            for key, tap in (visitor.taps if visitor is not None else {}).items():
                (name,) = (name for name, place in PLACES.items() if place == tap)
                visitor(key, torch.cat([shown(asked, tokens, name, span) for _, asked, tokens, span in batch]))
        self.collector.done(step, None)

    def run(self, jobs: list[tuple[GenerationJob, list[int], int]], together: int = 2) -> None:
        """Run jobs, each with its completion and the longest piece of a prompt, so many at a time; check all they get."""
        waiting = [(f"{number}", *one) for number, one in enumerate(jobs)]
        running: dict[str, tuple[GenerationJob, list[int], int, int]] = {}
        while waiting or running:
            while waiting and len(running) < together:
                name, asked, said, piece = waiting.pop(0)
                tokens = asked.prompt_ids + said
                at = self.find(asked, asked.prompt_ids)
                self.found += at
                order = Order(name, asked.capture, asked.steering, asked.probes, asked.cache_salt)
                self.collector.begin(order, asked.prompt_ids)
                running[name] = asked, tokens, piece, at
                for end in range(SIZE, at + piece + 1, SIZE):  # as soon as it is scheduled
                    self.cached.add((self.salts.of(asked), tuple(tokens[: min(end, len(asked.prompt_ids))])))
            batch = []
            for name, (asked, tokens, piece, at) in running.items():
                stop = min(at + piece, len(asked.prompt_ids)) if at < len(asked.prompt_ids) else at + 1
                batch.append((name, asked, tokens, range(at, stop)))
            self.step(batch)
            for name, asked, tokens, span in batch:
                if span.stop == len(asked.prompt_ids) and rows_needed(asked) and not self.collector.resumed(name):
                    self.collector.forget(name)
                    self.salts.renew(asked, self.salts.of(asked))
                    self.renewed += 1
                    said, piece = tokens[len(asked.prompt_ids) :], running.pop(name)[2]
                    waiting.insert(0, (f"{name}'", asked, said, piece))
                elif span.stop >= len(tokens) - 1 and span.stop >= len(asked.prompt_ids):
                    del running[name]
                    self.check(name, asked, tokens[: max(len(tokens) - 1, len(asked.prompt_ids))])
                else:
                    running[name] = (*running[name][:3], span.stop)

    def check(self, name: str, asked: GenerationJob, fed: list[int]) -> None:
        """Compare what a finished job gets with what its sequence shows."""
        if asked.probes:
            scores = RequestScores(asked.probes)
            scores.take_in(self.collector.scores([name])[name])
            expected = shown(asked, fed, "c", range(len(fed))).sum(1, keepdim=True)
            torch.testing.assert_close(scores.all()[0][: len(fed)], expected)
        if asked.capture is None:
            self.collector.forget(name)
            return
        positions = list(asked.capture.kept(len(asked.prompt_ids), 0, len(fed)))
        rows = self.collector.take(name, fed)
        pooled = asked.capture.positions.pooled
        assert rows.position.tolist() == ([-1] * bool(positions) if pooled else positions)
        for key in asked.capture.taps:
            expected = shown(asked, fed, key, range(len(fed)))[positions]
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
    """There is room for one block: what vLLM still has of the first prompt has no rows any more."""
    played = Played(PrefixRows(SIZE, 2 * SIZE * ROW))
    one, other = list(range(9)), list(range(100, 109))
    played.run([(job(one), [50], 100), (job(other), [50], 100), (job(one), [50], 100)], 1)
    assert (played.renewed, played.found) == (1, 8)


def test_clients_with_other_salts_and_steering_find_nothing_of_one_another() -> None:
    played, prompt = Played(roomy()), list(range(9))
    kinds = [{}, {"salt": "x"}, {"salt": "y"}, {"steered": "all"}, {"steered": "generated"}, {"keys": "b"}]
    played.run([(job(prompt, **kind), [50, 51], 100) for kind in kinds], 1)  # type: ignore[arg-type]
    assert played.found == 0
    played.run([(job(prompt, **kind), [50, 51], 100) for kind in kinds], 1)  # type: ignore[arg-type]
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


def jobs_of(mix: list) -> list[tuple[GenerationJob, list[int], int]]:
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
def test_what_a_job_gets_does_not_depend_on_what_was_found(mix: list, together: int, room: int) -> None:
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
    """The control: rows of a neighbouring block, or what was steered found by one who does not steer."""
    prompt = list(range(14))
    if broken == "neighbor":
        played = Played(OfTheBlockBefore(SIZE, 1 << 20))
        jobs = [(job(prompt), [50], 100)] * 2
    else:
        played = Played(roomy(), salts=WithoutSalt())
        jobs = [(job(prompt, steered="generated"), [50] * 9, 100), (job(prompt + [50] * 9), [50], 100)]
    with pytest.raises(AssertionError):
        played.run(jobs, 1)
