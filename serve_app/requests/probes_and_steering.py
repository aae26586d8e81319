"""Resolves the probes and steering vectors that a request names.

Saved probes are read only from folders on this replica's machine that the configuration allows. They are safetensors and
JSON files, so reading one runs no code. Everything is checked here, before anything is queued: the probe belongs to the
served model and revision, its hook point exists, widths agree, and numbers are finite in the model's dtype.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from roentgen.contract import LAYER_HOOK_POINTS, MODEL_HOOK_POINTS, ActivationRequest, Positions, split_key
from roentgen.linear_probe import CARDS, LinearProbe, SavedProbe, SavedProbeError, load_probe
from serve_app.capture.probe_scores import RequestProbe
from serve_app.capture.steering import SteeringVector
from serve_app.capture.structure import CaptureRequestError, Tap
from serve_app.engines.markers import THINK_END, THINK_START
from serve_app.engines.probe_stopping import Acted, Stopping, StopRule
from serve_app.engines.served_model import ServedModel
from serve_app.openai_api.errors import refused
from serve_app.openai_api.probe_params import InlineProbe, NamedProbe, SteeringRequest

AskedProbe = str | NamedProbe | InlineProbe

WIDE = tuple(name for name in (*LAYER_HOOK_POINTS, *MODEL_HOOK_POINTS) if name != "router")
"""Hook points whose rows have the residual stream's width."""


def resolve_probes(model: ServedModel, asked: Sequence[AskedProbe], folders: Sequence[str]) -> tuple[RequestProbe, ...]:
    """Resolve the probes of a request.

    Raises:
        ApiError: if a probe cannot be used; it names the probe and the reason.
    """
    return tuple(_scorer(model, probe, f"probes.{place}", folders) for place, probe in enumerate(asked))


def rules_of(asked: Sequence[AskedProbe]) -> list[tuple[StopRule, str]]:
    """Return the stop rules of a request's probes, each with the name of its field."""
    named = ((place, probe) for place, probe in enumerate(asked) if not isinstance(probe, str))
    return [
        (StopRule(place, probe.stop_when), f"probes.{place}.stop_when")
        for place, probe in named
        if probe.stop_when is not None
    ]


def resolve_stopping(
    model: ServedModel, rules: Sequence[tuple[StopRule, str]], scorers: Sequence[RequestProbe], min_tokens: int
) -> Stopping | None:
    """Check the stop rules of a request, and return them for the engine; None if there are none.

    Args:
        model: the model.
        rules: the rules, each with the name of its field.
        scorers: the probes.
        min_tokens: number of tokens to generate before a rule may act.

    Raises:
        ApiError: if a rule is not possible; it names the rule's field.
    """
    for rule, param in rules:
        scorer = scorers[rule.probe]
        if (outputs := len(scorer.linear_probe.bias)) > 1:
            raise refused(param, f"{scorer.name} has {outputs} outputs; allowed are probes with one output")
        if rule.when.counts == "reasoning" and model.reasoning_tokens is None:
            raise refused(
                f"{param}.{'then' if rule.when.then == 'close_reasoning' else 'where'}",
                f"{model.source.name} does not mark its reasoning (its vocabulary has no tokens {THINK_START} and "
                f"{THINK_END}); "
                'allowed is where: "generated" with then: "stop"',
            )
    if not rules:
        return None
    needed = any(rule.when.counts == "reasoning" for rule, _ in rules)
    return Stopping(tuple(rule for rule, _ in rules), model.reasoning_tokens if needed else None, min_tokens)


def stopping_label(asked: Sequence[AskedProbe], scorers: Sequence[RequestProbe], acted: Sequence[Acted]) -> str:
    """Format a rollout's stop rules, and where they acted, as JSON; an inline probe is named by a hash of its numbers."""
    entries: list[dict[str, Any]] = []
    for rule, _ in rules_of(asked):
        probe, scorer = asked[rule.probe], scorers[rule.probe]
        done = next((one for one in acted if one.probe == rule.probe), None)
        source: dict[str, Any] = {"probe": scorer.name}
        if isinstance(probe, InlineProbe):
            numbers = probe.model_dump_json(exclude={"name", "stop_when"})
            source["numbers"] = hashlib.sha256(numbers.encode()).hexdigest()[:16]
        when = {**rule.when.model_dump(), "where": rule.when.counts}
        where = {"position": done and done.position, "score": done and done.score}
        entries.append({**source, "key": scorer.key, **when, **where})
    return json.dumps(entries)


