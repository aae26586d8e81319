"""Prompts: named, versioned, hashed.

A prompt turns a question into messages. Its hash goes into every sample's configuration, so an edited prompt can never pass
for the old one; raise `version` when you edit the text, for the people who read names. A new prompt is one line in
`PROMPTS`.
"""

from dataclasses import asdict, dataclass

from roentgen.contract import canonical_hash

QUESTION = "{question}"


@dataclass(frozen=True)
class Prompt:
    """How a question is posed.

    Attributes:
        name: what `--prompt` calls it.
        version: raised with every edit.
        user: the user's message, with `{question}` where the question goes.
        system: the system's message; None sends none.
    """

    name: str
    version: int
    user: str
    system: str | None = None

    @property
    def hash(self) -> str:
        """Hash of the texts, the name and the version."""
        return canonical_hash(asdict(self))

    def messages(self, question: str) -> list[dict[str, str]]:
        """Return the messages that pose a question."""
        user = {"role": "user", "content": self.user.replace(QUESTION, question)}
        return [user] if self.system is None else [{"role": "system", "content": self.system}, user]


ANSWER_LINE = Prompt(
    name="answer-line",
    version=1,
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
)
"""Reason step by step, then a last line `Answer: [number]`. The examples are for very small models: SmolLM2-135M, told in
words alone, wrote no such line in 48 replies to `arithmetic`; shown it, it wrote one in 15 of 24."""

PROMPTS: dict[str, Prompt] = {prompt.name: prompt for prompt in (ANSWER_LINE,)}
