"""The workload of every way to generate: one model and the same prompts.

The prompts are GSM8K problems, each a question in the model's chat template. The model is one that `roentgen serve` accepts
or, on a machine without a model hub, a random model with the shape of a real one, because speed does not depend on the
output.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from roentgen.contract import ActivationRequest, Positions, captured_as
from roentgen.defaults import EMBEDDED_MODEL
from serve_app.capture.observer import observe
from serve_app.capture.resolver import resolve_structure
from serve_app.capture.rows import CapturePlan
from serve_app.engines.served_model import ServedModel, native_dtype
from serve_app.engines.transformers.load_checks import check_loaded
from serve_app.engines.transformers.loaded_model import LoadedModel, load
from serve_app.models.model_source import ModelSource, locate

RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    },
    "llama-0.6b": {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "initializer_range": 0.04,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    },
    "llama-tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 1024,
        "max_position_embeddings": 1024,
        "initializer_range": 0.16,
        "tie_word_embeddings": True,
    },
}
"""Shapes of real models, and a tiny one, for `--random-weights`.

With a Llama's default weights a narrow model's attention is an average over all tokens, the rows of successive tokens hardly
differ, and no check could tell them apart. So `initializer_range` is 1.28 / √hidden_size, as it is by default in the 8B shape.
"""

CAPTURES = ("none", "3x2", "all")
"""Nothing; three layers' two norms, the default of a request; every layer's residual stream."""


@dataclass(frozen=True)
class Workload:
    """What is run."""

    model: str = EMBEDDED_MODEL
    """A name that `roentgen serve` takes."""
    random_weights: str = ""
    """Instead, a name in `RANDOM_MODELS`."""
    problems: str = ""
    """A source of problems, as `roentgen eval --problems` takes it; "" for GSM8K or what stands in for it."""
    max_tokens: int = 32
    """The most to generate per prompt; an end-of-text token ends it before."""
    dtype: str = "auto"
    """"auto", or a torch dtype's name."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""

    @property
    def name(self) -> str:
        """The model's name, for people."""
        return f"{self.random_weights} (random weights)" if self.random_weights else self.model

    def place(self) -> tuple[torch.device, torch.dtype]:
        """Return where to run, and in what."""
        cuda = self.device == "auto" and torch.cuda.is_available()
        device = torch.device("cuda" if cuda else self.device.replace("auto", "cpu"))
        return device, native_dtype(device) if self.dtype == "auto" else getattr(torch, self.dtype)

    def load_plain(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model as transformers has it."""
        device, dtype = self.place()
        if self.random_weights:
            torch.manual_seed(0)
            shape = dict(RANDOM_MODELS[self.random_weights])
            tokenizer = self.tokenizer()
            end = tokenizer.eos_token_id
            config = transformers.AutoConfig.for_model(**shape, eos_token_id=end, pad_token_id=end, bos_token_id=None)
            with torch.device(device):
                module = AutoModelForCausalLM.from_config(config, dtype=dtype)
            return module.eval(), tokenizer
        module = AutoModelForCausalLM.from_pretrained(locate(self.model).path, dtype=dtype).to(device)
        return module.eval(), self.tokenizer()

    def load(self) -> LoadedModel:
        """Load the model as the server has it."""
        if not self.random_weights:
            return load(locate(self.model), self.dtype, self.device)
        device, dtype = self.place()
        module, tokenizer = self.load_plain()
        structure = resolve_structure(module, self.random_weights)
        checks = check_loaded(module, structure)
        source = ModelSource(self.random_weights, self.random_weights, "random")
        return LoadedModel(source, tokenizer, structure, device, dtype, observe(module, tokenizer), checks=checks)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer alone."""
        if self.random_weights:
            return stand_in_tokenizer(RANDOM_MODELS[self.random_weights]["vocab_size"])
        return AutoTokenizer.from_pretrained(locate(self.model).path)

    def saved(self, folder: Path) -> "Workload":
        """Return this workload with a model that a server can load: one with random weights is saved into the folder."""
        if not self.random_weights:
            return self
        module, tokenizer = self.load_plain()
        path = folder / self.random_weights
        module.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return replace(self, model=str(path), random_weights="")

    def messages(self, count: int) -> list[list[dict[str, str]]]:
        """Return conversations that pose the first `count` problems; again from the first if there are fewer."""
        from eval_jobs.selection import Selection, load_problems  # random prompts need no package of the evaluation's

        found = load_problems(Selection(source=problem_source(self.problems), samples=count))
        return [[{"role": "user", "content": found[i % len(found)].question}] for i in range(count)]

    def prompts(self, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
        """Return the same, as tokens."""
        return [self.tokens(tokenizer, messages) for messages in self.messages(count)]

    def tokens(self, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
        """Return a conversation as tokens, in the model's chat template."""
        if tokenizer.chat_template is None:
            return list(tokenizer(messages[-1]["content"])["input_ids"])
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def problem_source(given: str) -> str:
    """Return where problems come from: what is given, else GSM8K's test split if it is at hand, else generated sums."""
    beside = Path(__file__).parents[2] / "shared" / "gsm8k" / "test.jsonl"
    if given:
        return given
    if os.environ.get("ROENTGEN_GSM8K_DIR"):
        return "gsm8k"
    return str(beside) if beside.exists() else "arithmetic"


def stand_in_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """Make a byte-level tokenizer with as many tokens as a real one, for a model without one; the last ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: i for i, token in enumerate([*alphabet, *(f"Ġ{i}" for i in range(len(alphabet), vocab_size - 1))])
    }
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    wrapped.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    return wrapped


def capture_plan(model: ServedModel, capture: str) -> CapturePlan | None:
    """Return what a run captures, one of `CAPTURES`."""
    request = capture_request(model.structure.num_layers, capture)
    if request is None:
        return None
    return CapturePlan(model.structure.resolve(request), Positions.parse(request.positions), captured_as(request.dtype))


def capture_request(num_layers: int, capture: str) -> ActivationRequest | None:
    """Return a capture as a client asks for it; the three layers are those at a quarter, a half and three quarters."""
    if capture == "none":
        return None
    if capture == "all":
        return ActivationRequest(layers="all", hook_points=("resid_post",))
    layers = tuple(dict.fromkeys(num_layers * part // 4 for part in (1, 2, 3)))
    return ActivationRequest(layers=layers, hook_points=("ln_attn", "ln_mlp"))
