"""Prompts: named, versioned, hashed.

A prompt turns a problem into messages. Its hash goes into every sample's configuration, so an edited prompt can never pass
for the old one; raise `version` when you edit the text, for the people who read names. A new prompt is one line in
`PROMPTS`; one of your own is a text file with `{question}` in it (`--prompt-file`).

`gsm8k`, `gsm8k_cot` and `gsm8k_cot_zeroshot` are lm-evaluation-harness's tasks of these names (versions 3.0) as it poses them
to a chat model (`--apply_chat_template`): the same messages, stop sequences, shots and way of reading, so that numbers can be
compared. Shots that are the same before every problem belong to the prompt; those that are drawn for each come with it.
"""

from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from eval_jobs import EvalError
from eval_jobs.chain_of_thought import CHAIN_OF_THOUGHT
from eval_jobs.problems import Problem, gsm8k_train
from eval_jobs.scoring import DEFAULT_EXTRACTOR
from roentgen.contract import canonical_hash

QUESTION = "{question}"


class PromptError(EvalError):
    """A prompt cannot be used; the message names the option."""


@dataclass(frozen=True)
class Shot:
    """A solved problem that is shown before every problem."""

    question: str
    """As posed."""
    solution: str
    """What the assistant says to it."""


@dataclass(frozen=True)
class Prompt:
    """How a problem is posed."""

    name: str
    """What `--prompt` calls it."""
    version: int
    """Raised with every edit."""
    user: str
    """The user's message, with `{question}` where the question goes."""
    system: str | None = None
    """The system's message; None sends none."""
    shots: int = 0
    """Solved problems that are drawn for each problem and shown before it, each as a message of the user and one of the
    assistant."""
    fixed_shots: tuple[Shot, ...] = ()
    """Solved problems that are shown before every problem, in the same way."""
    stop: tuple[str, ...] = ()
    """Sequences at which the model is stopped."""
    extractor: str = DEFAULT_EXTRACTOR
    """The way of reading an answer that belongs to it."""

    @property
    def hash(self) -> str:
        """Hash of what the model is shown, the name and the version; how answers are read is no part of it."""
        shown = {name: value for name, value in asdict(self).items() if name != "extractor"}
        if not self.fixed_shots:
            del shown["fixed_shots"]  # prompts without them are older than the field
        return canonical_hash(shown)

    def messages(self, problem: Problem, prefix: str = "") -> list[dict[str, str]]:
        """Return the messages that pose a problem. A shot that asks the same question is left out: it has the answer.

        Args:
            problem: with its shots, if the prompt shows any.
            prefix: what a variant puts before the user's last message.
        """
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        drawn = (Shot(shot.question, shot.solution) for shot in problem.shots)
        for shot in (*self.fixed_shots, *drawn):
            if shot.question == problem.question:
                continue
            messages.append({"role": "user", "content": self._ask(shot.question)})
            messages.append({"role": "assistant", "content": shot.solution})
        asked = self._ask(problem.question)
        messages.append({"role": "user", "content": f"{prefix}\n\n{asked}" if prefix else asked})
        return messages

    def _ask(self, question: str) -> str:
        return self.user.replace(QUESTION, question)


ANSWER_LINE = Prompt(
    name="answer-line",
    version=2,
    user="""Solve the last problem step by step, as in the examples. End with a line Answer: [number].

Problem: What is 7 + 2 - 4?
7 + 2 = 9. 9 - 4 = 5.
Answer: 5

Problem: Tom has 3 bags of 4 apples. How many apples does he have?
3 * 4 = 12.
Answer: 12

Problem: What is 2 - 8?
2 - 8 = -6.
Answer: -6

Problem: {question}""",
    stop=("\nProblem:",),
)
"""Reason step by step, then a last line `Answer: [number]`. The examples are for very small models: SmolLM2-135M, told in
words alone, wrote no such line in 48 replies to `arithmetic`; shown it, it wrote one in 15 of 24. A model that goes on with a
problem of its own is stopped there."""

ANSWER_LINE_1 = replace(ANSWER_LINE, version=1, stop=(), extractor="answer_line")
"""The first version, without a stop, so that runs that began with it can be continued."""

GSM8K = Prompt(
    name="gsm8k",
    version=3,
    user="Question: {question}\nAnswer:",
    shots=5,
    stop=("Question:", "</s>", "<|im_end|>"),
    extractor="gsm8k_strict",
)

GSM8K_COT = Prompt(
    name="gsm8k_cot",
    version=3,
    user="Q: {question}\nA:",
    fixed_shots=tuple(Shot(*shot) for shot in CHAIN_OF_THOUGHT),
    stop=("Q:", "</s>", "<|im_end|>"),
    extractor="cot_strict",
)

GSM8K_COT_ZEROSHOT = Prompt(
    name="gsm8k_cot_zeroshot",
    version=3,
    user="Q: {question}\nA: Let's think step by step.",
    stop=("Q:", "</s>", "<|im_end|>"),
    extractor="cot_strict",
)

PROMPTS: dict[str, Prompt] = {
    **{prompt.name: prompt for prompt in (ANSWER_LINE, GSM8K, GSM8K_COT, GSM8K_COT_ZEROSHOT)},
    "answer-line-1": ANSWER_LINE_1,
}


def choose_prompt(
    name: str, file: Path | None = None, system: str | None = None, fixed_shots: int | None = None
) -> Prompt:
    """Return a prompt.

    Args:
        name: in `PROMPTS`; not looked at if there is a file.
        file: a text with `{question}` in it, the user's message.
        system: replaces the system's message.
        fixed_shots: how many solved problems to show before every problem, in place of the shots that the prompt has: the first
            of its own fixed ones, or of GSM8K's training set if it has none.

    Raises:
        PromptError: if the file cannot be read or does not say where the question goes, or there are fewer shots.
        ProblemError: if GSM8K's training set cannot be had.
    """
    prompt = PROMPTS[name] if file is None else _read(file)
    if system is not None:
        prompt = replace(prompt, system=system)
    return prompt if fixed_shots is None else replace(prompt, shots=0, fixed_shots=_first_shots(prompt, fixed_shots))


def _first_shots(prompt: Prompt, count: int) -> tuple[Shot, ...]:
    trained = (Shot(problem.question, problem.solution) for problem in gsm8k_train())
    found = tuple(islice(prompt.fixed_shots or trained, count))
    if len(found) < count:
        whose = f"the prompt {prompt.name}" if prompt.fixed_shots else "GSM8K's training set"
        raise PromptError(f"--fixed-shots: {count} is more than the {len(found)} of {whose}")
    return found


def _read(file: Path) -> Prompt:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"--prompt-file: {file} cannot be read: {error}") from error
    if QUESTION not in text:
        raise PromptError(f"--prompt-file: {file} has no {QUESTION} to say where the question goes")
    return Prompt(name=file.stem, version=1, user=text)
