"""Prompts that are read from a cache: every row against a teacher-forced forward with plain hooks, tokens against `generate`.

Each comparison has a control: with the mechanism broken inside, it must fail.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from roentgen.contract import Positions
from serve_app.capture.probe_scores import RequestProbe
from serve_app.capture.rows import CapturePlan
from serve_app.capture.steering import SteeringVector
from serve_app.engines.prefix_blocks import name_blocks
from serve_app.engines.protocol import Finished, Sampling
from serve_app.engines.transformers import engine as engines
from serve_app.engines.transformers import prefix_reuse
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.engines.transformers.prefix_cache import CacheLimits, PrefixCache
from tests.serve_app import tiny
from tests.serve_app.alone import LLAMA_MODULES, forward_with_hooks, generate_alone, layer_path, plan
from tests.serve_app.capture.test_probe_scores import by_numpy, scorer
from tests.serve_app.capture.test_steering import LLAMA, Steer, forward_by_hand, steered
from tests.serve_app.engines.transformers.test_invariance import bits, in_dtype
from tests.serve_app.tiny import Call

SHARED = [(7 * i + i * i // 5) % 250 for i in range(70)]
"""Tokens that prompts begin with: two blocks and six tokens."""


def prompt(tail: int, length: int = 9, shared: int = 70) -> list[int]:
    return SHARED[:shared] + [(tail + 3 * i) % 250 for i in range(length)]


@contextmanager
def serving(model: LoadedModel, **options: Any) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(model, **options)
    assert engine.prefix_cache.enabled or not options.get("prefix_cache", True)
    yield engine
    engine.close()


def call(
    tokens: list[int],
    asked: CapturePlan | None = None,
    max_tokens: int = 4,
    *,
    probes: tuple[RequestProbe, ...] = (),
    salt: str | None = None,
    steering: Sequence[SteeringVector] = (),
    score_prompt: bool = False,
) -> Call:
    made = Call(tokens, Sampling(max_tokens, temperature=0), asked)
    made.job = replace(made.job, probes=probes, cache_salt=salt, steering=tuple(steering), score_prompt=score_prompt)
    return made


def expected_rows(model: LoadedModel, fed: list[int], keys: Sequence[str]) -> dict[str, torch.Tensor]:
    """The rows of a teacher-forced forward over these tokens alone."""
    places = {}
    for key in keys:
        _, layer, name = key.split(".")
        path, side = LLAMA_MODULES[name]
        places[key] = (f"{layer_path(model)}.{layer}{path}", side)
    return forward_with_hooks(model, fed, places)


def check(model: LoadedModel, asked: Call, result: Finished) -> None:
    """Compare a call's captured rows and scores with a teacher-forced forward: count, positions and values."""
    job = asked.job
    fed = job.prompt_ids + result.token_ids[:-1]
    for found, scores in zip(job.probes, result.probed, strict=True):
        rows = expected_rows(model, fed, [found.key])[found.key]
        np.testing.assert_allclose(scores.numpy(), by_numpy(found, rows), rtol=1e-3, atol=1e-3)
    if job.capture is None:
        return
    assert result.captured is not None
    positions = job.capture.positions
    kept = list(positions.select(len(job.prompt_ids), len(fed), first=job.capture.first))
    expected = expected_rows(model, fed, list(job.capture.taps))
    assert result.captured.position.tolist() == ([-1] * bool(kept) if positions.pooled else kept)
    for key, rows in result.captured.tensors.items():
        there = expected[key][kept]
        there = there.mean(0, keepdim=True) if positions.pooled else there
        error = (rows - there).norm(dim=1) / there.norm(dim=1)
        assert len(rows) == len(there)
        assert not len(rows) or error.max() <= 1e-4, f"{key}: {error.max()}"


def run(model: LoadedModel, engine: TransformersEngine, calls: list[Call]) -> list[int]:
    """Run calls one after the other, check each, and return how many tokens of each were found."""
    found = []
    for one in calls:
        (result,) = tiny.run(engine, [one])
        check(model, one, result)
        found.append(result.cached_tokens)
    return found