def resolve_steering(
    model: ServedModel, asked: Sequence[SteeringRequest], folders: Sequence[str]
) -> tuple[SteeringVector, ...]:
    """Resolve the steering vectors of a request.

    Raises:
        ApiError: if a vector cannot be added; it names the vector and the reason.
    """
    return tuple(_steering_vector(model, one, f"steering.{place}", folders) for place, one in enumerate(asked))


def steering_label(asked: Sequence[SteeringRequest], steering_vectors: Sequence[SteeringVector]) -> str:
    """Format a rollout's steering as JSON; an inline vector is named by a hash of its numbers."""
    entries: list[dict[str, Any]] = []
    for one, steering_vector in zip(asked, steering_vectors, strict=True):
        if one.probe is not None:
            source = {"probe": one.probe} | ({} if one.output is None else {"output": one.output})
        else:
            source = {"vector": hashlib.sha256(json.dumps(one.vector).encode()).hexdigest()[:16]}
        entries.append({**source, "key": steering_vector.key, "scale": one.scale, "positions": one.positions})
    return json.dumps(entries)


def saved_scorer(model: ServedModel, name: str, probe: SavedProbe, param: str) -> RequestProbe:
    """Return a scorer for a saved probe, which must be of this model (`check_probe`).

    Raises:
        ApiError: if the model lacks the probe's hook point.
    """
    card = probe.card
    return RequestProbe(
        name, card.key, _tap(model, card.key, param), _on(model, probe), card.label, card.classes, card.unit
    )


def _scorer(model: ServedModel, asked: AskedProbe, param: str, folders: Sequence[str]) -> RequestProbe:
    if isinstance(asked, NamedProbe):
        return saved_scorer(model, asked.probe, _saved(model, asked.probe, f"{param}.probe", folders), f"{param}.probe")
    if isinstance(asked, str):
        return saved_scorer(model, asked, _saved(model, asked, param, folders), param)
    weight = torch.tensor([asked.weight])
    width = weight.shape[1]
    mean = torch.tensor(asked.mean) if asked.mean is not None else torch.zeros(width)
    scale = torch.tensor(asked.scale) if asked.scale is not None else torch.ones(width)
    tap = _tap(model, asked.key, f"{param}.key")
    _check_width(model, asked.key, width, f"{param}.weight")
    return RequestProbe(
        asked.name, asked.key, tap, LinearProbe(weight, torch.tensor([asked.bias]), mean, scale).to(model.device), ""
    )


def _steering_vector(model: ServedModel, asked: SteeringRequest, param: str, folders: Sequence[str]) -> SteeringVector:
    probe = None if asked.probe is None else _saved(model, asked.probe, f"{param}.probe", folders)
    return make_steering_vector(model, asked, probe, param)


def make_steering_vector(
    model: ServedModel, asked: SteeringRequest, probe: SavedProbe | None, param: str
) -> SteeringVector:
    """Resolve one steering request to a vector for the engine.

    Args:
        model: the model.
        asked: the vector or probe, and where to add it.
        probe: the saved probe that the request names, which must be of this model; None if the request has a vector.
        param: the field that errors name.

    Raises:
        ApiError: if a field does not fit the model.
    """
    hook_point, layer, direction = asked.hook_point, asked.layer, None
    if probe is not None:
        hook, own_layer = split_key(probe.card.key)
        hook_point = hook_point or hook
        layer = own_layer if layer is None else layer
        direction = _direction(probe, asked, f"{param}.output")
    else:
        direction = torch.tensor(asked.vector, dtype=torch.float64)
    hook_point = hook_point or "resid_post"
    if hook_point not in WIDE:
        raise refused(f"{param}.hook_point", f"{hook_point!r} cannot be steered; allowed are {', '.join(WIDE)}")
    if hook_point in LAYER_HOOK_POINTS and layer is None:
        raise refused(f"{param}.layer", f"required, because every layer has {hook_point}")
    ((key, tap),) = _resolved(model, hook_point, layer, param).items()
    _check_width(model, key, len(direction), f"{param}.{'vector' if asked.probe is None else 'probe'}")
    vector = asked.scale * direction
    if not vector.to(model.dtype).isfinite().all():
        raise refused(f"{param}.scale", f"the scaled vector overflows {str(model.dtype).removeprefix('torch.')}")
    return SteeringVector(key, tap, vector.to(model.device, torch.float32), Positions.parse(asked.positions))


