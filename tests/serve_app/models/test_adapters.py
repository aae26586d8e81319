"""Adapters are merged into their models: rows against peft's own, unmerged forward, and against the arithmetic by hand."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file

from serve_app.config import ModelChoice, ServerConfig
from serve_app.engines.protocol import Sampling
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import LoadedModel, load
from serve_app.engines.vllm.loading import start
from serve_app.engines.vllm.requirements import EngineUnavailableError
from serve_app.models import adapters
from serve_app.models.adapters import read_model
from serve_app.models.errors import WeightsError
from serve_app.models.model_source import locate
from serve_app.replica.model_slot import engine_for
from tests.serve_app import tiny
from tests.serve_app.alone import plan
from tests.serve_app.replica.test_engine_choice import settings
from tests.serve_app.tiny import Call, run

TOKENS = list(range(40))
SOME = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "base"
    tiny.module("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def trained(config: peft.PeftConfig, to: Path, base: str, model: tr.PreTrainedModel | None = None) -> Any:
    """Save an adapter with random weights of a model that lies at `base`; returns peft's model, unmerged."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model or tiny.module("llama"), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(to)
    described = json.loads((to / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
    (to / "adapter_config.json").write_text(json.dumps(described))
    return adapted.eval()


def loaded(folder: Path, dtype: str = "float32") -> LoadedModel:
    return load(locate(str(folder)), dtype, "cpu", lambda _: None)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.tensor([TOKENS])).logits


KINDS = {
    "lora": peft.LoraConfig(r=4, target_modules=SOME, task_type="CAUSAL_LM"),
    "ranks": peft.LoraConfig(r=4, lora_alpha=16, target_modules=SOME, use_rslora=True, rank_pattern={"q_proj": 2}),
    "dora": peft.LoraConfig(r=4, target_modules=SOME, use_dora=True),
    "bias": peft.LoraConfig(r=4, target_modules=SOME, bias="all"),
    "saved modules": peft.LoraConfig(r=4, target_modules=SOME, modules_to_save=["lm_head", "embed_tokens"]),
    "ends": peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "tokens": peft.LoraConfig(r=4, target_modules=SOME, trainable_token_indices=[3, 5]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(target_modules=SOME),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_computes_what_it_does_beside_the_weights(base: Path, tmp_path: Path, kind: str) -> None:
    adapted = trained(KINDS[kind], tmp_path / "mine", str(base))
    source = locate(str(tmp_path / "mine"))
    model = read_model(source, dtype=torch.float32)
    expected, plain = logits(adapted), logits(tiny.module("llama"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3  # so that the base model alone would fail
    assert type(model).__name__ == "LlamaForCausalLM"
    assert source.name == "mine"


def test_rows_are_the_adapted_models_and_follow_from_its_matrices(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    adapted = trained(config, tmp_path / "mine", "../" + base.name)
    shutil.copytree(base, tmp_path / base.name)  # named from the adapter's folder
    model = loaded(tmp_path / "mine")
    engine = TransformersEngine(model)
    (result,) = run(engine, [Call(TOKENS[:9], Sampling(6, temperature=0), plan(model, "resid_post", "mlp_out"))])
    engine.close()
    fed = TOKENS[:9] + result.token_ids[:-1]
    # Two paths: peft's modules with plain hooks, and the base model with W + B·A·alpha/r written into it by hand.
    by_hand, stored = tiny.module("llama"), load_file(tmp_path / "mine/adapter_model.safetensors")
    for name, module in by_hand.named_modules():
        a = stored.get(f"base_model.model.{name}.lora_A.weight")
        if a is not None:
            module.weight.data += stored[f"base_model.model.{name}.lora_B.weight"] @ a * (6 / 4)
    expected = forward_with_hooks(by_hand, fed, layers_of(by_hand))
    theirs = forward_with_hooks(adapted, fed, layers_of(adapted.base_model.model))
    assert result.captured is not None
    for key, rows in result.captured.tensors.items():
        torch.testing.assert_close(rows, expected[key], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows, theirs[key], rtol=1e-4, atol=1e-5)


def layers_of(model: Any) -> dict[str, torch.nn.Module]:
    """Return the modules whose outputs the hook points are."""
    layers = {f"layers.{i}.resid_post": layer for i, layer in enumerate(model.model.layers)}
    return layers | {f"layers.{i}.mlp_out": layer.mlp for i, layer in enumerate(model.model.layers)}


def forward_with_hooks(model: Any, tokens: list[int], modules: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    for key, module in modules.items():

        def hook(_module: Any, _given: Any, output: Any, key: str = key) -> None:
            seen[key] = (output[0] if isinstance(output, tuple) else output).detach().reshape(len(tokens), -1)

        module.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.tensor([tokens]))
    return seen


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_head_is_untied_where_the_adapter_changes_one_end(tmp_path: Path, target: str) -> None:
    model = tiny.module("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    tiny.tokenizer().save_pretrained(tmp_path / "tied")
    adapted = trained(peft.LoraConfig(r=4, target_modules=[target]), tmp_path / "mine", "../tied", model)
    merged = read_model(locate(str(tmp_path / "mine")), dtype=torch.float32)
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-5, atol=1e-5)


def test_an_adapter_beside_its_base_model_and_one_with_more_tokens(base: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(base, tmp_path / "both"))
    adapted = trained(KINDS["lora"], both, "nowhere/at-all")
    model = loaded(both)
    torch.testing.assert_close(logits(model.observed._module), logits(adapted), rtol=1e-5, atol=1e-5)
    assert model.source.revision not in (locate(str(base)).revision, "")
    grown = tiny.module("llama")
    grown.resize_token_embeddings(260, mean_resizing=False)
    adapted = peft.get_peft_model(grown, KINDS["lora"])
    adapted.save_pretrained(tmp_path / "grown", save_embedding_layers=True)
    described = json.loads((tmp_path / "grown/adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(base)
    (tmp_path / "grown/adapter_config.json").write_text(json.dumps(described))
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save_pretrained(tmp_path / "grown")
    model = loaded(tmp_path / "grown")
    assert (model.vocab_size, model.tokenizer("<c>").input_ids) == (260, [259])  # the adapter's own tokenizer
    torch.testing.assert_close(logits(model.observed._module), logits(adapted.eval()), rtol=1e-5, atol=1e-5)


def test_merging_in_another_dtype_rounds_and_no_more(base: Path, tmp_path: Path) -> None:
    adapted = trained(KINDS["lora"], tmp_path / "mine", str(base))
    expected = logits(adapted)
    found = logits(loaded(tmp_path / "mine", "bfloat16").observed._module).float()
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "of type PROMPT_TUNING that cannot be merged"),
        (peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "of type PREFIX_TUNING that cannot be merged"),
        (peft.LoraConfig(r=4, target_modules=SOME, alora_invocation_tokens=[1]), "only after certain tokens"),
        (peft.LoraConfig(r=4, target_modules=SOME, layer_replication=[[0, 2], [1, 3]]), "more than once"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name(
    base: Path, tmp_path: Path, config: peft.PeftConfig, said: str
) -> None:
    adapted = peft.get_peft_model(tiny.module("llama"), config)
    adapted.save_pretrained(tmp_path / "mine")
    described = json.loads((tmp_path / "mine/adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(base)
    (tmp_path / "mine/adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(WeightsError, match=said):
        loaded(tmp_path / "mine")


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    for architecture, target, said in (
        ("wide_llama", "q_proj", "size mismatch for .*layers.0.self_attn.q_proj"),
        ("gpt2", "c_attn", "'c_attn'.* not found in the base model"),
    ):
        folder = tmp_path / architecture
        trained(peft.LoraConfig(r=4, target_modules=[target]), folder, str(base), tiny.module(architecture))
        with pytest.raises(WeightsError, match=said):
            loaded(folder)
    folder = tmp_path / "mine"
    trained(KINDS["lora"], folder, str(base))
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    less = {key: value for key, value in weights.items() if ".layers.1." not in key}
    more = weights | {key.replace(".1.", ".9."): value.clone() for key, value in weights.items() if ".layers.1." in key}
    for changed, said in (
        (less, "6 weights are missing: .*layers.1.mlp.down_proj.lora_A"),
        (more, "6 weights belong to no module of that model: .*layers.9.mlp.down_proj.lora_A"),
    ):
        save_file(changed, file)
        with pytest.raises(WeightsError, match=said):
            loaded(folder)


def test_a_folder_without_what_it_needs_says_so(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    trained(KINDS["lora"], folder, "./nothing")
    with pytest.raises(
        WeightsError, match=r"is an adapter of './nothing' \(base_model_name_or_path\): .*no such folder"
    ):
        locate(str(folder))
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(described | {"base_model_name_or_path": None}))
    with pytest.raises(WeightsError, match="names no base_model_name_or_path"):
        locate(str(folder))
    (folder / "adapter_config.json").write_text(json.dumps(described | {"base_model_name_or_path": str(base)}))
    source = locate(str(folder))
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"is an adapter \(LORA\), which needs peft: pip install 'peft>=0"):
        read_model(source)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no adapter weights .* if they have been merged into the model, remove it"):
        locate(str(folder))


def test_adapters_of_one_model_and_one_adapter_of_two_models_differ(base: Path, tmp_path: Path) -> None:
    trained(KINDS["lora"], tmp_path / "a/mine", "../base")
    shutil.copytree(base, tmp_path / "a/base")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    revisions = {locate(str(tmp_path / place / "mine")).revision for place in "ab"}
    assert len(revisions) == 1
    weights = load_file(tmp_path / "b/base/model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "b/base/model.safetensors", metadata={"format": "pt"})
    assert len({locate(str(tmp_path / place / "mine")).revision for place in "ab"}) == 2


def test_vllm_refuses_an_adapter_and_auto_takes_the_engine_that_does_not(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(KINDS["lora"], tmp_path / "mine", str(base))
    source = locate(str(tmp_path / "mine"))
    with pytest.raises(
        EngineUnavailableError, match=r"'mine' is an adapter \(LORA\), which the vLLM engine does not serve"
    ):
        start(source, settings())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("serve_app.replica.model_slot.installed", lambda: True)
    choice = ModelChoice(model_id="mine")
    assert engine_for(ServerConfig(), choice, source) == "transformers"
    assert engine_for(ServerConfig(), choice, locate(str(base))) == "vllm"


def test_a_hub_adapter_is_found_with_its_base_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = trained(KINDS["lora"], tmp_path / "mine", "me/base")
    for name, folder, commit in (("mine", tmp_path / "mine", "a" * 40), ("base", base, "b" * 40)):
        repository = tmp_path / "hub" / f"models--me--{name}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = locate("me/mine")
    assert (source.name, source.path, source.commit) == ("me/mine", "me/base", "b" * 40)
    assert source.revision.startswith("adapter-")
    torch.testing.assert_close(logits(read_model(source, dtype=torch.float32)), logits(adapted), rtol=1e-5, atol=1e-5)
