"""The checks of a loaded model, and the limits that each check puts on a model that fails it."""

from collections.abc import Callable

import pytest
import torch
import transformers as tr
from torch import Tensor

from serve_app.capture.resolver import ResolutionError, resolve_structure
from serve_app.engines.batching import LoadReport
from serve_app.engines.transformers.grouped_attention import GROUPED
from serve_app.engines.transformers.load_checks import check_loaded
from serve_app.models.architecture import UnsupportedModelError, check_config
from tests.serve_app import tiny

ROTATION = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 2.0}
ROTATION |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], "original_max_position_embeddings": 64}


def checked(model: tr.PreTrainedModel) -> LoadReport:
    return check_loaded(model, resolve_structure(model, "tiny"))


def built(model_type: str, **options: object) -> tr.PreTrainedModel:
    torch.manual_seed(0)
    return tr.AutoModelForCausalLM.from_config(tr.AutoConfig.for_model(model_type, **options)).eval()


@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe", "gemma3_text", "gpt2", "gpt_oss", "falcon", "bloom"])
def test_requests_share_a_forward_where_that_changes_nothing(architecture: str) -> None:
    report = checked(tiny.module(architecture))
    assert report.batching.kind == "any"
    assert report.decoding_error == 0
    assert len(report.compared_on) == 2


def test_grouped_attention_is_kept_where_heads_are_grouped() -> None:
    model = tiny.module("llama")
    assert checked(model).attention == "grouped"
    assert model.config._attn_implementation == GROUPED
    assert checked(tiny.module("gpt2")).attention == "sdpa"


class WindowedLlama(tr.LlamaForCausalLM):
    """A model whose code reads the attention's name, as DeepSeek-V3.2's does: under another it forgets its window."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: object) -> object:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.config._attn_implementation in ("eager", "sdpa"):
            queries, keys = torch.arange(mask.shape[1])[-input_ids.shape[1] :, None], torch.arange(mask.shape[1])
            near = (keys <= queries) & (keys > queries - 4)
            mask = (near & mask[:, None, None, :].bool()) | (keys == queries)
        return super().forward(input_ids=input_ids, attention_mask=mask, **options)


def test_a_model_whose_code_reads_the_name_of_its_attention_keeps_it() -> None:
    model = WindowedLlama(tiny.config("llama")).eval()
    report = checked(model)
    assert report.attention == model.config._attn_implementation == "sdpa"
    assert report.batching.kind == "any"


class BlendedLlama(tr.LlamaForCausalLM):
    """A model that lets a batch's neighbors or its padding into a row, by `blend` of the embeddings."""

    blend: Callable[[Tensor], Tensor]

    def forward(self, input_ids: Tensor, **options: object) -> object:
        embedded = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embedded + type(self).blend(embedded), **options)


class ReadsPadding(BlendedLlama):
    """What lies before a token, padding too, is added to it."""

    @staticmethod
    def blend(embedded: Tensor) -> Tensor:
        return 0.1 * torch.cat([torch.zeros_like(embedded[:, :1]), embedded[:, :-1]], dim=1)


class ReadsNeighbors(BlendedLlama):
    """The other rows of the batch are added to each."""

    @staticmethod
    def blend(embedded: Tensor) -> Tensor:
        return 0.1 * (embedded.sum(0, keepdim=True) - embedded)


def test_a_model_that_lets_neighbors_in_runs_requests_alone() -> None:
    report = checked(ReadsNeighbors(tiny.config("llama")).eval())
    assert report.batching.kind == "alone"
    assert "beside a longer request" in report.batching.reason
    assert report.decoding_error == 0


def test_a_model_that_reads_padding_runs_requests_of_one_length() -> None:
    # Its decoding is not its forward either: of a token alone, nothing lies before it.
    report = checked(ReadsPadding(tiny.config("llama")).eval())
    assert report.batching.kind == "same length"
    assert report.decoding_error > 1e-3


@pytest.mark.parametrize("limit", [64, 4096])
def test_longrope_takes_requests_on_one_side_of_its_limit(limit: int) -> None:
    options = {**tiny.GROUPED, "max_position_embeddings": 2 * limit, "original_max_position_embeddings": limit}
    rotation = ROTATION | {"original_max_position_embeddings": limit}
    report = checked(built("phi3", rope_parameters=rotation, **options))
    assert report.batching.kind == "one side of a limit"
    assert report.batching.limit == limit


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "camembert"])
def test_a_bidirectional_model_is_refused_by_what_it_does(model_type: str) -> None:
    model = built(model_type, **tiny.SIZE, **tiny.ROOM)
    for dtype in (torch.float32, torch.bfloat16):  # in which rounding would hide it
        with pytest.raises(UnsupportedModelError, match=r"not a causal decoder.*uses later tokens"):
            checked(model.to(dtype))


def test_the_same_model_as_a_decoder_is_not() -> None:
    assert checked(built("bert", **tiny.SIZE, **tiny.ROOM, is_decoder=True)).batching.kind in ("any", "same length")


def test_a_model_that_counts_positions_in_its_own_way_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="does not count positions from 0"):
        checked(built("roberta", **tiny.SIZE, **tiny.ROOM, is_decoder=True))


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("t5", "t5 is an encoder-decoder"),
        ("bart", "bart is an encoder-decoder"),
        ("vit", "vit is not a causal language"),
    ],
)
def test_other_kinds_of_models_are_refused_before_their_weights_are_read(model_type: str, said: str) -> None:
    with pytest.raises(ResolutionError, match=said):
        check_config(tr.AutoConfig.for_model(model_type))


def test_half_precision_is_judged_on_a_stand_in_in_float32() -> None:
    rotation = ROTATION | {"original_max_position_embeddings": 4096}
    options = {**tiny.GROUPED, "max_position_embeddings": 8192, "original_max_position_embeddings": 4096}
    model = built("phi3", rope_parameters=rotation, **options).to(torch.bfloat16)
    assert checked(model).batching.kind == "one side of a limit"
    assert checked(tiny.module("llama").to(torch.bfloat16)).batching.kind == "any"
