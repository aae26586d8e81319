r"""A scorer that asks a model, through the OpenAI route: any compatible server, Roentgen's own too.

JUDGE_BASE_URL=http://127.0.0.1:8000/v1 JUDGE_MODEL=smollm2-135m \
    roentgen eval --problems examples/extensions/capitals.py:capitals --samples 12 \
    --extractor examples/extensions/judge.py:judge

It is a coroutine function, so other problems go on while it waits. Ray's tasks have the environment of the process that started
Ray; on a cluster that runs already, give the variables to the job (`ray job submit --runtime-env-json '{"env_vars": {…}}'`), or
write them into this file.
"""

import os
import re

from openai import AsyncOpenAI

from roentgen import Output, Problem, Verdict

QUESTION = """\
Question: {question}
Right answer: {gold}
Given answer: {output}

Is the given answer right? Rate it from 0 (wrong) to 10 (right). Reply with the number only."""


async def judge(output: Output, problem: Problem) -> Verdict:
    """Have a model rate an answer, with one right and one wrong example before it."""
    # A client a call: a task's event loop ends with the task, and a client must not outlive its loop.
    async with AsyncOpenAI(
        base_url=os.environ.get("JUDGE_BASE_URL"), api_key=os.environ.get("JUDGE_API_KEY", "none"), max_retries=5
    ) as client:
        reply = await client.chat.completions.create(
            model=os.environ["JUDGE_MODEL"],
            messages=[
                {"role": "user", "content": QUESTION.format(question="What is 2 + 2?", gold="4", output="It is four.")},
                {"role": "assistant", "content": "10"},
                {"role": "user", "content": QUESTION.format(question="What is 2 + 2?", gold="4", output="22")},
                {"role": "assistant", "content": "0"},
                {
                    "role": "user",
                    "content": QUESTION.format(question=problem.question, gold=problem.gold, output=output),
                },
            ],
            max_tokens=4,
            temperature=0,
        )
    said = reply.choices[0].message.content or ""
    found = re.search(r"\d+", said)
    if found is None:
        raise ValueError(f"the judge gave no rating: {said!r}")  # a failed sample, which is tried again
    rating = min(int(found[0]), 10)
    return Verdict(rating >= 6, str(output), values={"rating": rating})
