"""What the benchmark of the prefix cache poses and counts, on a tiny model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.prefix import (
    APART,
    OFF,
    ON,
    SECOND_TURN,
    SHARED,
    EngineArm,
    PrefixRound,
    PrefixTimes,
    pose,
    report,
    tool_message,
)
from benchmarks.workload import Workload
from eval_jobs.problems import GSM8K_FOLDER_VARIABLE
from serve_app.engines.transformers.engine import TransformersEngine
from tests.serve_app import tiny

PROMPTS = [[(7 * number + 3 * i) % 250 for i in range(20 + number)] for number in range(3)]


@pytest.fixture
def arm() -> Iterator[EngineArm]:
    model = tiny.loaded("llama")
    engine = TransformersEngine(model, prefix_cache=False)
    yield EngineArm(engine, model)
    engine.close()


def test_without_a_cache_every_token_is_read(arm: EngineArm) -> None:
    run = arm.pose(PROMPTS, "3x2", 4, 2)
    assert (run.prompt_tokens, run.read, run.held) == (63, 63, 0)
    assert 0 < run.first_token_s < 3 / run.samples_per_s


def test_what_is_new_in_a_second_turn(arm: EngineArm) -> None:
    """The first turn reads all of its tokens but the last, which is new with what is said to the answer."""
    run, new = arm.go_on(PROMPTS, [5, 6, 7], "all", 4)
    assert run.prompt_tokens == run.read == 63 + 3 * (4 + 3)
    assert new == 3 * (1 + 3)


def test_fixed_shots_are_shared_and_drawn_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f'{{"question": "{n} + {n}?", "answer": "Easy.\\n#### {2 * n}"}}\n' for n in range(1, 40)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(
            "".join(lines[20:] if split == "test" else lines[:20]).replace("\n#", "\\n#")
        )
    monkeypatch.setenv(GSM8K_FOLDER_VARIABLE, str(tmp_path))
    workload = Workload(random_weights="llama-tiny", problems="gsm8k")
    tokenizer = workload.tokenizer()

    def alike(kind: str) -> int:
        one, other = pose(kind, workload, tokenizer, 2)
        return next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)

    assert min(alike(kind) for kind in SHARED) > 100 > 20 > max(alike(kind) for kind in APART)


def test_what_follows_an_answer_is_in_the_template() -> None:
    tokenizer = Workload(random_weights="llama-tiny").tokenizer()
    assert tokenizer.decode(tool_message(tokenizer)).startswith("\nThe calculator says")


def test_the_report_has_ratios_of_the_same_round() -> None:
    def run(rate: float, read: int) -> PrefixTimes:
        return PrefixTimes(rate, 1 / rate, 800, read, 2_000_000)

    rounds = [
        PrefixRound("transformers", kind, "3x2", 16, 256, {ON: run(4.0 * n, 100), OFF: run(1.0 * n, 800)}, new=50)
        for kind in ("gsm8k_cot", "no shots", SECOND_TURN)
        for n in (1, 2, 3)
    ]
    text = report(Workload(random_weights="llama-tiny"), rounds)
    assert (
        "| transformers, gsm8k_cot | 3x2 | 100 | 0.125 | 0.12 s | 0.50 s | 8.00 | 2.00 | 4.000 (4.000 to 4.000) |  | 3 | 2 MB |"
        in text
    )
    assert "| transformers, no shots | 3x2 | 0.125 | 4.000 (4.000 to 4.000) | 3 |" in text
    assert "| transformers | 3x2 | 800 | 50 | 100 | 0.12 s | 0.50 s | 3 |" in text
