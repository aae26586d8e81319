"""Loads a model's weights with transformers, and rejects incomplete or foreign weights.

transformers randomly initializes weights that a checkpoint lacks or has in another shape, ignores weights it does not know,
and reports both in the log only. Here both are errors that name the weights, because such a model would otherwise be served,
captured and evaluated like any other. `read_module` loads weights. `compare_headers` compares a folder's weight files with its
configuration, without loading either, for an engine with a loader of its own.

Some leftover weights are allowed: buffers that older versions saved, layers that predict several tokens at once, and whole
parts that a causal language model does not use (vision towers, classification heads). They are logged. A leftover in a part
that the model runs (an additional decoder layer, a bias, an adapter, the scales of a quantization) would change what it
computes, so it is an error.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from serve_app.models.errors import WeightsError
from serve_app.models.identity import BASE_WEIGHTS, DamagedWeightsError, read_header, shard_names

log = logging.getLogger(__name__)

MOST_NAMED = 6
"""Number of weights of each kind that an error names."""

_BUFFERS = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids|cos_cached|sin_cached|"
    r"num_batches_tracked|_extra_state|causal_mask)$"
)
"""Buffers that older versions of transformers saved and newer ones compute."""

_OTHER_PARTS = re.compile(
    r"mtp|nextn|vision|visual|vit\b|image|video|audio|speech|talker|code2wav|mm_|multi_?modal|projector|embed_(vision|audio)|"
    r"resampler|medusa|eagle|(^|_)v_head|value_head|score$|classifier|classification_head|qa_outputs|pooler|reward"
)
"""Parts of a checkpoint that a causal language model does not run, by the first module on their path that it does not have."""

_ADAPTED = re.compile(r"lora_|\.base_layer\.|ia3_l|hada_w|lokr_w|modules_to_save|oft_|boft_|vera_lambda|randlora_")
"""Names of weights that peft saved beside or around a model's."""

_LAYER = re.compile(r"(^|\.)(layers|h|blocks?|layer)\.(\d+)\.")

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
"""Bits of a number's significand."""


def read_module(path: str, name: str, **options: Any) -> PreTrainedModel:
    """Load a causal language model with complete weights.

    Args:
        path: a folder or a hub id.
        name: the model's name in errors.
        options: options of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        WeightsError: naming the weights that are missing, mismatched or unexpected, or why they cannot be read.
    """
    with _quiet_report() as report:
        try:
            module, found = AutoModelForCausalLM.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except SafetensorError as error:
            raise WeightsError(f"model {name!r}: a weight file cannot be read ({error}); download it again") from error
        except OSError as error:
            raise WeightsError(f"model {name!r}: {_first_line(error)}{_weights_there(path)}") from error
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            # Causes in a quantized model: a package or device that it needs, or unknown weights.
            reason = f"its weights cannot be converted: {_conversions(report)}" if report else str(error).strip()
            if (method := _quantization_at(path, options)) is not None:
                package = error.name if isinstance(error, ModuleNotFoundError) else None
                raise WeightsError(
                    f"model {name!r} is quantized with {method} and cannot be loaded here: {reason}"
                    f"{f' (pip install {package})' if package == method else ''}"
                ) from error
            if isinstance(error, ImportError):  # the model's own code needs a package
                raise WeightsError(f"model {name!r} cannot be loaded here: {error}") from error
            if not report:
                raise
            raise WeightsError(f"model {name!r}: {reason}") from error
    check_found(module, name, found)
    _log_cast(path, name, options.get("dtype"))
    assert isinstance(module, PreTrainedModel)
    return module


def quantization_of(config: PretrainedConfig) -> str | None:
    """Return the quantization method in a configuration; None if the model is not quantized."""
    described = getattr(config, "quantization_config", None)
    if described is None:
        return None
    method = described.get("quant_method") if isinstance(described, dict) else described.quant_method
    return str(getattr(method, "value", method) or "unknown")


