"""Compares the engine's captured rows and chosen tokens with a single-request forward pass over the same tokens.

The limits depend on the dtype. In float32, no row's relative error may exceed 1e-4. In half precision, the mean cosine of a
hook point's rows at a layer must be at least 0.999, and every row's at least 0.99. Batching changes the order of sums and so
the last digits, so a greedy choice between two almost equally likely tokens may differ. Every such divergence is reported with
the margin between the two logits; a margin larger than rounding can explain is a bug and fails the verification. So does a
missing or additional row.
"""

import math
from collections import defaultdict

import torch
from jaxtyping import Float
from torch import Tensor

from roentgen.contract import split_key
from serve_app.capture.rows import CapturedRows
from serve_app.capture.structure import Tap
from serve_app.engines.protocol import Finished
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.verification.batch_run import RequestOutcome
from serve_app.verification.mix import MixRequest
from serve_app.verification.reference import LoneRun
from serve_app.verification.verification_report import (
    MAX_ERROR,
    MEAN_COSINE,
    MIN_COSINE,
    Deviation,
    Divergence,
    QuantizationEffect,
    VerificationReport,
    VerifiedRollout,
)

LOGIT_ROUNDING = {torch.float32: 32, torch.float16: 2, torch.bfloat16: 2}
"""Maximum effect of rounding on a log-probability, in machine epsilons of the dtype times the logits' scale. Measured with
SmolLM2-135M: 7 in float32, where sums are rounded too; 0.3 in bfloat16, whose sums are in float32."""


RowErrors = tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]
"""Each row's error relative to its norm, and its cosine with the expected row."""


