"""Stops the model once it has written the answer: a probe that reads so, tried on stored rows, then live.

A model often continues after its answer: it repeats the answer, or checks it. A probe for "the answer has been written" can end
it there. Random directions that stop as readily lose the answers.
"""

import random

import roentgen
from eval_jobs.extractors import read_flexible

KEY = "layers.20.resid_post"
KEPT = {"layers": [20], "hook_points": ["resid_post"], "positions": "all"}
HERE = "results/examples"
STORE = f"{HERE}/store"


def last_number(text: str) -> str:
    """Read what the scorer `flexible` reads. The default one would read `2 + 9` as 11, before 11 is written."""
    return (read_flexible(text) or "").rstrip(".")


def prefixes(run: roentgen.Run) -> list[dict[str, object]]:
    """Cut each answer before and after it was written, at random; the reading of the text so far says which is which."""
    chosen, texts = random.Random(0), []
    for part in run.stored():
        for sample, (_, row) in zip(part.samples, part.rollouts.iterrows(), strict=True):
            text, offsets = row["text"], row["token_offsets"]
            start = offsets[row["n_prompt"]]
            written: dict[bool, list[str]] = {False: [], True: []}
            for end in offsets[row["n_prompt"] + 1 :]:
                written[last_number(text[start:end]) == last_number(sample.response)].append(text[:end])
            for label, cut in written.items():
                texts += [{"text": one, "labels": {"written": label}} for one in chosen.sample(cut, min(2, len(cut)))]
    return texts


with roentgen.load("smollm2-135m") as model:
    # Sums that the model can do: where it is wrong anyway, stopping costs nothing.
    prompt_messages = [
        {"question": f"What is {a} {sign} {b}?", "answer": a + b}
        for a in range(1, 10)
        for b in range(1, 10)
        for sign in ("+", "plus")
    ]
    tried = roentgen.evaluate(prompt_messages, model=model, max_tokens=48, scorer="flexible", output=f"{HERE}/sums")
    right = [
        {"question": sample.question, "answer": sample.gold}
        for sample in tried.read_samples().by_name()
        if sample.correct
    ]
    third = len(right) // 3
    runs = [
        roentgen.evaluate(
            some, model=model, max_tokens=48, scorer="flexible", capture=KEPT, output=f"{HERE}/{name}", store=STORE
        )
        for name, some in (("sums-to-train", right[:third]), ("sums-to-stop", right[third:]))
    ]
    session = model.capture(prefixes(runs[0]), layers=[20], positions="last", store=STORE, session="written").session
    trained = roentgen.probes.train(session, "written", "last", output=f"{HERE}/probes-written")
    print(trained)

    report = roentgen.probes.stop(runs[1], trained, controls=4, output=f"{HERE}/stopping")
    for one in report.chosen:
        found = one.finding
        print(
            f"{one.kind:>12} {one.number}:",
            found and f"{found.setting}: accuracy {found.accuracy}, saved {found.saved}",
        )
    print("page:", f"{report.folder}/stopping.html")

    question = next(iter(runs[1].read_samples())).prompt_messages
    for stop_when in ({}, {"written": report.stop_when}):
        (out,) = model.generate(question, max_tokens=48, probes={"written": trained}, stop_when=stop_when)
        print(repr(out.text), len(out.token_ids), out.stop_reason, list(out.acted))
