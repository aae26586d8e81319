"""Our `gsm8k`, `gsm8k_cot` and `gsm8k_cot_zeroshot` against lm-evaluation-harness's: the same messages, the same verdicts.

The harness's task files are taken as it installs them; only the data comes from a local folder.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import OpenAI

from eval_jobs.extractors import score
from eval_jobs.problems import GSM8K_FOLDER_VARIABLE, gold_answer
from eval_jobs.prompts import PROMPTS, choose_prompt
from eval_jobs.selection import Selection, load_problems
from roentgen.runs import Run
from tests.conftest import Server

pytestmark = pytest.mark.integration

ITEMS = 6
FILES = {"gsm8k": "gsm8k.yaml", "gsm8k_cot": "gsm8k-cot.yaml", "gsm8k_cot_zeroshot": "gsm8k-cot-zeroshot.yaml"}
STRICT = {"gsm8k": "gsm8k_strict", "gsm8k_cot": "cot_strict", "gsm8k_cot_zeroshot": "cot_strict"}
AWKWARD = [
    "#### 18", "#### $18", "so #### 1,800 and #### 3", "The answer is 18.", "The answer is 18", "It is $18.00",
    "18 (see step 3)", "no number", "", "-5.", "The answer is -1,234.50.", "#### -7.",
    "18\n#### 18.\n", "answer: .5", "$", "1,", "#### ,", "…18…",
]  # fmt: skip


def harness_task(name: str, folder: Path) -> Any:
    """The harness's own task, on local files."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask

    config = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / FILES[name]).read_text())
    config |= {"dataset_path": "json", "dataset_name": None}
    config["dataset_kwargs"] = {"data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}}
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(1234)
    return task


@pytest.fixture(params=list(FILES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_messages_are_the_harnesss(name: str, gsm8k_test: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GSM8K_FOLDER_VARIABLE, str(gsm8k_test.parent))
    task = harness_task(name, gsm8k_test.parent)
    prompt = PROMPTS[name]
    shots = task.config.num_fewshot
    assert prompt.shots + len(prompt.fixed_shots) == shots
    assert prompt.extractor == STRICT[name]
    assert list(prompt.stop) == task.config.generation_kwargs["until"]
    for doc, problem in zip(
        task.test_docs(),
        load_problems(Selection(source="gsm8k", samples=20, shots=prompt.shots)),
        strict=False,
    ):
        theirs = task.fewshot_context(
            doc, num_fewshot=shots, apply_chat_template=True, fewshot_as_multiturn=True,
            chat_template=lambda messages, **_: messages,
        )  # fmt: skip
        assert [(m["role"], m["content"]) for m in theirs] == [
            (m["role"], m["content"]) for m in prompt.messages(problem)
        ]


@pytest.mark.parametrize("name", ["gsm8k_cot"])
def test_fewer_shots_are_those_of_num_fewshot(name: str, gsm8k_test: Path) -> None:
    task = harness_task(name, gsm8k_test.parent)
    theirs = task.fewshot_context(
        next(iter(task.test_docs())), num_fewshot=3, apply_chat_template=True, fewshot_as_multiturn=True,
        chat_template=lambda messages, **_: messages,
    )  # fmt: skip
    (problem,) = load_problems(Selection(source=str(gsm8k_test), samples=1))
    ours = choose_prompt(name, fixed_shots=3).messages(problem)
    assert [(m["role"], m["content"]) for m in theirs] == [(m["role"], m["content"]) for m in ours]


def test_verdicts_are_the_harnesss_on_real_outputs(
    name: str, server: Server, gsm8k_test: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GSM8K_FOLDER_VARIABLE, str(gsm8k_test.parent))
    task = harness_task(name, gsm8k_test.parent)
    problems = load_problems(Selection(source="gsm8k", samples=ITEMS, shots=PROMPTS[name].shots))
    with OpenAI(base_url=server.base_url, api_key="none", timeout=300) as client:
        outputs = [
            client.chat.completions.create(
                model="smollm2-135m", messages=PROMPTS[name].messages(problem), max_tokens=64, temperature=0,
                stop=list(PROMPTS[name].stop),
            ).choices[0].message.content or ""
            for problem in problems
        ]  # fmt: skip
    docs = list(task.test_docs())
    cases = list(zip(docs, outputs, strict=False))
    cases += [(docs[0], text) for text in AWKWARD]
    cases += [(docs[0], text.replace("18", problems[0].gold)) for text in AWKWARD]
    right = 0
    for (doc, text), theirs in zip(cases, verdicts(task, cases), strict=True):
        ours = score(text, str(gold_answer(doc["answer"]))).correct_by
        assert theirs == {"strict-match": ours[STRICT[name]], "flexible-extract": ours["flexible"]}, text
        right += sum(theirs.values())
    assert right >= 3  # both verdicts occur


@pytest.mark.skipif("ROENTGEN_RUN" not in os.environ, reason="ROENTGEN_RUN names no run on GSM8K's test set")
def test_a_whole_run_has_the_harness_s_verdicts(gsm8k_test: Path) -> None:
    """Item by item, on a run of yours: `ROENTGEN_RUN=results/mine make test-clients`."""
    run = Run(os.environ["ROENTGEN_RUN"])
    name = run.config.prompt["name"]
    task = harness_task(name, gsm8k_test.parent)
    docs = {doc["question"]: doc for doc in task.test_docs()}
    samples = [sample for sample in run.read_samples() if sample.error is None]
    found = verdicts(task, [(docs[sample.question], sample.response) for sample in samples])
    for sample, theirs in zip(samples, found, strict=True):
        ours = sample.correct_by
        assert theirs == {"strict-match": ours[STRICT[name]], "flexible-extract": ours["flexible"]}, sample.sample_id
    right = {which: sum(verdict[which] for verdict in found) for which in found[0]}
    print(f"{len(samples)} samples, the same verdicts; right: {right}")


def verdicts(task: Any, cases: Sequence[tuple[Any, str]]) -> list[dict[str, bool]]:
    """Have the harness judge outputs, each beside the problem it answers: by its filters, whether its metric is 1."""
    from lm_eval.api.instance import Instance

    task._instances = [
        Instance("generate_until", doc, ("", {}), index, metadata=("gsm8k", index, 1), resps=[text])
        for index, (doc, text) in enumerate(cases)
    ]
    task.apply_filters()
    return [
        {which: bool(task.process_results(doc, [answer])["exact_match"]) for which, answer in i.filtered_resps.items()}
        for i, (doc, _) in zip(task._instances, cases, strict=True)
    ]