class CaptureComparison:
    """Compares rollouts one by one, and builds the report."""

    def __init__(self, model: LoadedModel, taps: dict[str, Tap], together: int) -> None:
        """Start a comparison.

        Args:
            model: the model to verify.
            taps: the captured hook points; a key without any compared row is a problem.
            together: maximum number of requests that ran at the same time.
        """
        self._model = model
        self._together = together
        self._rows: dict[str, list[RowErrors]] = {key: [] for key in taps}
        self._unquantized_rows: dict[str, list[RowErrors]] = defaultdict(list)
        self._probabilities: list[tuple[Tensor, Tensor]] = []
        self._rollouts: list[VerifiedRollout] = []
        self._divergences: list[Divergence] = []
        self._max_logprob_error = 0.0
        self._problems: list[str] = []

    def add(self, outcome: RequestOutcome, alone: LoneRun | None) -> None:
        """Add one request's outcome and, if it finished, its single-request run."""
        request, finished = outcome.request, outcome.finished
        cancelled = request.kind == "cancelled"
        self._rollouts.append(self._rollout(outcome))
        if outcome.error is not None:
            self._problem(request, f"failed: {outcome.error}")
        if finished is None or alone is None:
            return
        if cancelled:
            self._problem(request, "was cancelled, but finished anyway")
        self._check_ending(request, finished)
        self._check_scores(request, finished, alone)
        if request.plan is not None and finished.captured is None:
            self._problem(request, "requested a capture and got none")
        elif finished.captured is not None:
            self._check_rows(request, finished.captured, alone)

    def add_unquantized(self, outcome: RequestOutcome, alone: LoneRun, plain: LoneRun) -> None:
        """Add the single-request runs of a finished outcome with quantized and with plain weights."""
        captured = outcome.finished.captured if outcome.finished is not None else None
        if captured is not None and captured.position.tolist() == plain.positions:
            for key, rows in captured.tensors.items():
                if key in plain.rows and len(rows):
                    self._unquantized_rows[key].append(row_errors(rows, plain.rows[key]))
        self._probabilities.append((alone.logits.log_softmax(1), plain.logits.log_softmax(1)))

    def report(self) -> VerificationReport:
        """Return the report with the verdict."""
        deviations = tuple(_deviation(key, found) for key, found in self._rows.items() if found)
        problems = list(self._problems)
        problems += [f"{key}: no row was compared" for key, found in self._rows.items() if not found]
        for d in deviations:
            if self._model.dtype == torch.float32 and not d.max_error <= MAX_ERROR:
                problems.append(f"{d.key}: a row's relative error is {d.max_error:.1e}, more than {MAX_ERROR:.0e}")
            elif self._model.dtype != torch.float32 and not d.mean_cosine >= MEAN_COSINE:
                problems.append(f"{d.key}: the rows' mean cosine is {d.mean_cosine:.5f}, less than {MEAN_COSINE}")
            elif self._model.dtype != torch.float32 and not d.min_cosine >= MIN_COSINE:
                problems.append(f"{d.key}: a row's cosine is {d.min_cosine:.4f}, less than {MIN_COSINE}")
        if self._together < 2:
            problems.append("no two requests ran at the same time, so nothing was batched")
        return VerificationReport(
            model=self._model.source.name,
            revision=self._model.source.revision,
            dtype=str(self._model.dtype).removeprefix("torch."),
            device=str(self._model.device),
            together=self._together,
            rollouts=tuple(self._rollouts),
            deviations=deviations,
            divergences=tuple(self._divergences),
            max_logprob_error=self._max_logprob_error,
            problems=tuple(problems),
            quantization=self._effect(),
        )

    def _effect(self) -> QuantizationEffect | None:
        """Return the effect of quantizing the weights, if it was compared."""
        if self._model.quantization is None or not self._probabilities:
            return None
        here, there = (torch.cat(found) for found in zip(*self._probabilities, strict=True))
        return QuantizationEffect(
            method=self._model.quantization,
            deviations=tuple(_deviation(key, found) for key, found in self._unquantized_rows.items()),
            positions=len(here),
            other_choices=int((here.argmax(1) != there.argmax(1)).sum()),
            mean_divergence=float((there.exp() * (there - here)).sum(1).mean()),
        )

    def _problem(self, request: MixRequest, text: str) -> None:
        self._problems.append(f"request {request.number} ({request.kind}): {text}")

    def _check_ending(self, request: MixRequest, finished: Finished) -> None:
        """Check that a request ended at the right token, for the reason that it reports."""
        n, limit = len(finished.token_ids), request.sampling.max_tokens
        stop_token_ids = self._model.eos_token_ids | request.sampling.stop_token_ids
        if any(token in stop_token_ids for token in finished.token_ids[:-1]):
            self._problem(request, f"continued after a stop token: {finished.token_ids}")
        if n > limit or (finished.finish_reason == "length" and n != limit):
            self._problem(request, f"has {n} tokens and finish_reason {finished.finish_reason}; the limit was {limit}")
        if (self._stopped_by(request, finished) is None) == (finished.finish_reason == "stop"):
            self._problem(request, f"has finish_reason {finished.finish_reason}, which does not match its tokens")
        if any(stop in finished.text for stop in request.sampling.stop):
            self._problem(request, f"contains its stop string: {finished.text!r}")

    def _stopped_by(self, request: MixRequest, finished: Finished) -> str | None:
        """Return what stopped a request, judged by its tokens; None if nothing did."""
        last = set(finished.token_ids[-1:])
        if last & self._model.eos_token_ids:
            return "end of text"
        if last & request.sampling.stop_token_ids:
            return "stop token"
        text = self._model.tokenizer.decode(finished.token_ids)
        return "stop string" if any(stop in text for stop in request.sampling.stop) else None

    def _check_scores(self, request: MixRequest, finished: Finished, alone: LoneRun) -> None:
        """Compare log-probabilities, and each greedy choice with the most likely token."""
        tokens, scores = finished.token_ids, finished.scores
        if request.score_prompt:
            tokens, scores = request.prompt_ids[1:] + tokens, (finished.prompt_scores or []) + scores
        if not len(tokens) == len(scores) <= len(alone.logits):
            self._problem(request, f"has {len(scores)} scores for {len(tokens)} tokens")
            return
        logits = alone.logits[: len(tokens)]
        logprobs = logits.log_softmax(1)
        scale = logits.abs().amax(1) + math.log(logits.shape[1])
        rounding = LOGIT_ROUNDING[self._model.dtype] * torch.finfo(self._model.dtype).eps * scale
        first = len(tokens) - len(finished.token_ids)
        for i, (token, score) in enumerate(zip(tokens, scores, strict=True)):
            error, best = abs(score.logprob - float(logprobs[i, token])), int(logits[i].argmax())
            self._max_logprob_error = max(self._max_logprob_error, error)
            if not error <= rounding[i]:
                self._problem(
                    request, f"logprob {i - first} is off by {error:.1e}; rounding explains {rounding[i]:.1e}"
                )
            if i < first or request.sampling.temperature > 0 or token == best:
                continue
            margin = float(logits[i, best] - logits[i, token])
            found = Divergence(request.number, i - first, token, best, margin, float(rounding[i]))
            self._divergences.append(found)
            if not margin <= found.rounding:
                self._problem(
                    request, f"greedy token {found.index} is not the most likely one by a margin of {margin:.1e}"
                )

    def _check_rows(self, request: MixRequest, captured: CapturedRows, alone: LoneRun) -> None:
        """Compare the captured rows, after checking their positions, keys and shapes."""
        if captured.position.tolist() != alone.positions:
            self._problem(request, f"has rows of positions {captured.position.tolist()} instead of {alone.positions}")
            return
        if set(captured.tensors) != set(alone.rows):
            self._problem(request, f"has rows of {sorted(captured.tensors)} instead of {sorted(alone.rows)}")
            return
        for key, rows in captured.tensors.items():
            if rows.shape != alone.rows[key].shape:
                shapes = f"{tuple(rows.shape)}, not {tuple(alone.rows[key].shape)}"
                self._problem(request, f"the shape of {key} is {shapes}")
            elif len(rows):
                self._rows[key].append(row_errors(rows, alone.rows[key]))

    def _rollout(self, outcome: RequestOutcome) -> VerifiedRollout:
        request, finished, plan = outcome.request, outcome.finished, outcome.request.plan
        if finished is None:
            ended = "error" if outcome.error else "cancelled"
        else:
            ended = self._stopped_by(request, finished) or finished.finish_reason
        return VerifiedRollout(
            request=request.number,
            kind=request.kind,
            sampling="greedy" if request.sampling.temperature == 0 else f"seed {request.sampling.seed}",
            positions=str(plan.positions) if plan else "",
            keys=len(plan.taps) if plan else 0,
            n_prompt=len(request.prompt_ids),
            n_completion=len(finished.token_ids) if finished else 0,
            ended=ended,
        )


def _deviation(key: str, found: list[RowErrors]) -> Deviation:
    errors, cosines = (torch.cat(parts) for parts in zip(*found, strict=True))
    hook_point, layer = split_key(key)
    return Deviation(
        key=key,
        hook_point=hook_point,
        layer=layer,
        rows=len(errors),
        max_error=float(errors.max()),
        mean_error=float(errors.mean()),
        mean_cosine=float(cosines.mean()),
        min_cosine=float(cosines.min()),
    )


def row_errors(rows: Float[Tensor, "rows ..."], expected: Float[Tensor, "rows ..."]) -> RowErrors:
    """Return each row's error relative to the expected row's norm, and its cosine with the expected row.

    If the expected row is zero, the error is 0 and the cosine 1 if the row is zero too, else infinite and 0.
    """
    got, want = rows.flatten(1).double(), expected.flatten(1).double()
    difference, norm = (got - want).norm(dim=1), want.norm(dim=1)
    errors = torch.where(difference == 0, 0.0, difference / norm)
    cosines = torch.where(difference == 0, 1.0, (got * want).sum(1) / (got.norm(dim=1) * norm).clamp_min(1e-300))
    return errors, cosines
