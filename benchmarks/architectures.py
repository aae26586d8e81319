"""Tries every causal architecture of transformers: its hook points, whether it generates, and which requests share a
forward pass.

Each case (`architecture_cases`) runs in its own process. Its hook points are resolved from the configuration alone. Then a
narrow random model of it (`architecture_models`) is checked as on loading, and runs in the transformers engine with prompts
of different lengths together, which end at different times. Its tokens must equal those of transformers' `generate` with
each prompt alone, and its log-probabilities those of a forward pass over the whole sequence.

    python -m benchmarks.architectures ["MODEL_TYPE OPTION=VALUE ..." ...]
    python -m benchmarks.architectures --docs

The first command prints a line per case. The second tries all cases and writes the results into docs/architectures.md; with
`--findings FILE`, it stores results in that file as they arrive and skips cases that are already in it.
"""

import argparse
import dataclasses
import json
import logging
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers as tr
from transformers import PreTrainedModel

from benchmarks.architecture_cases import (
    COLUMNS,
    cases,
    cell,
    configuration,
    in_six_layers,
)
from benchmarks.architecture_models import CannotBeBuiltError, build
from benchmarks.architecture_page import PAGE, ArchitectureFinding, rewrite
from roentgen.atomic_files import write_text
from serve_app.capture.narrowing import resolve_config, rotation_limit
from serve_app.capture.observer import observe
from serve_app.capture.resolver import ResolutionError, resolve_structure
from serve_app.capture.structure import ModelStructure
from serve_app.engines.protocol import Sampling
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.load_checks import CheckedModel, check_loaded
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.models.architecture import UnsupportedModelError, check_config
from serve_app.models.model_source import ModelSource
from tests.serve_app import tiny

LENGTHS = ((5, 20), (40, 9), (17, 14))
"""Per prompt, its tokens and how many are generated."""

TOLERANCE = 1e-3
"""Of a log-probability, in float32."""

OURS = (CannotBeBuiltError, ResolutionError, UnsupportedModelError)
"""Errors whose message suffices without their type."""

LIMIT_S = 100
"""The seconds that a case may take."""


