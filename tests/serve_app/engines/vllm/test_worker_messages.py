"""Messages to vLLM's workers arrive unchanged."""

import pytest
import torch

from roentgen.linear_probe import LinearProbe
from serve_app.capture.probe_scores import NewScores, RequestProbe
from serve_app.capture.structure import Tap
from serve_app.engines.vllm.worker_messages import CaptureRequest, pack, unpack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_tensors_arrive_as_they_were(dtype: torch.dtype) -> None:
    """Also views and non-contiguous tensors; received tensors are writable."""
    whole = (torch.arange(24).reshape(4, 6) - 3).to(dtype)
    for sent in (whole, whole[1:3], whole[:, ::2], whole.mT, whole[:0]):
        new = unpack(pack(NewScores(sent, None)), NewScores).scores
        assert new is not None
        assert new.dtype == dtype
        assert torch.equal(new, sent)
        new += 1
        assert torch.equal(new, sent + 1)


def test_an_order_with_probes_is_little_more_than_their_numbers() -> None:
    width, tap = 576, Tap("model.layers.0", "output")
    linear_probes = [
        LinearProbe(torch.randn(1, width), torch.zeros(1), torch.zeros(width), torch.ones(width)) for _ in range(8)
    ]
    probes = tuple(RequestProbe(str(i), "layers.0.resid_post", tap, one, "") for i, one in enumerate(linear_probes))
    sent = pack(CaptureRequest("job", None, (), probes))
    assert len(sent) < 1.1 * sum(4 * (3 * width + 1) for _ in probes)
    for one, other in zip(unpack(sent, CaptureRequest).probes, probes, strict=True):
        assert torch.equal(one.linear_probe.weight, other.linear_probe.weight)
