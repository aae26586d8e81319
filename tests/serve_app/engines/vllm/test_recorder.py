"""What a verification keeps of a step's values."""

import torch

from serve_app.capture.batch_layout import PackedBatch
from serve_app.engines.vllm.hook_points import tap_at
from serve_app.engines.vllm.recorder import NormRecorder, RowRecorder


def test_norms_are_kept_of_every_value_with_a_row_per_token() -> None:
    values = {
        "numbers.output": torch.tensor([3.0, -4.0, 0.0]),
        "vectors.input": torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]).bfloat16(),
        "heads.output": torch.ones(3, 4, 4),
    }
    norms = NormRecorder({place: tap_at(place) for place in (*values, "table.output", "silent.output")})
    norms.layout = PackedBatch([range(2), range(7, 8)])
    for _ in range(2):
        for place, value in values.items():
            norms(place, value)
        norms("table.output", torch.ones(5, 2))
    seen = {place: found.tolist() for place, found in norms.seen().items()}
    assert seen == {
        "numbers.output": 2 * [3.0, 4.0, 0.0],
        "vectors.input": 2 * [5.0, 0.0, 1.0],
        "heads.output": 6 * [4.0],
    }


def test_rows_are_kept_as_they_are_when_they_are_seen() -> None:
    watched = RowRecorder({"m.output": tap_at("m.output")})
    watched.layout = PackedBatch([range(2)])
    value = torch.tensor([[1.0], [2.0]])
    watched("m.output", value, torch.ones(2, 1))
    watched("m.output", value)
    value.zero_()
    assert watched.seen()["m.output"].flatten().tolist() == [2, 3, 1, 2]
