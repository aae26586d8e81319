"""From a loaded model to a report: run the mix, close the engine, run each rollout alone, compare."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from roentgen.contract import ActivationRequest, Layers, split_key
from serve_app.capture.structure import ModelStructure, Tap
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.verification.batch_run import run_requests
from serve_app.verification.comparison import CaptureComparison
from serve_app.verification.mix import (
    BUILT_IN_PROMPTS,
    LENGTHS,
    REQUESTS,
    SCOUTED,
    make_requests,
    tokenized,
)
from serve_app.verification.reference import continuation, run_alone, stock_attention
from serve_app.verification.verification_report import VerificationReport


def verify_capture(
    model: LoadedModel,
    *,
    taps: dict[str, Tap] | None = None,
    prompts: Sequence[str] = BUILT_IN_PROMPTS,
    count: int = REQUESTS,
    unquantized: Callable[[], PreTrainedModel] | None = None,
) -> VerificationReport:
    """Capture in a running batch, recompute alone, compare.

    Args:
        model: the model; nothing else may run it meanwhile.
        taps: per stored key, where to read; every canonical hook point that the model has if None.
        prompts: texts to complete. One that leaves no room in the context is cut.
        count: how many requests to run.
        unquantized: loads the model with plain weights, which the report says the difference from; None if it has none else.

    Returns:
        The report; `VerificationReport.ok` is the verdict.
    """
    taps = model.structure.taps if taps is None else taps
    tokens = tokenized(model, prompts)
    with stock_attention(model):
        scouted = continuation(model, tokens[SCOUTED % len(tokens)], max_tokens=LENGTHS[SCOUTED])
    outcomes, together = run_requests(model, make_requests(model, taps, tokens, count, scouted))
    comparison = CaptureComparison(model, taps, together)
    plain = unquantized() if unquantized is not None else None
    with stock_attention(model):
        for outcome in outcomes:
            if outcome.finished is None:
                comparison.add(outcome, None)
                continue
            alone = run_alone(model.observed._module, outcome.request, outcome.finished)
            comparison.add(outcome, alone)
            if plain is not None:
                comparison.add_unquantized(outcome, alone, run_alone(plain, outcome.request, outcome.finished))
    return comparison.report()


def taps_to_verify(structure: ModelStructure, layers: Layers, hook_points: tuple[str, ...]) -> dict[str, Tap]:
    """Return where to read.

    Args:
        structure: of the model.
        layers: which layers, or "all".
        hook_points: canonical names or module paths; with none, every canonical hook point that the model has.

    Raises:
        CaptureRequestError: naming what the model does not have.
    """
    if hook_points:
        return structure.resolve(ActivationRequest(layers=layers, hook_points=hook_points))
    chosen = structure.resolve(ActivationRequest(layers=layers, hook_points=("resid_post",)))
    wanted = {split_key(key)[1] for key in chosen} | {None}
    return {key: tap for key, tap in structure.taps.items() if split_key(key)[1] in wanted}