def _direction(probe: SavedProbe, asked: SteeringRequest, param: str) -> Float[Tensor, "d"]:
    outputs = len(probe.weight)
    if asked.output is None and outputs > 1:
        names = ", ".join(f"{i} ({name})" for i, name in enumerate(probe.card.classes))
        raise refused(param, f"required: {asked.probe} has {outputs} directions, {names or f'0–{outputs - 1}'}")
    output = asked.output or 0
    if output >= outputs:
        raise refused(param, f"{output} is out of range; {asked.probe} has outputs 0–{outputs - 1}")
    return probe.direction[output].double()


def _saved(model: ServedModel, asked: str, param: str, folders: Sequence[str]) -> SavedProbe:
    """Load a saved probe and check that it is of this model."""
    if not folders:
        raise refused(
            param,
            "this server has no folder of saved probes; start it with --probes FOLDER, or send the probe's numbers",
        )
    inside, _, name = asked.rpartition("/")
    folder = next((found for base in folders if (found := _inside(Path(base), inside)) is not None), None)
    if folder is None:
        raise refused(param, f"no probe {asked!r} in {', '.join(folders)}; name it as FOLDER/NAME", "probe_not_found")
    try:
        probe = _load(folder, name, (folder / CARDS).stat().st_mtime_ns)
    except (SavedProbeError, OSError) as error:
        raise refused(param, str(error), "probe_not_found") from error
    check_probe(model, asked, probe, param)
    return probe


def check_probe(model: ServedModel, asked: str, probe: SavedProbe, param: str) -> None:
    """Refuse a probe of another model or revision.

    Raises:
        ApiError: if the model, the revision or the width differs.
    """
    card, source = probe.card, model.source
    for what, its, served in (("model", card.model, source.name), ("revision", card.revision, source.revision)):
        if its != served:
            raise refused(
                param, f"{asked} belongs to {what} {its!r}; this server has {served!r}", "probe_of_another_model"
            )
    _check_width(model, card.key, len(probe.mean), param)


def _inside(base: Path, folder: str) -> Path | None:
    """Return a folder of probes; None if it does not exist or, with links resolved, is not inside the base."""
    try:
        found = (base / folder).resolve()
        return found if found.is_relative_to(base.resolve()) and (found / CARDS).is_file() else None
    except OSError:  # the name is too long
        return None


@lru_cache(maxsize=128)
def _load(folder: Path, name: str, modified: int) -> SavedProbe:
    """Load a probe once; requests with the same object are scored together."""
    probe = load_probe(folder, name)
    if not all(part.isfinite().all() for part in (probe.weight, probe.bias, probe.mean, probe.scale)):
        raise SavedProbeError(f"{folder} is damaged: {name} contains non-finite numbers")
    return probe


@lru_cache(maxsize=128)
def _moved(probe: SavedProbe, device: torch.device) -> LinearProbe:
    return probe.to(device)


def _on(model: ServedModel, probe: SavedProbe) -> LinearProbe:
    return _moved(probe, model.device)


def _tap(model: ServedModel, key: str, param: str) -> Tap:
    """Return the tap of a stored key."""
    hook_point, layer = split_key(key)
    taps = _resolved(model, hook_point, layer, param)
    if key not in taps:
        raise refused(param, f"{key!r}: {model.source.name} stores it as {next(iter(taps))!r}; use that name")
    return taps[key]


def _resolved(model: ServedModel, hook_point: str, layer: int | None, param: str) -> dict[str, Tap]:
    try:
        asked = ActivationRequest(layers=(0 if layer is None else layer,), hook_points=(hook_point,))
        return model.structure.resolve(asked)
    except CaptureRequestError as error:
        raise refused(param, str(error).removeprefix(f"{error.param}: ")) from error


def _check_width(model: ServedModel, key: str, width: int, param: str) -> None:
    """Check the width where it is known in advance: canonical hook points have the residual stream's width."""
    d_model = model.structure.d_model
    if split_key(key)[0] in WIDE and width != d_model:
        raise refused(param, f"has width {width}; {key} of {model.source.name} has width {d_model}")
