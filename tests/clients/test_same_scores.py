"""Our `gsm8k` and `gsm8k_cot_zeroshot` against lm-evaluation-harness's: the same messages, the same verdicts on real outputs.

The harness's task files are taken as it installs them; only the data comes from a local folder.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import OpenAI

from eval_jobs.problems import GSM8K_FOLDER_VARIABLE
from eval_jobs.prompts import PROMPTS
from eval_jobs.scoring import score
from eval_jobs.selection import Selection, load_problems
from tests.conftest import Server

pytestmark = pytest.mark.integration

ITEMS = 6
FILES = {"gsm8k": "gsm8k.yaml", "gsm8k_cot_zeroshot": "gsm8k-cot-zeroshot.yaml"}
STRICT = {"gsm8k": "gsm8k_strict", "gsm8k_cot_zeroshot": "cot_strict"}
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
    assert prompt.shots == shots
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


def test_verdicts_are_the_harnesss_on_real_outputs(
    name: str, server: Server, gsm8k_test: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance

    monkeypatch.setenv(GSM8K_FOLDER_VARIABLE, str(gsm8k_test.parent))
    task = harness_task(name, gsm8k_test.parent)
    problems = load_problems(Selection(source="gsm8k", samples=ITEMS, shots=PROMPTS[name].shots))
    with OpenAI(base_url=server.base_url, api_key="none", timeout=300) as client:
        outputs = [
            client.chat.completions.create(
                model="smollm2-135m", messages=PROMPTS[name].messages(problem), max_tokens=64, temperature=0,  # type: ignore[arg-type]
                stop=list(PROMPTS[name].stop),
            ).choices[0].message.content or ""
            for problem in problems
        ]  # fmt: skip
    docs = list(task.test_docs())
    cases = list(zip(docs, problems, outputs, strict=False))
    cases += [(docs[0], problems[0], text) for text in AWKWARD]
    cases += [(docs[0], problems[0], text.replace("18", problems[0].gold)) for text in AWKWARD]
    task._instances = [
        Instance("generate_until", doc, ("", {}), index, metadata=(name, index, 1), resps=[text])
        for index, (doc, _, text) in enumerate(cases)
    ]
    task.apply_filters()
    right = 0
    for instance, (doc, problem, text) in zip(task._instances, cases, strict=True):
        ours = score(text, problem.gold).correct_by
        for theirs, extractor in (("strict-match", STRICT[name]), ("flexible-extract", "flexible")):
            verdict = task.process_results(doc, [instance.filtered_resps[theirs]])["exact_match"]
            assert ours[extractor] == bool(verdict), (extractor, text, instance.filtered_resps[theirs])
            right += bool(verdict)
    assert right >= 3  # both verdicts occur
