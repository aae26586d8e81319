import torch

from serve_app.capture.batch_layout import PaddedBatch


def test_a_prefill_a_piece_of_one_and_a_step() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0]])
    layout = PaddedBatch.of(mask, torch.tensor([[0, 0, 1], [4, 5, 6], [0, 0, 0]]))
    assert layout.spans[:2] == [range(2), range(4, 7)]
    assert len(layout.spans[2]) == 0
    assert list(layout.flat_indices(0, range(2))) == [1, 2]
    assert list(layout.flat_indices(1, range(4, 7, 2))) == [3, 5]
    step = PaddedBatch.of(torch.ones(2, 1, dtype=torch.long), torch.tensor([[9], [3]]))
    assert list(step.flat_indices(1, step.spans[1])) == [1]


def test_values_as_they_are_flattened_and_neither() -> None:
    layout = PaddedBatch([range(2), range(3)], 3)
    value = torch.arange(24.0).reshape(2, 3, 4)
    for seen in (value, value.reshape(6, 4)):
        flat = layout.flat(seen)
        assert flat is not None
        assert flat.tolist() == value.reshape(6, 4).tolist()
    assert layout.flat(torch.ones(1, 3, 4)) is None
    assert layout.flat(torch.ones(())) is None
