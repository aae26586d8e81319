"""Tiny random models of real architectures, with a real byte-level tokenizer, for the server's unit tests."""

import threading

import torch
import transformers as tr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from serve_app.capture.observer import observe
from serve_app.capture.resolver import resolve_structure
from serve_app.capture.rows import CapturePlan
from serve_app.engines.protocol import Event, Failed, Finished, GenerationJob, Sampling, TextDelta
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.grouped_attention import use_grouped_attention
from serve_app.engines.transformers.load_checks import CheckedModel, check_loaded
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.models.model_source import ModelSource

EOS = 256
SIZE: dict[str, object] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 257}
ROOM: dict[str, object] = {"intermediate_size": 64, "max_position_embeddings": 128}
IDS: dict[str, object] = {"eos_token_id": EOS, "bos_token_id": None, "pad_token_id": EOS}
GROUPED: dict[str, object] = {**SIZE, **ROOM, **IDS, "num_key_value_heads": 2}
HEADED: dict[str, object] = {**GROUPED, "head_dim": 8}
# Heads as wide as vLLM's kernels need them, and room for several blocks of its cache.
WIDE: dict[str, object] = {
    **GROUPED,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
WINDOWED: dict[str, object] = {**HEADED, "sliding_window": 4}
EXPERTS: dict[str, object] = {**GROUPED, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
GPT: dict[str, object] = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": 257,
    "eos_token_id": EOS,
    "bos_token_id": EOS,
}
FALCON: dict[str, object] = {**SIZE, **IDS, "max_position_embeddings": 128}
DEEPSEEK: dict[str, object] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
DEEPSEEK |= {
    "n_routed_experts": 6,
    "n_group": 2,
    "topk_group": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
}

LONGROPE: dict[str, object] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
}
LONGROPE |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}

