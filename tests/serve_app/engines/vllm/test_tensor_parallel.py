"""Values that are sharded over two ranks: gathered in the model's order where possible, else rejected.

Tests of all engines run with two ranks too (`test_both_engines`). On a CPU ranks communicate through shared memory, where GPUs
have links; vLLM's layers, nnsight's gathering and this project's code are the same as on GPUs.
"""

from collections.abc import Iterator

import pytest
import torch

from serve_app.capture.structure import CaptureRequestError
from serve_app.engines.protocol import Sampling
from tests.serve_app.engines.subjects import Subject, subject
from tests.serve_app.engines.test_both_engines import LONG, assert_rows, captured, plan
from tests.serve_app.tiny import Call, run

PROJECTIONS = {  # what vLLM fuses, and what is put together from parts, by the modules of transformers that do it
    "self_attn.qkv_proj.output": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj.output": ("mlp.gate_proj", "mlp.up_proj"),
}
INPUTS = {"mlp.down_proj.input": "mlp.down_proj", "self_attn.o_proj.input": "self_attn.o_proj"}
SPLIT = ("mlp.act_fn.output", "self_attn.attn.output")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    """Each rank has a query's head; both have the only key's."""
    with subject("vllm on two ranks", tmp_path_factory.mktemp("split"), max_cache_tokens=2048, eager=True) as started:
        yield started


def projected(split: Subject, tokens: list[int]) -> dict[str, torch.Tensor]:
    """Run tokens alone through plain transformers; returns the inputs and outputs of every layer's projections."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for i, layer in enumerate(split.reference.model.layers):
        for path in {*(part for parts in PROJECTIONS.values() for part in parts), *INPUTS.values()}:

            def hook(_, args, output, name=f"layers.{i}.{path}"):  # type: ignore[no-untyped-def]
                seen[f"{name}.input"], seen[f"{name}.output"] = args[0][0].clone(), output[0].clone()

            handles.append(layer.get_submodule(path).register_forward_hook(hook))
    with torch.inference_mode():
        split.reference(input_ids=torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    found = {}
    for i in range(len(split.reference.model.layers)):
        for name, parts in PROJECTIONS.items():
            found[f"layers.{i}.{name}"] = torch.cat([seen[f"layers.{i}.{part}.output"] for part in parts], dim=1)
        for name, path in INPUTS.items():
            found[f"layers.{i}.{name}"] = seen[f"layers.{i}.{path}.input"]
    return found


def test_projections_are_whole_and_in_the_models_order(split: Subject) -> None:
    for fed, rows in captured(split, plan(split, *PROJECTIONS, *INPUTS)):
        assert_rows(rows, projected(split, fed))


def test_reading_them_changes_nothing(split: Subject) -> None:
    """Gathered and reordered values are sharded again for the model, which must continue as if nothing had read them."""
    sampling = Sampling(20, temperature=0)
    for prompt in LONG:
        (looked_at,) = run(split.engine, [Call(prompt, sampling, plan(split, *PROJECTIONS, *INPUTS))])
        assert looked_at.token_ids == split.alone(prompt, 20)


def test_what_is_in_parts_is_refused_by_name(split: Subject) -> None:
    for name in SPLIT:
        with pytest.raises(CaptureRequestError, match=rf"layers\.0\.{name} is sharded"):
            plan(split, name)
    places = {place.partition(".layers.0.")[2] for place in split.model.structure.split}
    assert places >= set(SPLIT)
    whole = {"self_attn.o_proj.output", "mlp.down_proj.output", "mlp.output", "input_layernorm.output", "mlp.input"}
    assert not places & {*PROJECTIONS, *INPUTS, *whole}
