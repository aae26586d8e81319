"""Forces a token in place of the sampled one, where the scores of a request's probes require it.

A worker has the scores between a forward and the choice of the next tokens, so it applies their actions there. A stop token
makes vLLM itself end the request, and the marker that closes a model's reasoning is fed to the model like a sampled token. So
nothing is generated that would have to be undone, and other requests are not affected. The replica recognizes a forced token
by its log-probability: it is 1 or more, which no sampled token has, and encodes the rule that acted.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from serve_app.engines.probe_stopping import Action, Stopping, StopRule
from serve_app.engines.vllm.worker_messages import CaptureRequest


@dataclass(frozen=True)
class Forced:
    """A token that is forced and not sampled."""

    token: int | None
    """The token; None to keep the sampled one, which the replica discards."""
    mark: float
    """Number in place of its log-probability."""


def forced_by(action: Action, request: CaptureRequest) -> Forced:
    """Return the forced token of an action."""
    stopping = request.stopping
    assert stopping is not None
    token = request.end
    if action.rule.when.then == "close_reasoning":
        assert stopping.reasoning is not None
        token = stopping.reasoning.end
    return Forced(token, 1.0 + stopping.rules.index(action.rule))


def acting_rule(stopping: Stopping | None, logprob: float) -> StopRule | None:
    """Return the rule that forced a token, given the token's log-probability; None if the token was sampled."""
    if stopping is None or math.isnan(logprob) or logprob < 1:
        return None
    return stopping.rules[round(logprob) - 1]


class ForcesTokens:
    """Mixin for vLLM's model runner: applies the actions of the batch's probe scores."""

    batch: Any
    input_batch: Any

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        forced = self.batch.forced(self.input_batch.req_ids)
        if not forced:
            return super()._sample(*args, **kwargs)  # type: ignore[misc]
        # A forced token consumes no number of its request's random stream.
        generators = self.input_batch.sampling_metadata.generators
        resting = {row: generators.pop(row) for row in forced if row in generators}
        try:
            output = super()._sample(*args, **kwargs)  # type: ignore[misc]
        finally:
            generators.update(resting)
        device = output.sampled_token_ids.device
        rows = torch.tensor(list(forced), device=device)
        chosen = output.sampled_token_ids[rows, 0].tolist()
        tokens = [own if one.token is None else one.token for one, own in zip(forced.values(), chosen, strict=True)]
        output.sampled_token_ids[rows, 0] = torch.tensor(tokens, device=device, dtype=output.sampled_token_ids.dtype)
        logprobs = output.logprobs_tensors
        logprobs.logprob_token_ids[rows, 0] = torch.tensor(
            tokens, device=device, dtype=logprobs.logprob_token_ids.dtype
        )
        marks = torch.tensor([one.mark for one in forced.values()], device=device, dtype=logprobs.logprobs.dtype)
        logprobs.logprobs[rows] = marks[:, None]
        return output