def compare_headers(path: str, name: str, config: PretrainedConfig) -> None:
    """Compare the names and shapes in a folder's weight files with its configuration's model; nothing is loaded.

    A hub id, a quantized model, and a model that transformers does not support are not compared: the engine's own loader must
    check them.

    Raises:
        WeightsError: naming the weights that are missing, mismatched or unexpected.
    """
    folder = Path(path)
    if not folder.is_dir() or getattr(config, "quantization_config", None) is not None:
        return
    try:
        stored = _shapes(folder)
        with torch.device("meta"):
            described = AutoModelForCausalLM.from_config(config)
    except (DamagedWeightsError, OSError) as error:
        raise WeightsError(f"model {name!r}: {error}") from error
    except ValueError as error:  # transformers has no causal language model for it
        log.info("%s: its weight files are not compared with its configuration: %s", name, _first_line(error))
        return
    if not stored:
        return
    with _quiet_report() as report:
        try:
            module, found = type(described).from_pretrained(
                None,
                config=described.config,
                state_dict=stored,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                device_map={"": "meta"},
            )
        except RuntimeError as error:
            if not report:
                raise
            raise WeightsError(f"model {name!r}: its weights cannot be converted: {_conversions(report)}") from error
    check_found(module, name, found)


def check_found(module: PreTrainedModel, name: str, found: dict[str, Any]) -> None:
    """Reject a model with foreign or missing weights, according to transformers' loading info.

    Args:
        module: the model.
        name: the model's name in errors.
        found: transformers' loading info: `missing_keys`, `unexpected_keys`, `mismatched_keys`, `error_msgs`.

    Raises:
        WeightsError: naming them.
    """
    missing = sorted((key for key in found["missing_keys"] if not _BUFFERS.search(key)), key=natural)
    mismatched = sorted(found["mismatched_keys"], key=lambda entry: natural(entry[0]))
    wrong: list[str] = []
    leftover: list[str] = []
    for key in sorted(found["unexpected_keys"], key=natural):
        (leftover if _is_harmless(key, module) else wrong).append(key)
    problems = []
    if missing:
        problems.append(f"{_count(missing, 'is', 'are')} missing and would be initialized randomly: {_named(missing)}")
    if mismatched:
        shapes = [f"{key} ({list(there)} stored, {list(wanted)} in the model)" for key, there, wanted in mismatched]
        problems.append(f"{_count(shapes, 'has', 'have')} another shape: {_named(shapes)}")
    if wrong:
        problems.append(f"{_count(wrong, 'is', 'are')} not part of the model: {_named(wrong)}{_hint(wrong)}")
    problems += found["error_msgs"]
    if problems:
        raise WeightsError(
            f"model {name!r}: its weights are not those of {type(module).__name__} as its config.json describes it. "
            f"{'; '.join(problems)}"
        )
    if leftover:
        log.info("%s: %s left over, which it does not use: %s", name, _count(leftover, "is", "are"), _named(leftover))


def natural(key: str) -> tuple[tuple[int, str], ...]:
    """Return a key that sorts names by the numbers in them: layer 2 before layer 10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key))


def _is_harmless(key: str, module: PreTrainedModel) -> bool:
    """Whether a weight that the model does not have can be ignored without changing what it computes."""
    if _ADAPTED.search(key):
        return False
    if _BUFFERS.search(key):
        return True
    layer = _LAYER.search(key)
    text = module.config.get_text_config()
    n_layers = getattr(text, "num_hidden_layers", 0) or 0
    ahead = getattr(text, "num_nextn_predict_layers", None) or 0
    if layer and n_layers <= int(layer[3]) < n_layers + ahead:
        return True
    around, part = _where_it_leaves(key, module)
    if _OTHER_PARTS.search(part):
        return around in ("", *_ancestors(module))
    return around == "" and layer is None and part != "final_logits_bias"


def _where_it_leaves(key: str, module: PreTrainedModel) -> tuple[str, str]:
    """Return the deepest module on a weight's path that the model has, and the next name, which it does not have."""
    around: list[str] = []
    current: torch.nn.Module = module
    for part in key.split("."):
        inner = getattr(current, "_modules", {}).get(part)
        if inner is None:
            return ".".join(around), part
        around.append(part)
        current = inner
    return ".".join(around), ""


