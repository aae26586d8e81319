"""Steers: adds a direction to the stream while the model writes, and shows what more of it does."""

import roentgen

PRAISE = ["What a lovely day!", "I am so happy for you.", "You did wonderfully well."]
BLAME = ["What a dreadful day.", "I am so angry with you.", "You did it all wrong."]
LAYER = 12


def mean_row(model: roentgen.Model, texts: list[str]):
    """Return the mean of the texts' last rows."""
    rows = [
        out[f"layers.{LAYER}.resid_post"][0].float() for out in model.capture(texts, layers=[LAYER], progress=False)
    ]
    return sum(rows) / len(rows)


with roentgen.load("smollm2-135m") as model:
    direction = mean_row(model, PRAISE) - mean_row(model, BLAME)
    for scale in (-2, 0, 2):
        (out,) = model.generate(
            "My neighbor called me this morning and said that",
            max_tokens=16,
            steering=[roentgen.Steer(direction, layer=LAYER, scale=scale)] if scale else [],
        )
        print(f"{scale:+d} {out.text!r}")
