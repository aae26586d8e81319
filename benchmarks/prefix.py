"""The gain of the prefix cache, and its cost without shared prefixes: `python -m benchmarks.prefix`.

Two engines of a kind are loaded, one with its prefix cache and one without, and alternate on the same prompts: prompts with
the same shots before every problem (`gsm8k_cot`, and the first five problems of GSM8K's training set), and prompts that
share almost nothing (no shots, and shots drawn per problem). Each run starts with a cold cache, like an evaluation. Then
conversations continue: of a second turn, only the new tokens have to be computed.

Each round is appended to a file, and the section is generated from the file; with `--add` it includes earlier runs, so that
engines and prompts can be measured one at a time. The vLLM engine requires the environment of `make test-vllm`; plain vLLM
with its defaults is measured with it. Rows captured by the vLLM engine are on disk within the measured time. Fixed and
drawn shots require GSM8K's training set (`$ROENTGEN_GSM8K_DIR`, or the hub).
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Annotated, Any, Protocol
from uuid import uuid4

import typer
from transformers import PreTrainedTokenizerBase

from benchmarks.paired_statistics import ratios
from benchmarks.results_file import record, table
from benchmarks.stage_printer import stage_printer
from benchmarks.vllm_way import capturing_engine, keeper, plain_engine, plain_way, settings
from benchmarks.ways import Keep, MeasuredRun, UnavailableError, Way, engine_way, finish_all
from benchmarks.workload import CAPTURES, Workload, capture_plan, problem_source
from eval_jobs.prompts import choose_prompt
from eval_jobs.selection import Selection, load_problems
from roentgen.defaults import EMBEDDED_MODEL
from serve_app.engines.protocol import Engine, Finished, Sampling
from serve_app.engines.served_model import ServedModel
from serve_app.engines.transformers.engine import TransformersEngine

CACHE_TOKENS = 32_768
"""Of the KV cache of each vLLM."""

SHARED = {"gsm8k_cot": ("gsm8k_cot", None), "five fixed shots": ("gsm8k", 5)}
"""Prompts that begin alike: the evaluation's name, and how many fixed shots."""
APART: dict[str, tuple[str, int | None]] = {
    "no shots": ("gsm8k_cot_zeroshot", None),
    "shots drawn anew": ("gsm8k", None),
}
"""Prompts that do not."""
SECOND_TURN = "second turn"
"""Conversations that go on after an answer."""

ON, OFF, PLAIN = "on", "off", "vllm"
FASTER, READ, NO_SLOWER, BESIDE_PLAIN = 3.5, 1 / 8, 0.98, 0.9
"""The aims."""

TOOL_SAYS = "The calculator says 12. Now give the answer."
MARK = "The assistant's answer"


@dataclass(frozen=True)
class PrefixTimes:
    """One run of one engine."""

    samples_per_s: float
    """Requests finished per second, reading prompts included."""
    first_token_s: float
    """Median time until a request's first token."""
    prompt_tokens: int
    """Of all prompts."""
    read: int
    """Those of them that passed through the model."""
    held: int
    """Bytes that the prefix cache has gained, rows included."""


@dataclass(frozen=True)
class PrefixRound:
    """One run of every engine of a kind, in turn."""

    engine: str
    prompts: str
    """One of `SHARED`, `APART`, or `SECOND_TURN`."""
    capture: str
    in_flight: int
    problems: int
    runs: dict[str, PrefixTimes]
    """`ON`, `OFF`, `PLAIN`."""
    new: int = 0
    """Tokens of second turns that the first ones had not."""


