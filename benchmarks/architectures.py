"""Generates with a tiny random model of every causal architecture of transformers, and compares with transformers alone.

For each model type, a narrow random model of its default configuration (`capture.narrowing`) runs in the transformers engine
with prompts of different lengths together, which end at different times. Its tokens have to be those of transformers' own
`generate` with each prompt alone, and its log-probabilities those of a forward over the whole sequence. The table says per
model type whether that holds, by how much it does not, or why the server refuses the model.

    python -m benchmarks.architectures [MODEL_TYPE ...] > table.txt
"""

import argparse
import logging
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection

import torch
import transformers as tr
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from serve_app.capture.narrowing import narrowed
from serve_app.capture.observer import observe
from serve_app.capture.resolver import resolve_structure
from serve_app.engines.load_checks import check_config, check_loaded
from serve_app.engines.protocol import Sampling
from serve_app.engines.transformers_engine import TransformersEngine
from serve_app.models import LoadedModel
from serve_app.sources import ModelSource
from tests.serve_app import tiny

LENGTHS = ((5, 20), (40, 9), (17, 14))
"""Per prompt, its tokens and how many are generated."""

TOLERANCE = 1e-3
"""Of a log-probability, in float32."""

LIMIT_S = 100


LAYERS = 6

NEEDED: dict[str, dict[str, object]] = {
    "deepseek_v2": {"num_experts_per_tok": 4},
    "dots1": {"n_routed_experts": 24, "num_experts_per_tok": 4, "n_shared_experts": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 8},
    "bamba": {"attn_layer_indices": [2]},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"], "num_hidden_layers": 4},
    "mamba2": {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 16, "vocab_size": 512},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "vocab_size": 512},
    "xlstm": {"hidden_size": 32, "num_heads": 4, "embedding_dim": 32, "vocab_size": 512},
    "falcon_h1": {"hidden_size": 32, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
}
"""What default configurations leave out."""

NARROW_ALREADY = ("mamba2", "rwkv", "xlstm")


def shallow(config: tr.PretrainedConfig) -> None:
    """Leave a configuration its first layers, with whatever it says for each of them."""
    fields = vars(config)
    name = next((n for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in fields), None)
    if name is None or fields[name] <= LAYERS:
        return
    for key, value in list(fields.items()):
        if isinstance(value, list) and len(value) == fields[name]:
            fields[key] = value[:LAYERS]
        elif key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"):
            fields[key] = LAYERS


def build(model_type: str) -> PreTrainedModel:
    """Build a narrow random model, with weights large enough for its tokens to depend on one another."""
    said = []
    for four_heads, few_layers in ((True, True), (False, True), (True, False), (False, False)):
        config = tr.AutoConfig.for_model(model_type, **NEEDED.get(model_type, {}))
        if model_type not in NARROW_ALREADY:
            config = narrowed(config, four_heads=four_heads)
        if few_layers:
            shallow(config)
            shallow(config.get_text_config())
        for part in {id(config): config, id(config.get_text_config()): config.get_text_config()}.values():
            if isinstance(getattr(part, "sliding_window", None), int):
                part.sliding_window = 12
            if hasattr(part, "is_decoder"):
                part.is_decoder = True
            vars(part)["eos_token_id"] = vars(part)["bos_token_id"] = None
            if getattr(part, "pad_token_id", None) is not None:
                part.pad_token_id = 0
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in tr.AutoModelForCausalLM.from_config(config).parameters())
            if size > 200_000_000:
                raise ValueError(f"{size:,} parameters")
            torch.manual_seed(0)
            model = tr.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            for parameter in model.parameters():
                if parameter.numel() > 1 and parameter.min() == parameter.max():
                    parameter.data += 0.3 * torch.randn_like(parameter)
                elif parameter.ndim == 2:
                    parameter.data *= 3
            with torch.inference_mode():
                model(input_ids=torch.arange(8)[None] + 3, use_cache=False)
        except Exception as error:  # noqa: BLE001 - each way to narrow may fail in its own way
            said.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}")
        else:
            return model
    raise ValueError("; ".join(dict.fromkeys(said)))


def alone(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy completion by transformers' own generate."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()


def try_one(model_type: str) -> str:
    """Return the table's line for a model type."""
    try:
        plain = build(model_type)
    except Exception as error:  # noqa: BLE001 - it is what the table says
        return f"not built\t{error}"
    vocab = plain.get_input_embeddings().weight.shape[0]
    prompts = [
        [3 + (7 * i + 5 * j * j + j) % (min(vocab, 500) - 4) for j in range(n)] for i, (n, _) in enumerate(LENGTHS)
    ]
    expected: list[list[int]] | str
    try:
        expected = [alone(plain, prompt, m) for prompt, (_, m) in zip(prompts, LENGTHS, strict=True)]
    except Exception as error:  # noqa: BLE001 - it is what the table says
        expected = f"generate fails: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
    full = []
    try:
        check_config(plain.config)
        structure = resolve_structure(plain, model_type)
        checks = check_loaded(plain, structure)
        words = tiny.tokenizer()
        source = ModelSource(model_type, "tiny", "0")
        loaded = LoadedModel(
            source, words, structure, torch.device("cpu"), torch.float32, observe(plain, words), checks=checks
        )
        loaded.generation_config.eos_token_id = None
        loaded.tokenizer.eos_token = None
        engine = TransformersEngine(loaded, max_cache_tokens=10_000)
    except Exception as error:  # noqa: BLE001 - it is what the table says
        return f"refused\t{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    kind = f"{checks.batching.kind}, {'continuous' if engine._joins else 'static'}, {checks.seconds:.1f} s"
    calls = [tiny.Call(p, Sampling(m, temperature=0)) for p, (_, m) in zip(prompts, LENGTHS, strict=True)]
    try:
        results = tiny.run(engine, calls)
    except Exception as error:  # noqa: BLE001 - it is what the table says
        return f"fails\t{kind}\t{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    finally:
        engine.close()
    errors = []
    for prompt, result in zip(prompts, results, strict=True):
        tokens = prompt + result.token_ids
        with torch.inference_mode():
            logits = plain(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()
        logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
        wanted = logprobs.gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
        given = torch.tensor([score.logprob for score in result.scores])
        errors.append(float((given - wanted).abs().max()))
        full.append(logprobs.argmax(-1).tolist())
    same = isinstance(expected, str) or [r.token_ids for r in results] == expected
    verdict = "ok" if same and max(errors) <= TOLERANCE else "wrong"
    said = f"\t{expected}" if isinstance(expected, str) else ("" if same else "\ttokens differ from generate")
    if not isinstance(expected, str) and not same and full == expected:
        said += " (a full forward gives generate's)"
    return f"{verdict}\t{kind}\tlog-probabilities off by {', '.join(f'{e:.1e}' for e in errors)}{said}"


def _child(model_type: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    pipe.send(try_one(model_type))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*")
    asked = parser.parse_args().model_types
    logging.disable(logging.CRITICAL)
    tr.logging.set_verbosity_error()
    fork = multiprocessing.get_context("fork")
    for model_type in asked or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        here, there = fork.Pipe(duplex=False)
        started = time.monotonic()
        process = fork.Process(target=_child, args=(model_type, there))
        process.start()
        there.close()
        try:
            line = here.recv() if here.poll(LIMIT_S) else "timeout"
        except EOFError:
            line = "died"
        process.kill()
        process.join()
        print(f"{model_type}\t{line}\t({time.monotonic() - started:.0f} s)", flush=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
