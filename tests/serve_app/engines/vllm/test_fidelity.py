"""SmolLM2-135M's rows, captured in vLLM, against transformers reading the same tokens alone.

In float32 they are the same but for the last bits. In bfloat16 they are as near to transformers' as rounding lets them be. How
far that takes a row differs from row to row: some tokens have a norm many times the usual one, and cancel it some layers
later: a space before "3 boxes" in a question here is off by 16% in one layer, by 6% in transformers itself. So there a row
is an outlier if it is off by more than that, and by several times what transformers in bfloat16 is. A row of another position,
or of a buffer that has been written over, is off by about 100%.

On a CPU that multiplies in bfloat16, such a token is off by 28%, and transformers' own rows are no reference for it. There rows
are judged by float32 alone, one in fifty may be an outlier, and none may be off by half.

The residual stream in a compiled graph is also judged against what vLLM gives module by module, each beside float32, with one
to 64 requests that are read and go on together.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from roentgen.contract import ActivationRequest, Positions
from serve_app.capture.rows import CapturePlan
from serve_app.engines.protocol import Sampling
from serve_app.engines.served_model import native_dtype
from serve_app.engines.transformers.loaded_model import LoadedModel, load
from serve_app.engines.vllm import loading as vllm
from serve_app.models.model_source import locate
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


@pytest.mark.rotating
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("dtype", "ranks", "eager"),
    [
        ("float32", 1, True),
        ("bfloat16", 1, True),
        ("bfloat16", 3, True),
        ("float32", 1, False),
        ("bfloat16", 1, False),
        ("bfloat16", 3, False),
    ],
)
def test_rows_are_those_of_transformers(dtype: str, ranks: int, eager: bool, tmp_path: Path) -> None:
    source = locate("smollm2-135m")
    rough = dtype == "bfloat16" and native_dtype(torch.device("cpu")) == torch.bfloat16
    settings = vllm_settings(tmp_path, dtype=dtype, max_cache_tokens=4096, tensor_parallel_size=ranks, eager=eager)
    model, engine = vllm.start(source, settings)
    try:
        assert model.structure.missing == {"router": "not a mixture of experts"}
        asked = ActivationRequest(layers="all", hook_points=(*STREAM, "embed", "final_norm"))
        plan = CapturePlan(model.structure.resolve(asked), Positions("all"), "model")
        prompts = [
            model.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
            for question in QUESTIONS
        ]
        calls = [Call(p, Sampling(8 + 4 * i, temperature=0), plan) for i, p in enumerate(prompts)]
        subject = Subject(model, engine, engine.storage, None)
        run(engine, calls)
        captured = [subject.rows(call) for call in calls]
    finally:
        engine.close()
    exact = load(source, "float32", "cpu")
    own = load(source, dtype, "cpu")
    for call, (positions, rows) in zip(calls, captured, strict=True):
        fed = call.job.prompt_ids + call.result().token_ids[:-1]
        assert positions == list(range(len(fed)))
        wanted, rounded = forward(exact, fed, rows), forward(own, fed, rows)
        for key, values in rows.items():
            assert str(values.dtype) == f"torch.{dtype}"
            if not rough:
                alike = cosine_similarity(values.float(), rounded[key], dim=1)
                # What is added to the stream is a small difference of large numbers, and further off in transformers too.
                least = 0.98 if key.endswith("_out") else 0.995
                assert alike.min() >= least, f"{key}: position {alike.argmin()} of {len(fed)}: {alike.min():.4f}"
            norm = wanted[key].norm(dim=1)
            ours, theirs = ((found - wanted[key]).norm(dim=1) / norm for found in (values.float(), rounded[key]))
            limit = torch.full_like(ours, 1e-4) if dtype == "float32" else (4 * theirs).clamp(min=0.2)
            worst, outliers = (ours / limit).argmax(), int((ours > limit).sum())
            said = f"{key}: position {worst} of {len(fed)} is off by {ours[worst]:.3g}"
            assert ours.max() < 0.5, said
            assert outliers <= (max(1, len(fed) // 50) if rough else 0), said


@pytest.mark.rotating
@pytest.mark.timeout(1200)
def test_graphs_are_as_near_to_float32_as_modules_one_by_one(tmp_path: Path) -> None:
    source = locate("smollm2-135m")
    exact = load(source, "float32", "cpu")
    found: dict[bool, torch.Tensor] = {}
    for eager in (True, False):
        settings = vllm_settings(tmp_path, dtype="bfloat16", max_batch=64, max_cache_tokens=64 * 384, eager=eager)
        model, engine = vllm.start(source, settings)
        try:
            asked = ActivationRequest(layers="all", hook_points=("resid_post",))
            plan = CapturePlan(model.structure.resolve(asked), Positions("all"), "model")
            subject = Subject(model, engine, engine.storage, None)
            apart: list[torch.Tensor] = []
            for at_once in (1, 8, 64):
                prompts = [model.tokenizer(f"{i}. {QUESTIONS[i % 6]}")["input_ids"] for i in range(at_once)]
                calls = [Call(p, Sampling(4 + i % 13, temperature=0), plan) for i, p in enumerate(prompts)]
                run(engine, calls)
                for call in calls[:: max(1, at_once // 8)]:
                    _, rows = subject.rows(call)
                    wanted = forward(exact, call.job.prompt_ids + call.result().token_ids[:-1], rows)
                    for key, values in rows.items():
                        apart.append(1 - cosine_similarity(values.float(), wanted[key], dim=1))
        finally:
            engine.close()
        found[eager] = torch.cat(apart)
    in_graph, eagerly = found[False], found[True]
    # One row in 1,000 may be further away: the last tokens of a prompt that is read in two steps were, with 64 requests.
    assert in_graph.quantile(0.999) <= 1e-3
    assert in_graph.max() <= min(2e-3, 1.1 * float(eagerly.max()))
    assert in_graph.mean() <= 1.1 * eagerly.mean()


def forward(model: LoadedModel, tokens: list[int], keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """Read tokens alone through transformers; hook points as it has them, in float32."""
    seen: dict[str, torch.Tensor] = {}

    class Keeper:
        def __init__(self) -> None:
            hook_points = model.structure.taps
            self.taps = {key: hook_points[key] for key in keys}

        def __call__(self, key: str, value: torch.Tensor) -> None:
            seen[key] = value[0].float().clone()

    with torch.inference_mode():
        ids = torch.tensor([tokens])
        model.observed.run([Keeper()], lambda: model.observed._module(input_ids=ids, use_cache=False))
    return seen
