"""Which architectures can be served: causal language models that transformers knows, or that bring their own code."""

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from serve_app.capture.resolver import ResolutionError


class UnsupportedModelError(ResolutionError):
    """The engine cannot generate with this model; the message says why."""


def check_config(config: PretrainedConfig, *, trust_remote_code: bool = False) -> None:
    """Check that a configuration is of a causal language model, before its weights are loaded.

    Raises:
        UnsupportedModelError: if it is not.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder model; only decoders that generate by themselves are supported"
        )
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    own_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not known and not own_code:
        raise UnsupportedModelError(
            f"{kind} is not a causal language model: transformers has no AutoModelForCausalLM for its configuration"
        )