def alone(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy completion by transformers' own generate."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=None,
            pad_token_id=0,
            # Beyond the limit of such a rotation, generate forgets what its cache holds.
            use_cache=rotation_limit(model.config) is None,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def try_case(case: str) -> Iterator[ArchitectureFinding]:
    """Try a case; yield intermediate results, the complete one last."""
    finding = ArchitectureFinding(case)
    try:
        structure = resolve_config(in_six_layers(case), case)
        finding = dataclasses.replace(finding, cells=tuple(cell(structure, name) for name in COLUMNS))
    except Exception as error:  # noqa: BLE001 - it is what the page says
        finding = dataclasses.replace(finding, unresolved=_say(error))
    yield dataclasses.replace(finding, not_built=f"not tried: more than {LIMIT_S} s")
    try:
        check_config(configuration(case))
    except UnsupportedModelError as error:
        yield dataclasses.replace(finding, refused=_say(error))
        return
    except Exception as error:  # noqa: BLE001 - it is what the page says
        yield dataclasses.replace(finding, not_built=_say(error))
        return
    try:
        plain = build(case)
    except CannotBeBuiltError as error:
        yield dataclasses.replace(finding, not_built=_say(error))
        return
    yield dataclasses.replace(finding, **generate(plain, case))


def generate(plain: PreTrainedModel, case: str) -> dict[str, Any]:
    """Return the results of checking a model and generating with it."""
    vocab = plain.get_input_embeddings().weight.shape[0]
    prompts = [
        [3 + (7 * i + 5 * j * j + j) % (min(vocab, 500) - 4) for j in range(n)] for i, (n, _) in enumerate(LENGTHS)
    ]
    expected: list[list[int]] = []
    note = ""
    for name in ("forced_eos_token_id", "forced_bos_token_id"):
        setattr(plain.generation_config, name, None)
    try:
        expected = [alone(plain, prompt, m) for prompt, (_, m) in zip(prompts, LENGTHS, strict=True)]
    except Exception as error:  # noqa: BLE001 - it is what the page says
        note = f"transformers' own generate fails ({_say(error)})"
    try:
        structure = resolve_structure(plain, case)
        checks = check_loaded(plain, structure)
        engine = _engine(plain, structure, checks)
    except (ResolutionError, UnsupportedModelError) as error:
        return {"refused": _say(error)}
    except Exception as error:  # noqa: BLE001 - it is what the page says
        return {"wrong": f"it cannot be loaded ({_say(error)})"}
    found: dict[str, Any] = {
        "batches": checks.batching.kind,
        "reason": checks.batching.reason,
        "joins": engine._joins,
    }
    calls = [tiny.Call(p, Sampling(m, temperature=0)) for p, (_, m) in zip(prompts, LENGTHS, strict=True)]
    try:
        results = tiny.run(engine, calls)
    except Exception as error:  # noqa: BLE001 - it is what the page says
        return found | {"wrong": f"a request fails ({_say(error)})"}
    finally:
        engine.close()
    errors = []
    for prompt, result in zip(prompts, results, strict=True):
        given = torch.tensor([score.logprob for score in result.scores])
        errors.append(float((given - log_probabilities(plain, prompt, result.token_ids)).abs().max()))
    wrong = f"log-probabilities are off by {max(errors):.0e}" if max(errors) > TOLERANCE else ""
    if expected and [result.token_ids for result in results] != expected:
        note = "tokens differ from those of transformers' own generate"
    return found | {"error": max(errors), "wrong": wrong, "note": note}


def log_probabilities(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Return what a model gives each token of a completion, by one forward over the whole sequence.

    Where a rotation of positions depends on the sequence's length, each token has a forward over what precedes it.
    """
    tokens = torch.tensor([prompt + completion])
    with torch.inference_mode():
        if rotation_limit(model.config) is None:
            logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
        else:
            ends = range(len(prompt), tokens.shape[1])
            logits = torch.stack([model(input_ids=tokens[:, :n], use_cache=False).logits[0, -1] for n in ends])
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def _engine(plain: PreTrainedModel, structure: ModelStructure, checks: CheckedModel) -> TransformersEngine:
    """Start the engine that a server would have."""
    words = tiny.tokenizer()
    source = ModelSource(structure.model_name, "tiny", "0")
    cpu = torch.device("cpu")
    loaded = LoadedModel(source, words, structure, cpu, torch.float32, observe(plain, words), checks=checks)
    loaded.generation_config.eos_token_id = None
    loaded.tokenizer.eos_token = None
    return TransformersEngine(loaded, max_cache_tokens=10_000)


def _say(error: Exception) -> str:
    """Return an error in a line; the type, too, if it is not one of ours."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, OURS) else f"{type(error).__name__}: {text}"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _child(case: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    for finding in try_case(case):
        pipe.send(finding)
    pipe.close()


def find(case: str) -> ArchitectureFinding:
    """Try a case in a process of its own, as long as it may take."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=_child, args=(case, there))
    process.start()
    there.close()
    finding = ArchitectureFinding(
        case, unresolved=f"not tried: more than {LIMIT_S} s", not_built=f"not tried: more than {LIMIT_S} s"
    )
    ends = time.monotonic() + LIMIT_S
    try:
        while here.poll(max(0.0, ends - time.monotonic())):
            finding = here.recv()
    except EOFError:
        pass
    process.kill()
    process.join()
    return finding


def find_all(asked: Sequence[str], file: Path | None) -> list[ArchitectureFinding]:
    """Try cases, one after the other, but those that a file of findings has."""
    known: dict[str, ArchitectureFinding] = {}
    if file is not None and file.exists():
        for line in file.read_text().splitlines():
            read = json.loads(line)
            known[read["case"]] = ArchitectureFinding(**read | {"cells": tuple(read["cells"])})
    findings = []
    for case in asked:
        if case not in known:
            begun = time.monotonic()
            known[case] = find(case)
            print(f"{known[case].line()}\t({time.monotonic() - begun:.0f} s)", flush=True)
            if file is not None:
                with file.open("a") as lines:
                    lines.write(json.dumps(dataclasses.asdict(known[case])) + "\n")
        findings.append(known[case])
    return findings


def main() -> None:
    """Try cases and print the results, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="a model type and options, as in the first cell of a row; all if none")
    parser.add_argument("--docs", action="store_true", help="try all cases and write docs/architectures.md")
    parser.add_argument("--findings", type=Path, help="a file of findings; what it has is not tried again")
    arguments = parser.parse_args()
    if arguments.docs and arguments.cases:
        parser.error("--docs takes all cases")
    logging.disable(logging.CRITICAL)
    tr.logging.set_verbosity_error()
    findings = find_all(arguments.cases or cases(), arguments.findings)
    if arguments.docs:
        write_text(PAGE, rewrite(PAGE.read_text(), findings))


if __name__ == "__main__":
    main()
