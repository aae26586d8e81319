"""How long a sequence may be, over every causal language model that transformers has."""

import pytest
import transformers as tr
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from serve_app.models.context import context_length
from tests.serve_app import tiny

# ALiBi, recurrent states, or a configuration that says nothing by default.
UNLIMITED = {"bloom", "cpmant", "falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "xlnet", "xlstm"}
PARTS_OF_OTHERS = {"gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody"}


def test_every_model_type_says_a_length_or_that_there_is_none() -> None:
    found = {
        model_type: context_length(tr.AutoConfig.for_model(model_type))
        for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if model_type not in PARTS_OF_OTHERS
    }
    assert len(found) > 150
    assert {model_type for model_type, length in found.items() if length is None} == UNLIMITED
    assert all(length > 100 for length in found.values() if length is not None)


@pytest.mark.parametrize(
    ("model_type", "said", "length"),
    [
        ("llama", {"max_position_embeddings": 77}, 77),
        ("gpt2", {"n_positions": 77}, 77),
        ("mpt", {"max_seq_len": 77}, 77),
        ("bloom", {"seq_length": 77}, 77),
        ("mamba", {"model_max_length": 77}, 77),
        ("mamba", {"max_sequence_length": 77}, 77),
        ("rwkv", {"context_length": 77}, 77),
        ("whisper", {"max_target_positions": 77}, 77),
        ("mamba", {"seq_length": -1}, None),
    ],
)
def test_each_way_to_say_it(model_type: str, said: dict[str, int], length: int | None) -> None:
    assert context_length(tr.AutoConfig.for_model(model_type, **said)) == length


def test_a_tokenizer_may_say_what_the_configuration_does_not() -> None:
    words = tiny.tokenizer()
    mamba, llama = tr.MambaConfig(), tr.LlamaConfig(max_position_embeddings=64)
    assert words.model_max_length > 1e20
    assert context_length(mamba, words) is None
    words.model_max_length = 512
    assert (context_length(mamba, words), context_length(llama, words)) == (512, 64)
