"""Takes a token in place of the one that vLLM would choose, where the scores of a request's probes ask for it.

Scores are in the worker between a forward and the choice of the next tokens. What they ask for is done there: a token that ends
the request has vLLM itself end it, and the marker that closes a model's reasoning is fed to the model as any chosen token is.
So nothing is generated that would have to be taken back, and no other request is touched. The replica learns of it by the
token's log-probability, which is no token's: a number from 1 on, which says which rule has acted.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from serve_app.engines.probe_stopping import Action, Stopping, StopRule
from serve_app.engines.vllm.worker_messages import CaptureRequest


@dataclass(frozen=True)
class Forced:
    """A token that is not chosen."""

    token: int | None
    """It; None to leave the chosen one, which the replica throws away."""
    mark: float
    """What stands for its log-probability."""


def forced_by(action: Action, request: CaptureRequest) -> Forced:
    """Return the token that an action puts in place of the next one."""
    stopping = request.stopping
    assert stopping is not None
    token = request.end
    if action.rule.when.then == "close_reasoning":
        assert stopping.reasoning is not None
        token = stopping.reasoning.end
    return Forced(token, 1.0 + stopping.rules.index(action.rule))


def acting_rule(stopping: Stopping | None, logprob: float) -> StopRule | None:
    """Return the rule that has put a token there, by the token's log-probability; None if it was chosen."""
    if stopping is None or math.isnan(logprob) or logprob < 1:
        return None
    return stopping.rules[round(logprob) - 1]


class ForcesTokens:
    """Mixed into vLLM's model runner, which has the batch whose scores act."""

    batch: Any
    input_batch: Any

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        forced = self.batch.forced(self.input_batch.req_ids)
        if not forced:
            return super()._sample(*args, **kwargs)  # type: ignore[misc]
        # A token that is not chosen takes no number of its request's random stream.
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
