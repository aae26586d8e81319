"""Evaluates twice, on problems of one's own, and compares the runs problem by problem."""

import roentgen

problems = [{"question": f"What is {a} + {b}?", "answer": a + b} for a in (2, 5, 7) for b in (1, 8)]

with roentgen.load("smollm2-135m") as model:
    runs = [
        roentgen.evaluate(
            problems,
            model=model,
            parallel=6,
            max_tokens=32,
            temperature=temperature,
            output=f"results/examples/own-{temperature}",
        )
        for temperature in (0.0, 1.0)
    ]

for run in runs:
    print(run)
found = roentgen.compare(*runs)
print("the second minus the first:", found.difference.value, "from", found.difference.low, "to", found.difference.high)
print("what differs:", found.configuration, "better:", found.gained, "worse:", found.lost)
