r"""Prompts of one's own: a text, a Jinja template, a `Prompt`, or a function.

roentgen eval --problems examples/extensions/capitals.py:capitals --samples 12 --prompt examples/extensions/prompts.py:hinted
roentgen eval --problems examples/extensions/capitals.py:capitals --samples 12 --prompt examples/extensions/prompts.py:dialog \
    --shots-source examples/extensions/capitals.py:capitals --fixed-shots 2
"""

from roentgen import Problem, Prompt

SHORT = "{question} Answer with one word."
"""A text: `{question}` and any other field of a record."""

HINTED = """\
{{ question }}
{% if continent %}
(Hint: it is in {{ continent }}.)
{% endif %}
Answer with one word."""
"""A Jinja template, which has the same names."""

hinted = Prompt(
    name="hinted",
    version=1,  # raise it with every edit, for those who read names; the text is hashed anyway
    user=HINTED,
    system="You know geography.",
    stop=("\n\n",),
)


def dialog(problem: Problem) -> list[dict[str, str]]:
    """Return the messages that pose a problem; a text would be the user's message."""
    return [
        {"role": "user", "content": "I will ask for a capital. Reply with its name only."},
        {"role": "assistant", "content": "All right."},
        {"role": "user", "content": problem.question},
    ]
