"""Tiny random models of real architectures, with a real byte-level tokenizer: what the unit tests of the server run on."""

import threading

import torch
import transformers as tr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from serve_app.capture.observer import observe
from serve_app.capture.resolver import resolve_structure
from serve_app.capture.rows import CapturePlan
from serve_app.engines.attention import use_grouped_attention
from serve_app.engines.protocol import Event, Failed, Finished, GenerationJob, Sampling, TextDelta
from serve_app.engines.transformers_engine import TransformersEngine
from serve_app.models import LoadedModel
from serve_app.sources import ModelSource

EOS = 256
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 257}
ROOM = {"intermediate_size": 64, "max_position_embeddings": 128}
GROUPED = {**SIZE, **ROOM, "num_key_value_heads": 2, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": EOS}


def config(architecture: str) -> tr.PretrainedConfig:
    """A tiny configuration of an architecture, by transformers' name of its model type."""
    match architecture:
        case "llama":
            return tr.LlamaConfig(**GROUPED)
        case "qwen3":
            return tr.Qwen3Config(**GROUPED, head_dim=8)
        case "gemma2":
            return tr.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4)
        case "olmo2":
            return tr.Olmo2Config(**GROUPED)
        case "gpt2":
            return tr.GPT2Config(
                n_embd=32, n_layer=3, n_head=4, vocab_size=257, n_positions=128, eos_token_id=EOS, bos_token_id=EOS
            )
        case "gpt_neox":
            return tr.GPTNeoXConfig(**SIZE, **ROOM, eos_token_id=EOS, bos_token_id=EOS)
        case "lfm2":  # convolutions between attention layers: a cache that is not all keys and values
            return tr.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "conv"])
    raise ValueError(architecture)


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
    use_grouped_attention(weights)
    structure = resolve_structure(weights, f"tiny-{architecture}")
    source = ModelSource(f"tiny-{architecture}", "tiny", "0")
    return LoadedModel(source, observe(weights, words), words, structure, torch.device("cpu"), torch.float32)


class Call:
    """One job and what its listener heard."""

    def __init__(
        self, prompt_ids: list[int], sampling: Sampling, plan: CapturePlan | None = None, *, stream: bool = False
    ):
        self.heard: list[Event] = []
        self._done = threading.Event()
        self.job = GenerationJob(prompt_ids, sampling, self._listen, plan, stream)

    def _listen(self, event: Event) -> None:
        self.heard.append(event)
        if not isinstance(event, TextDelta):
            self._done.set()

    def result(self, timeout: float = 60) -> Finished:
        assert self._done.wait(timeout), "the engine did not answer"
        last = self.heard[-1]
        if isinstance(last, Failed):
            raise last.error
        assert isinstance(last, Finished)
        return last


def run(engine: TransformersEngine, calls: list[Call]) -> list[Finished]:
    """Submit calls together and wait for all."""
    for call in calls:
        engine.submit(call.job)
    return [call.result() for call in calls]
