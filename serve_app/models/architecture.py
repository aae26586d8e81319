"""Checks which architectures can be served: causal language models that transformers supports, or that bring their own code."""

from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig

from serve_app.capture.resolver import ResolutionError
from serve_app.models.errors import ConfigError
from serve_app.models.model_source import ModelSource


class UnsupportedModelError(ResolutionError):
    """The engine cannot generate with this model; the message says why."""


def read_config(source: ModelSource, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return a model's configuration.

    Raises:
        ConfigError: if it cannot be read, or transformers does not support its model type.
    """
    try:
        return AutoConfig.from_pretrained(source.path, revision=source.commit, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        why = str(error).strip().split("\n\n")[0]  # the rest is advice about versions of transformers
        raise ConfigError(f"model {source.name!r}: its config.json cannot be used: {' '.join(why.split())}") from error


def check_config(config: PretrainedConfig, *, trust_remote_code: bool = False) -> None:
    """Check that a configuration is that of a causal language model, before its weights are loaded.

    Raises:
        UnsupportedModelError: if it is not.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} is an encoder-decoder model; only decoder-only models are supported")
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not known and not own_code:
        raise UnsupportedModelError(
            f"{kind} is not a causal language model: transformers has no AutoModelForCausalLM for its configuration"
        )