def main(
    engine: Annotated[str, typer.Option(help="transformers, or vllm.")] = "transformers",
    prompts: Annotated[str, typer.Option(help="What is posed.")] = ",".join([*SHARED, *APART, SECOND_TURN]),
    captures: Annotated[str, typer.Option(help=f"Of {', '.join(CAPTURES)}.")] = "3x2,all",
    problems: Annotated[int, typer.Option(help="Per run.")] = 256,
    in_flight: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="The most to generate per prompt.")] = 32,
    rounds: Annotated[int, typer.Option(help="Of interleaved runs.")] = 3,
    model: Annotated[str, typer.Option(help=f"{EMBEDDED_MODEL}, a folder, or a hub id.")] = EMBEDDED_MODEL,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto",
    file: Annotated[Path, typer.Option(help="Every round is written here.")] = Path("results/prefix.jsonl"),
    add: Annotated[bool, typer.Option("--add", help="Keep the rounds that the file has.")] = False,
    write: Annotated[bool, typer.Option("--record/--no-record", help="Update RESULTS.md.")] = True,
) -> None:
    """Measure the prefix cache."""
    if engine not in ENGINES:
        raise typer.BadParameter(f"{engine!r} is unknown; there are {', '.join(ENGINES)}", param_hint="--engine")
    workload = Workload(model, max_tokens=max_tokens, dtype=dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not add:
        file.write_text("")
    stage = stage_printer()
    with TemporaryDirectory() as folder, ExitStack() as stack:
        arms = ENGINES[engine](workload, in_flight, Path(folder), stack)
        warm_up = pose("no shots", workload, workload.tokenizer(), in_flight)
        for arm in arms.values():
            for capture in captures.split(","):
                arm.pose(warm_up, capture, 2, in_flight)
        stage(f"{engine}: the engines are there")
        for kind in prompts.split(","):
            for capture in captures.split(","):
                for number in range(rounds):
                    order = dict(list(arms.items())[:: -1 if number % 2 else 1])
                    found = measure(engine, order, workload, kind, capture, problems, in_flight)
                    stage(f"{kind}, capture {capture}: {found.runs}")
                    with file.open("a") as out:
                        out.write(json.dumps(asdict(found)) + "\n")
    body = report(workload, read_rounds(file))
    print(body)
    if write:
        record("Shared prefixes", body)


class PrefixArm(Protocol):
    """What is measured."""

    def pose(self, prompts: list[list[int]], capture: str, max_tokens: int, in_flight: int) -> PrefixTimes:
        """Run prompts of which nothing has been read."""


@dataclass(frozen=True)
class PlainArm:
    """vLLM alone, which captures nothing."""

    way: Way

    def pose(self, prompts: list[list[int]], capture: str, max_tokens: int, in_flight: int) -> PrefixTimes:
        """Run prompts of which nothing has been read."""
        return measured(self.way(prompts, max_tokens, in_flight), len(prompts))


@dataclass(frozen=True)
class EngineArm:
    """One of this project's engines."""

    engine: Engine
    model: ServedModel
    keep: Keep | None = None
    """Stores what is captured; None leaves it in memory."""

    def pose(self, prompts: list[list[int]], capture: str, max_tokens: int, in_flight: int) -> PrefixTimes:
        """Run prompts of which nothing has been read."""
        held = self.engine.load.cache_bytes
        run = engine_way(self.engine, self.model, capture, self.keep)(prompts, max_tokens, in_flight)
        return measured(run, len(prompts), self.engine.load.cache_bytes - held)

    def go_on(
        self, prompts: list[list[int]], said: list[int], capture: str, max_tokens: int
    ) -> tuple[PrefixTimes, int]:
        """Have conversations answered, say something to the answers, and measure what comes of that.

        Args:
            prompts: the first turns.
            said: what follows an answer: its end, and the next message.
            capture: what both turns capture, from their first token on.
            max_tokens: per answer.

        Returns:
            What was measured, and how many tokens of the second turns the first ones have not read.
        """
        salt, held = uuid4().hex, self.engine.load.cache_bytes
        first = self._finish(prompts, capture, max_tokens, salt)
        ends = self.model.eos_token_ids
        answers = [one.token_ids[: -1 if one.token_ids[-1] in ends else None] for one in first]
        seconds = [[*prompt, *answer, *said] for prompt, answer in zip(prompts, answers, strict=True)]
        started = perf_counter()
        second = self._finish(seconds, capture, max_tokens, salt)
        took = perf_counter() - started
        length, cached = sum(map(len, seconds)), sum(one.cached_tokens for one in second)
        known = sum(len(prompt) + len(one.token_ids) - 1 for prompt, one in zip(prompts, first, strict=True))
        waited = median(one.timings.first_token for one in second)
        held = self.engine.load.cache_bytes - held
        return PrefixTimes(len(prompts) / took, waited, length, length - cached, held), length - known

    def _finish(self, prompts: list[list[int]], capture: str, max_tokens: int, salt: str) -> list[Finished]:
        requests = [(prompt, Sampling(max_tokens, temperature=0)) for prompt in prompts]
        plan = capture_plan(self.model, capture)
        found = finish_all(self.engine, requests, plan, salt)
        if self.keep is not None and plan is not None:
            for future in [self.keep(*one) for one in zip(prompts, found, strict=True)]:
                future.result()
        return found


def measured(run: MeasuredRun, prompts: int, held: int = 0) -> PrefixTimes:
    """Return the measurements of one run."""
    read = run.prompt_tokens - run.cached_tokens
    return PrefixTimes(prompts / run.seconds, median(run.first_token_s), run.prompt_tokens, read, held)


def measure(
    engine: str, arms: dict[str, PrefixArm], workload: Workload, kind: str, capture: str, problems: int, in_flight: int
) -> PrefixRound:
    """Run every arm once."""
    tokenizer = workload.tokenizer()
    if kind == SECOND_TURN:
        prompts, said = pose("shots drawn anew", workload, tokenizer, in_flight), tool_message(tokenizer)
        engines = {name: arm for name, arm in arms.items() if isinstance(arm, EngineArm)}
        found = {name: arm.go_on(prompts, said, capture, workload.max_tokens) for name, arm in engines.items()}
        runs, (new, *_) = {name: run for name, (run, _) in found.items()}, (new for _, new in found.values())
        return PrefixRound(engine, kind, capture, in_flight, in_flight, runs, new)
    prompts = pose(kind, workload, tokenizer, problems)
    runs = {name: arm.pose(prompts, capture, workload.max_tokens, in_flight) for name, arm in arms.items()}
    return PrefixRound(engine, kind, capture, in_flight, problems, runs)


def pose(kind: str, workload: Workload, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Return problems as the evaluation poses them, as tokens."""
    name, fixed_shots = {**SHARED, **APART}[kind]
    prompt = choose_prompt(name, fixed_shots=fixed_shots)
    posed = load_problems(Selection(source=problem_source(workload.problems), samples=count, shots=prompt.shots))
    return [workload.tokens(tokenizer, prompt.messages(problem)) for problem in posed]


def tool_message(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what follows an answer in the chat template when something is said to it, up to the next answer."""
    said = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": MARK},
        {"role": "user", "content": TOOL_SAYS},
    ]
    text: Any = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text.partition(MARK)[2], add_special_tokens=False)["input_ids"])


