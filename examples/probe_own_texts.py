"""Trains a probe on labelled texts of one's own, and reads it on every token of another text."""

import roentgen

POSITIVE = ["wonderful", "delightful", "excellent", "charming", "brilliant", "lovely", "perfect", "great"]
NEGATIVE = ["terrible", "awful", "dreadful", "boring", "horrible", "miserable", "ugly", "bad"]
THINGS = ["film", "dinner", "hotel", "concert"]

texts = [
    {"text": f"I found the {thing} {word}.", "labels": {"positive": word in POSITIVE}}
    for thing in THINGS
    for word in POSITIVE + NEGATIVE
]

with roentgen.load("smollm2-135m") as model:
    report = model.capture(texts, layers=[4, 12, 20], positions="last", store="results/examples/store", session="mood")
    trained = roentgen.probes.train(
        report.session, label="positive", positions="last", output="results/examples/probes-mood"
    )
    print(trained)
    (out,) = model.generate("The room was clean, but the food was awful.", max_tokens=0, probes={"mood": trained})

for token, score in zip(out.tokens, out.scores["mood"].tolist(), strict=True):
    print(f"{score:8.2f} {token!r}")
