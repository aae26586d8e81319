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
        """Hash of everything that the model is shown."""
        return canonical_hash(asdict(self))

    def messages(self, question: str) -> list[dict[str, str]]:
        """Return the messages that pose a question."""
        user = {"role": "user", "content": self.user.replace(QUESTION, question)}
        return [user] if self.system is None else [{"role": "system", "content": self.system}, user]


ANSWER_LINE = Prompt(
    name="answer-line",
    version=1,
    user="""Solve the problem step by step. End with a line that says only Answer: and the number.

Problem: Tom has 3 bags of 4 apples and eats 2. How many are left?
3 * 4 = 12 apples. 12 - 2 = 10 are left.
Answer: 10

Problem: {question}""",
)
"""The seed's contract: reason step by step, then a last line `Answer: [number]`. The example is for very small models, which
do not follow the instruction alone."""

PROMPTS: dict[str, Prompt] = {prompt.name: prompt for prompt in (ANSWER_LINE,)}
