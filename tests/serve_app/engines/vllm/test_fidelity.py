"""SmolLM2-135M's rows, captured in vLLM in the model's own bfloat16, against transformers reading the same tokens."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from roentgen.contract import ActivationRequest, Positions
from serve_app.capture.rows import CapturePlan
from serve_app.engines.protocol import Sampling
from serve_app.engines.vllm import loading as vllm
from serve_app.models import load
from serve_app.sources import locate
from tests.serve_app.engines.subjects import Subject, vllm_settings
from tests.serve_app.tiny import Call, run

QUESTIONS = [
    "What is 17 + 25?",
    "Ann has 3 boxes with 12 pencils each. She gives 7 pencils to Ben and buys 2 more boxes. How many has she?",
    "A train leaves at 9:40 and takes 2 hours and 35 minutes. When does it arrive? Explain every step of your answer.",
    "Tell me about the residual stream of a transformer, " * 12 + "in one sentence.",
    "Hi",
    "A farmer sells eggs at $2 a dozen. His 40 hens lay an egg a day. What does he earn in a week of seven days?",
]
STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "ln_attn", "ln_mlp")


@pytest.mark.timeout(1200)
def test_rows_are_those_of_transformers(tmp_path: Path) -> None:
    source = locate("smollm2-135m")
    settings = vllm_settings(tmp_path, dtype="bfloat16", max_cache_tokens=4096)
    model, engine = vllm.start(source, settings)
    try:
        assert model.structure.missing == {"router": "not a mixture of experts"}
        taps = model.structure.resolve(
            ActivationRequest(layers="all", hook_points=("resid_post", "embed", "final_norm"))
        )
        taps |= model.structure.resolve(ActivationRequest(layers=(0, 14, 29), hook_points=STREAM))
        prompts = [
            model.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
            for question in QUESTIONS
        ]
        plan = CapturePlan(taps, Positions("all"), "model")
        calls = [Call(p, Sampling(8 + 4 * i, temperature=0), plan) for i, p in enumerate(prompts)]
        subject = Subject(model, engine, engine.storage, None)  # type: ignore[arg-type]
        run(engine, calls)
        captured = [subject.rows(call) for call in calls]
    finally:
        engine.close()
    reference = load(source, "bfloat16", "cpu")
    places = reference.structure.resolve(ActivationRequest(layers="all", hook_points=STREAM))
    places |= reference.structure.resolve(ActivationRequest(hook_points=("embed", "final_norm")))
    worst = 1.0
    for call, (positions, rows) in zip(calls, captured, strict=True):
        fed = call.job.prompt_ids + call.result().token_ids[:-1]
        assert positions == list(range(len(fed)))
        seen: dict[str, torch.Tensor] = {}

        class Keeper:
            taps = {key: places[key] for key in rows}  # noqa: RUF012

            def __call__(self, key: str, value: torch.Tensor, seen: dict[str, torch.Tensor] = seen) -> None:
                seen[key] = value[0].clone()

        with torch.inference_mode():
            ids = torch.tensor([fed])
            reference.observed.run(
                [Keeper()], lambda ids=ids: reference.observed._module(input_ids=ids, use_cache=False)
            )
        for key, values in rows.items():
            assert values.dtype == torch.bfloat16
            wanted = seen[key].float()
            alike = cosine_similarity(values.float(), wanted, dim=1)
            error = (values.float() - wanted).norm(dim=1) / wanted.norm(dim=1)
            worst = min(worst, alike.min().item())
            assert alike.min() >= 0.995, f"{key}: position {alike.argmin()} of {len(fed)}: {alike.min():.4f}"
            assert error.max() <= 0.1, f"{key}: position {error.argmax()} of {len(fed)} is off by {error.max():.3f}"
    print(f"the least alike row has a cosine of {worst:.5f}")