def transformers_arms(workload: Workload, in_flight: int, folder: Path, stack: ExitStack) -> dict[str, PrefixArm]:
    """Load the model twice, since two threads cannot trace one."""
    arms: dict[str, PrefixArm] = {}
    for name in (ON, OFF):
        model = workload.load()
        engine = TransformersEngine(model, max_batch=in_flight, max_queue=1024, prefix_cache=name == ON)
        stack.callback(engine.close)
        arms[name] = _checked(EngineArm(engine, model)) if name == ON else EngineArm(engine, model)
    return arms


def vllm_arms(workload: Workload, in_flight: int, folder: Path, stack: ExitStack) -> dict[str, PrefixArm]:
    """Start this project's vLLM engine with its prefix cache and without, and vLLM alone."""
    arms: dict[str, PrefixArm] = {}
    usual = settings(workload, in_flight, folder, CACHE_TOKENS)
    for name in (ON, OFF):
        given = replace(usual, store=str(folder / name), prefix_cache=name == ON)
        model, engine = stack.enter_context(capturing_engine(workload.model, given))
        arm = EngineArm(engine, model, keeper(model, engine))
        arms[name] = _checked(arm) if name == ON else arm
    arms[PLAIN] = PlainArm(plain_way(stack.enter_context(plain_engine(workload.model, usual))))
    return arms


ENGINES: dict[str, Callable[[Workload, int, Path, ExitStack], dict[str, PrefixArm]]] = {
    "transformers": transformers_arms,
    "vllm": vllm_arms,
}


def _checked(arm: EngineArm) -> EngineArm:
    """Refuse to measure a cache that is not there.

    Raises:
        UnavailableError: saying why it is not.
    """
    cache = arm.engine.prefix_cache
    if not cache.enabled:
        raise UnavailableError(f"the {arm.engine.name} engine has no prefix cache: {cache.reason}")
    return arm