@pytest.mark.parametrize(
    ("positions", "first"),
    [("all", 0), ("prompt", 0), ("generated", 0), ("last_prompt", 0), ("last", 0), ("stride:5", 0), ("mean_prompt", 0),
     ("mean_generated", 0), ("all", 40), ("stride:3", 33), ("mean_prompt", 50)],
)  # fmt: skip
def test_rows_of_a_found_prefix(llama: LoadedModel, positions: str, first: int) -> None:
    asked = replace(plan(llama, "resid_post", "ln_mlp", positions=positions), first=first)
    with serving(llama) as engine:
        found = run(llama, engine, [call(prompt(1), asked), call(prompt(2), asked), call(prompt(1), asked, 7)])
    assert found == [0, *[32 if first % 32 else 64] * 2]  # a block has all rows of a hook point, or none


@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 95, 96, 97])
def test_prompts_that_end_at_a_blocks_end_and_beside_it(llama: LoadedModel, length: int) -> None:
    tokens, asked = prompt(5, length), plan(llama, "resid_mid")
    tokens = tokens[:length]
    with serving(llama) as engine:
        found = run(llama, engine, [call(tokens, asked), call(tokens, asked), call(tokens, None)])
        assert found == [0, *[min(length // 32 * 32, length - 1)] * 2]


def test_tokens_are_those_without_the_cache(llama: LoadedModel) -> None:
    prompts = [prompt(tail, length) for tail in (1, 2) for length in (1, 9, 30)] * 2
    alone = [generate_alone(llama, tokens, 12) for tokens in prompts]
    for options in ({}, {"max_prefill_tokens": 40}, {"prefix_cache": False}):
        with serving(llama, **options) as engine:
            results = tiny.run(engine, [call(tokens, None, 12) for tokens in prompts])
            assert [result.token_ids for result in results] == alone
            assert (max(result.cached_tokens for result in results) > 0) == options.get("prefix_cache", True)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2", "deepseek_v3"])
def test_other_caches_than_a_llamas(architecture: str) -> None:
    """Windows that are shorter than a block, and keys that are wider than values."""
    model = tiny.loaded(architecture)
    prompts = [prompt(1), prompt(2), prompt(1)]
    with serving(model) as engine:
        results = [tiny.run(engine, [call(tokens, None, 9)])[0] for tokens in prompts]
    assert [result.token_ids for result in results] == [generate_alone(model, tokens, 9) for tokens in prompts]
    assert [result.cached_tokens for result in results] == [0, 64, 64]


def test_a_block_gains_the_rows_that_it_lacks(llama: LoadedModel) -> None:
    some, others = plan(llama, "resid_post", layers=(0,)), plan(llama, "resid_post", "mlp_out", layers=(0, 2))
    with serving(llama) as engine:
        calls = [
            call(prompt(1)), call(prompt(2), some), call(prompt(3), some), call(prompt(4), others),
            call(prompt(5), others), call(prompt(6), some),
        ]  # fmt: skip
        assert run(llama, engine, calls) == [0, 0, 64, 0, 64, 64]


def test_probes_score_a_found_prefix(llama: LoadedModel) -> None:
    probes = (scorer(llama, "layers.1.resid_post"), scorer(llama, "layers.2.ln_mlp", outputs=3, seed=1))
    asked = plan(llama, "resid_post", positions="last_prompt")
    with serving(llama) as engine:
        calls = [call(prompt(tail), asked, probes=probes) for tail in (1, 2)] + [call(prompt(3), probes=probes)]
        assert run(llama, engine, calls) == [0, 64, 64]


def test_later_turns_of_a_conversation_read_what_is_new(llama: LoadedModel) -> None:
    """The completion is part of the next prompt; nothing of the first turn is read again, and its rows are there."""
    everything = plan(llama, "resid_post")
    with serving(llama) as engine:
        first = call(prompt(1), everything, 30)
        (said,) = tiny.run(engine, [first])
        check(llama, first, said)
        conversation = prompt(1) + said.token_ids[:-1] + [9, 8, 7]
        turn = replace(everything, first=len(prompt(1)) + len(said.token_ids) - 1)
        assert run(llama, engine, [call(conversation, turn), call(conversation, everything)]) == [96, 96]


def test_several_choices_read_their_prompt_once(llama: LoadedModel) -> None:
    asked = plan(llama, "resid_post")
    with serving(llama) as engine:
        calls = [call(prompt(1), asked) for _ in range(4)]
        results = tiny.run(engine, calls)
        assert engine.load.cache_misses == 79 + 3 * 15
    for one, result in zip(calls, results, strict=True):
        check(llama, one, result)
    assert sorted(result.cached_tokens for result in results) == [0, 64, 64, 64]


def test_what_shares_little_does_not_wait(llama: LoadedModel) -> None:
    with serving(llama) as engine:
        results = tiny.run(engine, [call(prompt(tail, 60, shared=33)) for tail in (1, 2)])
        assert [result.cached_tokens for result in results] == [0, 0]


def test_scores_of_a_prompt_are_of_all_its_tokens(llama: LoadedModel) -> None:
    asked = plan(llama, "resid_post")
    with serving(llama) as engine:
        plain, scored = call(prompt(1), asked), call(prompt(1), asked, score_prompt=True)
        assert run(llama, engine, [plain, scored, call(prompt(1), asked)]) == [0, 0, 64]
        scores = scored.result().prompt_scores
        assert engine.load.cache_misses == 79 + 15
    root = llama.observed._module
    with torch.inference_mode():
        logprobs = root(input_ids=torch.tensor([prompt(1)])).logits[0].log_softmax(-1)
    assert scores is not None
    own = logprobs[:-1].gather(-1, torch.tensor(prompt(1)[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([score.logprob for score in scores]), own, rtol=1e-4, atol=1e-4)


STEERED = [
    ("all", [0, 64, 0]), ("prompt", [0, 64, 0]), ("stride:2", [0, 64, 0]), ("last_prompt", [0, 64, 64]),
    ("generated", [0, 64, 64]),
]  # fmt: skip


@pytest.mark.parametrize(("positions", "found"), STEERED)
def test_steering_of_a_prefix_is_part_of_its_name(llama: LoadedModel, positions: str, found: list[int]) -> None:
    """A steered request reuses only prefixes steered in the same way; an unsteered request reuses only unsteered ones."""
    steer = steered("layers.1.resid_post", positions)
    asked, steering_vector = plan(llama, "resid_post"), steer.of(llama)
    with serving(llama) as engine:
        calls = [
            call(prompt(1), asked, 6, steering=[steering_vector]),
            call(prompt(2), asked, 6, steering=[steering_vector]),
        ]
        calls.append(call(prompt(3), asked, 6))
        for one, cached in zip(calls, found, strict=True):
            (result,) = tiny.run(engine, [one])
            assert result.cached_tokens == cached
            check_steered(llama, one, result, [steer] if one.job.steering else [])
        other = replace(steering_vector, vector=steering_vector.vector + 1)
        (result,) = tiny.run(engine, [call(prompt(4), asked, steering=[other])])
        assert result.cached_tokens == (64 if positions in ("last_prompt", "generated") else 0)


def check_steered(model: LoadedModel, asked: Call, result: Finished, steers: list[Steer]) -> None:
    fed = asked.job.prompt_ids + result.token_ids[:-1]
    logprobs, expected = forward_by_hand(model, LLAMA, fed, len(asked.job.prompt_ids), steers)
    assert result.token_ids == logprobs[len(asked.job.prompt_ids) - 1 :].argmax(-1).tolist()
    assert result.captured is not None
    for key, rows in result.captured.tensors.items():
        error = (rows - expected[key]).norm(dim=1) / expected[key].norm(dim=1)
        assert error.max() <= 1e-4, f"{key}: {error.max()}"


def test_salts_keep_clients_apart(llama: LoadedModel) -> None:
    with serving(llama) as engine:
        calls = [call(prompt(i), salt=salt) for i, salt in enumerate((None, "a", "a", "b", "None", None))]
        assert run(llama, engine, calls) == [0, 0, 64, 0, 0, 64]


def test_a_name_says_all_that_a_block_depends_on(llama: LoadedModel) -> None:
    job = call(prompt(1)).job
    names = name_blocks(job, prompt(1), 16)
    assert names == name_blocks(job, prompt(1), 16, names[:2])
    assert len(names) == len(set(names)) == 4
    changed = [*prompt(1)[:20], 0, *prompt(1)[21:]]
    assert [a == b for a, b in zip(names, name_blocks(job, changed, 16), strict=True)] == [True, False, False, False]
    late = replace(steered("layers.1.resid_post", "last_prompt").of(llama), positions=Positions("last_prompt"))
    steered_names = name_blocks(replace(job, steering=(late,), prompt_ids=prompt(1)[:40]), prompt(1), 16)
    assert [a == b for a, b in zip(names, steered_names, strict=True)] == [True, True, False, False]


def test_the_cache_keeps_within_its_bounds(llama: LoadedModel) -> None:
    """Rows and keys are dropped independently, the least recently used first; dropped prefixes are read again."""
    asked = plan(llama, "resid_post")
    with serving(llama) as engine:
        cache = engine._prefixes.cache
        run(llama, engine, [call(prompt(1), asked)])
        one = (cache.value_bytes // 2, cache.row_bytes // 2)
        assert one == (32 * 3 * 2 * 2 * 8 * 4, 32 * 3 * 32 * 4)
        assert engine.load.cache_bytes == 2 * sum(one)
        cache.trim(room=CacheLimits(2 * one[0], one[1]))
        assert (cache.value_bytes, cache.row_bytes) == (2 * one[0], one[1])
        names = name_blocks(call(prompt(1)).job, prompt(1), 32)
        taps = list(asked.taps.values())
        assert (cache.count(names, lambda span: taps), cache.count(names, lambda span: [])) == (1, 2)
        cache.trim(room=CacheLimits(one[0], one[1]))
        assert cache.count(names, lambda span: []) == 1
    assert cache.value_bytes == cache.row_bytes == 0  # nothing outlives its model


CASES = st.lists(
    st.tuples(
        st.integers(0, 3),  # which tail
        st.sampled_from([0, 20, 33, 64, 70]),  # how much is shared
        st.sampled_from([None, "salt"]),
        st.sampled_from(["none", "all", "last_prompt", "stride:7", "mean_prompt", "last", "generated"]),
        st.sampled_from([(0,), (1, 2), (0, 1, 2)]),
        st.booleans(),  # with a probe
        st.booleans(),  # cancelled on the way
    ),
    min_size=2,
    max_size=9,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CASES, st.sampled_from([1, 3, 1000]), st.sampled_from([24, 512]))
def test_any_mix_gives_the_rows_of_a_teacher_forced_forward(
    llama: LoadedModel, cases: list[Any], blocks: int, prefill: int
) -> None:
    """Shared prefixes, salts, captures of different layers and positions, probes, evictions and cancellations, together."""
    calls = []
    for tail, shared, salt, positions, layers, probed, _ in cases:
        asked = None if positions == "none" else plan(llama, "resid_post", "ln_mlp", layers=layers, positions=positions)
        probes = (scorer(llama, "layers.1.resid_post"),) if probed else ()
        calls.append(call(prompt(tail, 12, shared), asked, 3 + tail, probes=probes, salt=salt))
    with serving(llama, max_batch=4, max_prefill_tokens=prefill) as engine:
        size = 32 * 3 * 2 * 2 * 8 * 4
        engine.budget = replace(
            engine.budget, cache_tokens=int(4 * 1.01 * blocks * size / engine.budget.bytes_per_token / 1.25) + 400,
            row_bytes=4 * blocks * 32 * 6 * 32 * 4 + (1 << 20),
        )  # fmt: skip
        for one, case in zip(calls, cases, strict=True):
            engine.submit(one.job)
            if case[-1]:
                one.job.cancelled.set()
        results = [one.result() if not case[-1] else None for one, case in zip(calls, cases, strict=True)]
    for one, result in zip(calls, results, strict=True):
        if result is not None:
            check(llama, one, result)


@pytest.mark.parametrize("broken", ["rows left out", "rows of a neighbour", "keys of a neighbour"])
def test_a_broken_cache_is_noticed(llama: LoadedModel, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails if a found block's rows are left out, or are another block's, or its keys and values are."""
    use = PrefixCache.use

    def swapped(cache: PrefixCache, names: Sequence[bytes]) -> Any:
        blocks = use(cache, names)
        if len(blocks) > 1 and broken == "keys of a neighbour":
            blocks[0].values = blocks[1].values
        elif len(blocks) > 1:
            blocks[0].rows = blocks[1].rows
        return blocks

    if broken == "rows left out":
        monkeypatch.setattr("serve_app.capture.rows.RequestRows.resume", lambda rows, known: None)
    else:
        monkeypatch.setattr(PrefixCache, "use", swapped)
    asked = plan(llama, "resid_post")
    with serving(llama) as engine, pytest.raises(AssertionError):
        run(llama, engine, [call(prompt(1), asked), call(prompt(2), asked)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_the_bits_are_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was found: prompts of whole pieces and parts of one, alone and among others."""
    monkeypatch.setattr(engines, "PIECE", 8)
    monkeypatch.setattr(prefix_reuse, "PIECE", 8)
    model = in_dtype("llama", dtype)
    asked = plan(model, "resid_post", "attn_out")
    prompts = [prompt(tail, length, 24) for tail in (1, 2) for length in (0, 5, 8, 13)] * 2

    def calls() -> list[Call]:
        return [Call(tokens, Sampling(5, temperature=1, seed=3), asked) for tokens in prompts]

    with serving(model, batch_invariant=True, prefix_cache=False) as engine:
        plain = [bits(result) for result in tiny.run(engine, calls())]
    with serving(model, batch_invariant=True) as engine:
        together = tiny.run(engine, calls())
        one_by_one = [tiny.run(engine, [one])[0] for one in calls()]
    assert [bits(result) for result in together] == plain
    assert [bits(result) for result in one_by_one] == plain
    assert {result.cached_tokens for result in one_by_one} == {16, 24, 32}


def test_a_model_whose_prefixes_cannot_be_kept_says_why() -> None:
    for architecture, reason in (("lfm2", "not keys and values"), ("phi3_longrope", "rotation")):
        engine = TransformersEngine(tiny.loaded(architecture))
        asked = [prompt(1)[:40]] * 2
        results = tiny.run(engine, [call(tokens) for tokens in asked])
        engine.close()
        assert not engine.prefix_cache.enabled
        assert reason in engine.prefix_cache.reason
        assert [result.cached_tokens for result in results] == [0, 0]
    engine = TransformersEngine(tiny.loaded("llama"), prefix_cache=False)
    engine.close()
    assert "switched off" in engine.prefix_cache.reason


def test_a_forward_that_fails_is_read_again_without_the_cache(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = plan(llama, "resid_post")
    with serving(llama) as engine:
        run(llama, engine, [call(prompt(1), asked)])
        run_forward = engine._forwards.run
        raised: list[BaseException] = []

        def fail_once(*arguments: Any) -> Any:
            if not raised:
                raised.append(True)
                raise RuntimeError("a broken forward")
            return run_forward(*arguments)

        monkeypatch.setattr(engine._forwards, "run", fail_once)
        calls = [call(prompt(tail), asked) for tail in (2, 3)]
        results = tiny.run(engine, calls)
    for one, result in zip(calls, results, strict=True):
        check(llama, one, result)
        assert result.cached_tokens == 0


def test_nothing_is_looked_up_that_is_not_kept(llama: LoadedModel) -> None:
    """A request that scores its prompt, or needs rows that were not captured, reads the whole prompt."""
    job = call(prompt(1), plan(llama, "resid_post", positions="last")).job
    assert prefix_reuse.most_known(job) == 78
    read = CapturePlan(plan(llama, "resid_post").taps, Positions.parse("last"), "model", n_prompt=40, stop=64)
    assert prefix_reuse.most_known(replace(job, capture=read)) == 63  # the last row that it keeps is 63's
    assert prefix_reuse.needed_taps(replace(job, capture=read), range(64)) == set()