def _ancestors(module: PreTrainedModel) -> list[str]:
    """Return the paths of the modules around the model's layers and embedding, outermost first."""
    embedding = module.get_input_embeddings()
    path = next((path for path, inner in module.named_modules() if inner is embedding), "")
    parts = path.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _hint(keys: Iterable[str]) -> str:
    if any(_ADAPTED.search(key) for key in keys):
        return " (they are an adapter's: load its folder with its adapter_config.json, or merge it into the model)"
    if any(re.search(r"scale|qweight|qzeros|absmax|quant", key) for key in keys):
        return " (they look quantized: does config.json lack its quantization_config?)"
    return ""


def _count(found: list[str], one: str, several: str) -> str:
    return f"{len(found)} {'weight' if len(found) == 1 else 'weights'} {one if len(found) == 1 else several}"


def _named(names: list[str]) -> str:
    rest = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _weights_there(path: str) -> str:
    """Return which weight files a folder has, if transformers reads none of them."""
    folder = Path(path)
    if not folder.is_dir() or any((folder / name).exists() for name in BASE_WEIGHTS):
        return ""
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
    there = sorted(file.name for file in folder.iterdir() if file.suffix in suffixes)
    return f" (one of {', '.join(BASE_WEIGHTS)} is needed; the folder has {', '.join(there[:5]) or 'no weights'})"


@contextmanager
def _quiet_report() -> Iterator[list[str]]:
    """Keep transformers' report of a load, a table with a line per weight, out of the log; yields the reports."""
    reports: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "LOAD REPORT" not in message:
            return True
        reports.append(message)
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield reports
    finally:
        logger.removeFilter(keep)


def _conversions(reports: list[str]) -> str:
    """Return the lines of a load report with failed conversions."""
    lines = [line.strip() for line in "\n".join(reports).splitlines()]
    wrong = [line for line in lines if "CONVERSION" in line or "Error" in line]
    return "; ".join(wrong[:MOST_NAMED]) or _first_line(RuntimeError(reports[0]))


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads a folder's weights from.

    Raises:
        DamagedWeightsError: if an index cannot be read.
    """
    first = next((folder / name for name in BASE_WEIGHTS if (folder / name).exists()), None)
    if first is None:
        return []
    return [folder / name for name in shard_names(first)] if first.suffix == ".json" else [first]


def _quantization_at(path: str, options: Mapping[str, Any]) -> str | None:
    """Return the quantization method of the model at a path; None if it is not quantized, or a GGUF file is read."""
    if "gguf_file" in options:
        return None
    asked = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    return quantization_of(AutoConfig.from_pretrained(path, **asked))


def _shapes(folder: Path) -> dict[str, Tensor]:
    """Return a folder's weights as tensors with a shape and a dtype but no values."""
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                for key in weights.keys():  # noqa: SIM118 - it is no dict
                    found[key] = torch.empty(weights.get_slice(key).get_shape(), device="meta")
        else:
            found |= torch.load(file, map_location="meta", weights_only=True, mmap=True)
    return found


def _log_cast(path: str, name: str, computed_in: Any) -> None:
    """Log if weights are stored in another dtype than the model computes in; warn if the conversion loses some of them."""
    folder = Path(path)
    if not folder.is_dir() or not isinstance(computed_in, torch.dtype):
        return
    wanted = str(computed_in).removeprefix("torch.")
    stored: set[str] = set()
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            stored |= {
                _DTYPES[tensor["dtype"]] for tensor in read_header(file).tensors.values() if tensor["dtype"] in _DTYPES
            }
    others = sorted(stored - {wanted})
    if not others:
        return
    loses = any(_BITS[kind] > _BITS.get(wanted, 0) or (kind, wanted) == ("bfloat16", "float16") for kind in others)
    log.log(
        logging.WARNING if loses else logging.INFO,
        "%s: weights stored in %s are computed in %s%s",
        name,
        " and ".join(others),
        wanted,
        ", which loses precision" if loses else "",
    )