def read_rounds(file: Path) -> list[PrefixRound]:
    """Read what has been measured."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        PrefixRound(**{**said, "runs": {name: PrefixTimes(**run) for name, run in said["runs"].items()}})
        for said in lines
    ]


def report(workload: Workload, rounds: Sequence[PrefixRound]) -> str:
    """Lay out what has been measured in Markdown."""
    dtype = str(workload.place()[1]).removeprefix("torch.")
    groups: dict[tuple[str, str, str], list[PrefixRound]] = {}
    for one in rounds:
        groups.setdefault((one.engine, one.prompts, one.capture), []).append(one)
    sizes = sorted({one.problems for one in rounds if one.prompts != SECOND_TURN})
    in_flight = sorted({one.in_flight for one in rounds})
    parts = [
        f"{workload.name}, {dtype}, {_listed(sizes)} problems, {_listed(in_flight)} in flight, at most "
        f"{workload.max_tokens} tokens, greedy. Interleaved runs with the prefix cache on and off, each of which finds nothing "
        "of another's; medians, and ratios of runs of one round with their intervals. Samples per second are of whole "
        "requests. *Read* are prompt tokens that passed through the model; *held* is what the cache has gained by a run, "
        "rows included.",
    ]
    shared = [_shared_row(key, group) for key, group in groups.items() if key[1] in SHARED]
    if shared:
        aims = (
            f"Aims: read ≤ {READ:.3g} of the prompt tokens; on against off ≥ {FASTER}; against vLLM alone, its prefix "
            f"cache on, ≥ {BESIDE_PLAIN} with 3x2."
        )
        header = [
            "prompts that begin alike",
            "capture",
            "read",
            "of all",
            "first token, on",
            "off",
            "samples/s, on",
            "off",
        ]
        parts += [table([*header, "on against off", "against vLLM", "rounds", "held"], shared), aims]
    apart = [_apart_row(key, group) for key, group in groups.items() if key[1] in APART]
    if apart:
        header = ["prompts that do not", "capture", "read, of all", "on against off", "rounds"]
        parts += [table(header, apart), f"Aim: on against off ≥ {NO_SLOWER}."]
    turns = [_turn_row(key, group) for key, group in groups.items() if key[1] == SECOND_TURN]
    if turns:
        header = ["second turns", "capture", "tokens", "new", "read", "first token, on", "off", "rounds"]
        parts.append(table(header, turns))
    return "\n\n".join(parts)


def _shared_row(key: tuple[str, str, str], group: Sequence[PrefixRound]) -> list[str]:
    engine, kind, capture = key
    on, off = ([one.runs[name] for one in group] for name in (ON, OFF))
    return [
        f"{engine}, {kind}",
        capture,
        f"{median(run.read for run in on):,.0f}",
        f"{median(run.read / run.prompt_tokens for run in on):.3f}",
        *(f"{median(run.first_token_s for run in runs):.2f} s" for runs in (on, off)),
        *(f"{median(run.samples_per_s for run in runs):.2f}" for runs in (on, off)),
        _against(group),
        _against(group, PLAIN) if PLAIN in group[0].runs else "",
        str(len(group)),
        f"{max(run.held for run in on) / 1e6:,.0f} MB",
    ]


def _apart_row(key: tuple[str, str, str], group: Sequence[PrefixRound]) -> list[str]:
    engine, kind, capture = key
    read = median(one.runs[ON].read / one.runs[ON].prompt_tokens for one in group)
    return [f"{engine}, {kind}", capture, f"{read:.3f}", _against(group), str(len(group))]


def _turn_row(key: tuple[str, str, str], group: Sequence[PrefixRound]) -> list[str]:
    engine, _, capture = key
    on, off = ([one.runs[name] for one in group] for name in (ON, OFF))
    return [
        engine,
        capture,
        f"{median(run.prompt_tokens for run in on):,.0f}",
        f"{median(one.new for one in group):,.0f}",
        f"{median(run.read for run in on):,.0f}",
        *(f"{median(run.first_token_s for run in runs):.2f} s" for runs in (on, off)),
        str(len(group)),
    ]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _against(group: Sequence[PrefixRound], other: str = OFF) -> str:
    return str(ratios(*([one.runs[name].samples_per_s for one in group] for name in (ON, other))))


if __name__ == "__main__":
    typer.run(main)
