"""The reference computation: one sequence alone through the bare model, read by plain PyTorch hooks.

It uses no batch, padding, KV cache or nnsight trace, transformers' own attention, and plain weights where the engine has packed
or int8 ones (these compute only in inference mode). It has its own rule for positions, which decides one position at a time,
unlike `Positions.select`.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from roentgen.contract import Positions
from serve_app.capture.rows import CapturePlan
from serve_app.capture.structure import Tap
from serve_app.engines.protocol import Finished
from serve_app.engines.transformers.loaded_model import LoadedModel
from serve_app.verification.mix import MixRequest

OWN_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention implementations of transformers."""


@dataclass(frozen=True)
class LoneRun:
    """The results of a rollout that runs alone."""

    rows: dict[str, Float[Tensor, "rows ..."]]
    """Rows at the plan's positions, by stored key, `[rows, ...]`."""
    positions: list[int]
    """Positions of these rows; -1 for a pooled one."""
    logits: Float[Tensor, "positions vocab"]
    """Logits at the last positions: those that predict the completion's tokens or, if the prompt is scored, all,
    `[positions, vocab]`."""


@contextmanager
def stock_attention(model: LoadedModel) -> Iterator[None]:
    """Use transformers' own attention within a context, if the engine has replaced it."""
    module = model.observed._module
    engines: str = module.config._attn_implementation
    if engines in OWN_ATTENTION:
        yield
        return
    module.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        module.set_attn_implementation(engines)


def continuation(model: LoadedModel, prompt_ids: list[int], max_tokens: int) -> list[int]:
    """Complete a prompt greedily with transformers' own generate."""
    tokens = torch.tensor([prompt_ids], device=model.device)
    with torch.no_grad():
        output = model.observed._module.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=max_tokens
        )
    ids: list[int] = output[0, len(prompt_ids) :].tolist()
    return ids


def run_alone(module: PreTrainedModel, request: MixRequest, finished: Finished) -> LoneRun:
    """Run a finished rollout's tokens again as one sequence, and return the rows that its request captured."""
    plan, n_completion = request.plan, len(finished.token_ids)
    fed = request.prompt_ids + finished.token_ids[:-1]  # the last token was sampled, but never fed to the model
    scored = len(fed) if request.score_prompt else n_completion  # number of last positions whose logits are compared
    with torch.no_grad(), _hooked(module, plan.taps if plan else {}, len(fed)) as seen:
        output = module(input_ids=torch.tensor([fed], device=module.device), use_cache=False)
    logits = output.logits[0, len(fed) - scored :].float().cpu()
    if plan is None:
        return LoneRun({}, [], logits)
    positions = kept_positions(plan, len(request.prompt_ids), len(fed))
    rows = {key: value[positions].cpu() for key, value in seen.items()}
    if plan.positions.policy in ("mean_prompt", "mean_generated") and positions:
        rows = {key: value.float().mean(0, keepdim=True).to(value.dtype) for key, value in rows.items()}
        positions = [-1]
    return LoneRun(rows, positions, logits)


def kept_positions(plan: CapturePlan, n_prompt: int, n_rows: int) -> list[int]:
    """Return the positions of a rollout that a plan captures, or averages if its policy is pooled.

    Args:
        plan: the plan.
        n_prompt: number of tokens in the job's prompt; the plan may set another number.
        n_rows: number of tokens that were fed to the model.
    """
    n_prompt = n_prompt if plan.n_prompt is None else plan.n_prompt
    n_rows = n_rows if plan.stop is None else min(n_rows, plan.stop)
    return [t for t in range(plan.first, n_rows) if _is_kept(plan.positions, t, n_prompt, n_rows)]


def _is_kept(positions: Positions, t: int, n_prompt: int, n_rows: int) -> bool:
    match positions.policy:
        case "all":
            return True
        case "prompt" | "mean_prompt":
            return t < n_prompt
        case "generated" | "mean_generated":
            return t >= n_prompt
        case "last_prompt":
            return t + 1 == n_prompt
        case "last":
            return t + 1 == n_rows
        case "stride":
            return t % positions.stride == 0
    raise ValueError(f"positions {positions} are not supported here")


@contextmanager
def _hooked(module: PreTrainedModel, taps: dict[str, Tap], n_rows: int) -> Iterator[dict[str, Tensor]]:
    """Copy each tapped module's input or output during a forward pass of one sequence: key to `[n_rows, ...]`.

    Values without one row per token are left out.
    """
    seen: dict[str, Tensor] = {}
    runs: Counter[str] = Counter()
    handles = []

    def keep(key: str, value: Any, place: int) -> None:
        runs[key] += 1
        if taps[key].run not in (None, runs[key] - 1):
            return
        if place:
            value = value[place]
        while isinstance(value, tuple):
            value = value[0]
        if value.ndim > 1 and value.shape[:2] == (1, n_rows):
            seen[key] = value[0].clone()
        elif len(value) == n_rows:  # a module may flatten batch and tokens
            seen[key] = value.clone()

    for key, tap in taps.items():

        def before(_module: Any, args: Any, kwargs: Any, key: str = key) -> None:
            keep(key, args if args else next(v for v in kwargs.values() if isinstance(v, Tensor)), 0)

        def after(_module: Any, _args: Any, output: Any, key: str = key, place: int = tap.index) -> None:
            keep(key, output, place)

        tapped = module.get_submodule(tap.module)
        handles.append(
            tapped.register_forward_pre_hook(before, with_kwargs=True)
            if tap.side == "input"
            else tapped.register_forward_hook(after)
        )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
