"""Reads texts that exist already: nothing is generated. Into memory, one by one; and into a store, with labels."""

import roentgen

TEXTS = ["The sun rises in the east.", "The sun rises in the north."]
KEPT = {"layers": [8, 12, 16], "positions": "last"}

with roentgen.load("smollm2-135m") as model:
    for out in model.capture(TEXTS, **KEPT):  # an iterator: a list of any length takes the memory of a few dozen
        print(out.prompt, tuple(out["layers.12.resid_post"].shape), f"{len(out.tokens)} tokens")
    report = model.capture(
        [{"text": text, "labels": {"true": true}} for text, true in zip(TEXTS, (True, False), strict=True)],
        **KEPT,
        store="results/examples/store",
        session="sun",
    )

print(report.session, "now has", report.stored, "texts more, and had", report.held)
session = roentgen.Session.open(report.session)
print(session.rollouts()[["text", "labels"]])
print(session.activations("layers.12.resid_post", positions="last").stack().shape)
