"""Evaluates a model with its activations kept, and trains a probe: does the prompt tell whether the answer will be right?

Run it again: what is finished is not asked again.
"""

import roentgen

with roentgen.load("smollm2-135m") as model:  # served from this process while it is evaluated
    run = roentgen.evaluate(
        "arithmetic",
        samples=32,
        parallel=16,
        model=model,
        max_tokens=48,
        capture={"layers": [8, 20], "hook_points": ["resid_post"], "positions": "last_prompt"},
        output="results/examples/arithmetic",
        store="results/examples/store",
    )

print(run)
print(run.samples[["question", "response", "gold", "verdict"]].head())
print(run.activations("layers.20.resid_post", positions="last_prompt").stack().shape)
print(roentgen.probes.train(run, label="correct"))
print("page:", roentgen.report(run))
