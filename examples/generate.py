"""Generates, and looks at what the model held inside: a row for every token that was fed, at every layer."""

import roentgen

with roentgen.load("smollm2-135m") as model:
    outs = model.generate(
        ["The capital of France is", [{"role": "user", "content": "What is 12 * 7?"}]],  # a text, and a conversation
        max_tokens=16,
        capture={"layers": "all", "hook_points": ["resid_post"]},
    )

for out in outs:
    rows = out["layers.12.resid_post"]  # [tokens, d_model]
    print(repr(out.text), out.finish_reason, tuple(rows.shape), f"tokens: {len(out.tokens)}")
    last = {key: out[key][-1].float().norm().item() for key in out.keys()[::6]}
    print("  norm of the last row:", ", ".join(f"{key} {norm:.0f}" for key, norm in last.items()))