# By transformers' name of the model type; where one has several kinds of block, what tells them apart follows.
CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", GROUPED),
    "wide_llama": ("llama", WIDE),
    "mistral": ("mistral", GROUPED),
    "qwen2": ("qwen2", GROUPED),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen3": ("qwen3", HEADED),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"head_dim": 8}),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 6}),
    "gemma2": ("gemma2", WINDOWED),
    "gemma3_text": ("gemma3_text", WINDOWED),
    "gpt2": ("gpt2", GPT | {"n_positions": 128}),
    "gpt_neox": ("gpt_neox", {**SIZE, **ROOM, "eos_token_id": EOS, "bos_token_id": EOS}),
    "gpt_neox_sequential": ("gpt_neox", {**SIZE, **ROOM, "use_parallel_residual": False}),
    "gptj": ("gptj", GPT | {"n_positions": 128, "rotary_dim": 4}),
    "phi": ("phi", GROUPED),
    "phi3": ("phi3", GROUPED),
    # LongRoPE: beyond 16 tokens, rotations take other frequencies.
    "phi3_longrope": ("phi3", GROUPED | {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE}),
    "olmo2": ("olmo2", GROUPED),
    "olmoe": ("olmoe", GROUPED | {"num_experts": 6, "num_experts_per_tok": 2}),
    "falcon": ("falcon", FALCON),
    "falcon_two_norms": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_sequential": ("falcon", FALCON | {"parallel_attn": False}),
    "stablelm": ("stablelm", GROUPED),
    "stablelm_parallel": ("stablelm", GROUPED | {"use_parallel_residual": True}),
    "glm4": ("glm4", HEADED),
    "gpt_oss": ("gpt_oss", WINDOWED | {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "opt": ("opt", {**SIZE, **IDS, "word_embed_proj_dim": 32, "ffn_dim": 64, "max_position_embeddings": 128}),
    "opt_post_norm": ("opt", {**SIZE, **IDS, "word_embed_proj_dim": 32, "ffn_dim": 64, "do_layer_norm_before": False}),
    "bloom": ("bloom", {**IDS, "hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 257}),
    "cohere": ("cohere", GROUPED),
    "granite": ("granite", GROUPED | {"residual_multiplier": 0.22}),
    "smollm3": ("smollm3", GROUPED),
    "deepseek_v3": ("deepseek_v3", {**GROUPED, **DEEPSEEK, "num_key_value_heads": 4, "num_experts_per_tok": 2}),
    # Convolutions between attention layers: a cache that is not all keys and values.
    "lfm2": ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention", "conv"]}),
    "llama4_text": ("llama4_text", HEADED | {"num_local_experts": 6, "intermediate_size_mlp": 64}),
}

STATES = {"state_size": 16, "num_hidden_layers": 3, "hidden_size": 32, "vocab_size": 257, **IDS}
# Models whose hook points are not what is tested of them.
OTHERS: dict[str, tuple[str, dict[str, object]]] = {
    "mamba": ("mamba", STATES),
    "mamba2": ("mamba2", STATES | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}),
    "rwkv": ("rwkv", {**STATES, "attention_hidden_size": 32, "intermediate_size": 64, "context_length": 128}),
    "mpt": ("mpt", {**IDS, "d_model": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 257, "max_seq_len": 128}),
    "openai-gpt": ("openai-gpt", GPT | {"n_positions": 128}),
    # It normalises the embeddings with the norm that comes last.
    "nanochat": ("nanochat", GROUPED),
}


def config(architecture: str) -> tr.PretrainedConfig:
    """A tiny configuration of an architecture."""
    model_type, options = {**CONFIGS, **OTHERS}[architecture]
    return tr.AutoConfig.for_model(model_type, **options)


def module(architecture: str) -> tr.PreTrainedModel:
    """A tiny random model in float32, with norm weights that are not all one, so that norms can be told apart."""
    torch.manual_seed(0)
    model = tr.AutoModelForCausalLM.from_config(config(architecture)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def tokenizer() -> tr.PreTrainedTokenizerFast:
    """A byte-level tokenizer: token i is byte i, 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    wrapped = tr.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    wrapped.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[reply]{% endif %}"
    )
    assert wrapped.eos_token_id == EOS
    return wrapped


def loaded(architecture: str = "llama") -> LoadedModel:
    """A tiny model as the server holds it."""
    weights, words = module(architecture), tokenizer()
    return loaded_from(weights, words, f"tiny-{architecture}")


def loaded_from(
    weights: tr.PreTrainedModel, words: tr.PreTrainedTokenizerBase, name: str = "tiny", *, check: bool = False
) -> LoadedModel:
    """A model as the server holds it; the checks of loading run only on request."""
    structure = resolve_structure(weights, name)
    if check:
        checks = check_loaded(weights, structure)
    else:
        checks = CheckedModel()
        use_grouped_attention(weights)
    source = ModelSource(name, "tiny", "0")
    return LoadedModel(
        source, words, structure, torch.device("cpu"), torch.float32, observe(weights, words), checks=checks
    )


class Call:
    """One job and the events it has emitted."""

    def __init__(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        plan: CapturePlan | None = None,
        *,
        stream: bool = False,
        score_tokens: bool = True,
    ):
        self.events: list[Event] = []
        self._done = threading.Event()
        self.job = GenerationJob(prompt_ids, sampling, self._listen, plan, stream, score_tokens=score_tokens)

    def _listen(self, event: Event) -> None:
        self.events.append(event)
        if not isinstance(event, TextDelta):
            self._done.set()

    def result(self, timeout: float = 60) -> Finished:
        assert self._done.wait(timeout), "the engine did not answer"
        last = self.events[-1]
        if isinstance(last, Failed):
            raise last.error
        assert isinstance(last, Finished)
        return last


def run(engine: TransformersEngine, calls: list[Call]) -> list[Finished]:
    """Submit calls together and wait for all."""
    for call in calls:
        engine.submit(call.job)
    return [call.result() for call in calls]
