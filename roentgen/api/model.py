"""A model in this process, with the engine, the sources and the capture that the server has: no server, no Ray.

The engine runs on a thread of its own, so a call of `generate` submits and waits. It is stopped by `close`, at the end of a
"with" block, and when nothing refers to the model any more.
"""

import gc
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

import torch
from pydantic import ValidationError

from roentgen.api.request_building import (
    OWN,
    Prompt,
    capture_fields,
    checked,
    in_python,
    named,
    plan,
    prompts_of,
    scorers,
    steering_vectors,
    stop_rules,
)
from roentgen.api.rollout import Rollout
from roentgen.api.steer import Probe, Steer, named_probes
from roentgen.api.text_capture import Readable, read, read_into
from roentgen.argument_names import naming_arguments
from roentgen.contract import (
    LAYER_HOOK_POINTS,
    MODEL_HOOK_POINTS,
    ActivationRequest,
    Device,
    Dtype,
    Quantize,
    StoredDtype,
)
from roentgen.defaults import EMBEDDED_MODEL
from roentgen.store.schema import check_finite
from roentgen.workflows.capture_texts import CaptureReport, Reader
from serve_app.capture.observer import wrapped
from serve_app.config import ServerConfig
from serve_app.engines.job_runner import run_jobs
from serve_app.engines.protocol import EngineStoppedError, Finished
from serve_app.engines.rollout_metadata import make_metadata
from serve_app.engines.storage import rollout_of
from serve_app.engines.transformers.engine import TransformersEngine
from serve_app.engines.transformers.loaded_model import DeviceMap, LoadedModel
from serve_app.engines.transformers.loaded_model import load as load_weights
from serve_app.errors import RequestError
from serve_app.models.model_source import locate
from serve_app.openai_api.errors import ApiError, from_validation
from serve_app.openai_api.probe_params import actions_of
from serve_app.requests.generation import Choice, Runner, compile_grammars
from serve_app.requests.probes_and_steering import resolve_stopping

if TYPE_CHECKING:
    from nnsight.modeling.transformers import TransformersModel

    from serve_app.capture.structure import ModelStructure

log = logging.getLogger(__name__)

ENGINE_OPTIONS = frozenset(
    ("max_batch", "max_queue", "max_prefill_tokens", "max_cache_tokens", "batch_invariant", "prefix_cache")
)
"""Fields of the server's configuration that say how the engine runs."""


@dataclass
class _Resources:
    """What a `Model` lets go of when it is closed."""

    loaded: LoadedModel | None
    engine: TransformersEngine | None
    traced: "TransformersModel | None" = None

    def free(self) -> None:
        """Stop the engine and let go of the weights."""
        engine, self.engine, self.loaded, self.traced = self.engine, None, None, None
        if engine is None:
            return
        engine.close()
        del engine
        gc.collect()  # a wrapped model is a cycle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Model:
    """A model in this process; `load` makes one."""

    def __init__(self, loaded: LoadedModel, config: ServerConfig) -> None:
        engine = TransformersEngine(
            loaded,
            max_batch=config.max_batch,
            max_queue=config.max_queue,
            max_prefill_tokens=config.max_prefill_tokens,
            max_cache_tokens=config.max_cache_tokens,
            batch_invariant=config.batch_invariant,
            prefix_cache=config.prefix_cache,
            eager=config.eager,
            compile_first=config.compile_first,
        )
        self.config = config
        self._held = _Resources(loaded, engine)
        self._finalizer = weakref.finalize(self, self._held.free)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and free the weights; a second time does nothing."""
        self._finalizer()

    def __repr__(self) -> str:
        if self._held.loaded is None:
            return "Model(closed)"
        return f"Model({self.name!r}, {self.dtype}, {self._held.loaded.device})"

    @property
    def name(self) -> str:
        """What it is called in stores and runs."""
        return self._loaded.source.name

    @property
    def revision(self) -> str:
        """Which revision of it was loaded."""
        return self._loaded.source.revision

    @property
    def dtype(self) -> str:
        """What it computes in, such as "bfloat16"."""
        return str(self._loaded.dtype).removeprefix("torch.")

    @property
    def quantization(self) -> str | None:
        """How its weights are quantized: "int8" if `load` did it, or the method that its own configuration names; else None."""
        return self._loaded.quantization

    @property
    def tokenizer(self) -> Any:
        """The model's own tokenizer, of transformers."""
        return self._loaded.tokenizer

    @property
    def structure(self) -> "ModelStructure":
        """Layers, width, and where each hook point is."""
        return self._loaded.structure

    @property
    def hook_points(self) -> tuple[str, ...]:
        """The canonical hook points that the model has, in the order in which it computes them.

        Any module path that ends in `.input` or `.output` is one too.
        """
        missing = self.structure.missing
        return tuple(name for name in (*LAYER_HOOK_POINTS, *MODEL_HOOK_POINTS) if name not in missing)

    @property
    def nnsight(self) -> "TransformersModel":
        """The model as nnsight wraps it, for traces of one's own; its weights are the ones that are loaded.

        A script that changes them finds the change in whatever runs next. So from the first use on there is no prefix cache,
        and on a CPU there are no packed weights; int8 weights that `load` made are plain ones of the same values. Load a
        second model where that is too slow. Do not trace while `generate` or `capture` runs: a trace would see the values of
        their batch. `nnsight.save(x)` keeps a value; `x.save()` is taken off, since it breaks other libraries.
        """
        loaded = self._loaded
        if self._held.traced is None:
            engine = self._held.engine
            assert engine is not None
            engine.expect_changed_weights()
            # Not the engine's own, which leaves it to the engine to make a batch; two may share a model.
            self._held.traced = wrapped(loaded.observed._module, loaded.tokenizer)
        return self._held.traced

    @property
    def _loaded(self) -> LoadedModel:
        if self._held.loaded is None:
            raise EngineStoppedError("the model is closed; load it again")
        return self._held.loaded

    @property
    def _runner(self) -> Runner:
        loaded, engine = self._loaded, self._held.engine
        assert engine is not None
        return Runner(loaded, engine)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
        n: int = 1,
        stop: str | Sequence[str] | None = None,
        capture: Mapping[str, Any] | None = None,
        steering: Steer | Sequence[Steer] = (),
        probes: Probe | Sequence[Probe] | Mapping[str, Probe] = (),
        stop_when: Mapping[str, Mapping[str, Any]] | None = None,
        **params: Any,
    ) -> list[Rollout]:
        """Continue texts and answer conversations, many together, and return a `Rollout` for each, in order.

        Everything asked for is checked before anything runs, by the server's own code and in its words.

        Args:
            prompts: texts to continue, and conversations (lists of `{"role": …, "content": …}`), which the chat template
                renders; one of either, or any number.
            max_tokens: the most to generate for each; 0 only reads a text.
            temperature: of the sampling; 0 takes the most likely token.
            seed: of each prompt's random stream.
            n: how many for each prompt; those of a prompt follow one another.
            stop: strings that end a completion, and are not part of it.
            capture: what to keep, such as `dict(layers=[8, 12], hook_points=["resid_post"], positions="all")`. Layers may be
                "all"; `dtype` and `allow_non_finite` are as in docs/http.md.
            steering: vectors to add, one or several.
            probes: what to score every token with, one or several; a mapping gives them names.
            stop_when: by the name of a probe, when its scores end the generation, `{"above": 2.0, "for": 3}`, or with
                `"then": "close_reasoning"` the model's reasoning (docs/http.md).
            params: the other fields of a request (docs/http.md): top_p, top_k, logit_bias, response_format and so on.

        Raises:
            RequestError: if something asked for cannot be; it names the field, the value and what is allowed.
            SavedProbeError: if there is no probe at a path.
            StoreError: if captured rows hold NaN or infinity, which `allow_non_finite` would keep.
        """
        if own := sorted(params.keys() & OWN):
            raise ApiError(400, f"{own[0]}: generate sets it itself", param=own[0], code="unsupported_parameter")
        runner, asked = self._runner, prompts_of(prompts)
        read_by, added = scorers(runner.model, named_probes(probes)), steering_vectors(runner.model, steering)
        rules = stop_rules(read_by, stop_when or {})
        body = {
            "model": self.name, "max_tokens": max_tokens, "temperature": temperature, "seed": seed, "n": n, "stop": stop,
            **params,
        }  # fmt: skip
        if capture is not None:
            body["activations"] = capture_fields(capture)
        choices: list[tuple[Prompt, Choice]] = []
        for place, prompt in enumerate(asked):
            try:
                planned = plan(runner, self.config, prompt, body)
            except RequestError as error:
                raise in_python(error, place if len(asked) > 1 else None) from error
            for choice in planned:
                stopping = resolve_stopping(runner.model, rules, read_by, choice.sampling.min_tokens)
                choices.append((prompt, replace(choice, probes=read_by, stopping=stopping, steering=added)))
        return _run(runner, choices)

    @overload
    def capture(
        self,
        texts: Iterable[Readable],
        *,
        layers: Any = ...,
        hook_points: Any = ...,
        positions: str = ...,
        dtype: StoredDtype = ...,
        allow_non_finite: bool = ...,
        store: None = ...,
        session: None = ...,
        chunk_size: int | None = ...,
        progress: bool = ...,
    ) -> Iterator[Rollout]: ...
    @overload
    def capture(
        self,
        texts: Iterable[Readable],
        *,
        layers: Any = ...,
        hook_points: Any = ...,
        positions: str = ...,
        dtype: StoredDtype = ...,
        allow_non_finite: bool = ...,
        store: str | Path,
        session: str | None = ...,
        chunk_size: int | None = ...,
        progress: bool = ...,
    ) -> CaptureReport: ...
    @naming_arguments()
    def capture(
        self,
        texts: Iterable[Readable],
        *,
        layers: Any = "all",
        hook_points: Any = ("resid_post",),
        positions: str = "last",
        dtype: StoredDtype = "model",
        allow_non_finite: bool = False,
        store: str | Path | None = None,
        session: str | None = None,
        chunk_size: int | None = None,
        progress: bool = True,
    ) -> Iterator[Rollout] | CaptureReport:
        """Keep what the model holds inside while it reads texts that exist already; nothing is generated.

        Without a store this is an iterator: texts are read as it goes on, some dozens together, and each comes back in its
        place as a `Rollout`. With a store all are read at once into one session, but for those that it has already: run
        again, it continues.

        Args:
            texts: texts, conversations (if the assistant speaks last, that is the completion), or objects as the lines of
                `roentgen capture` (docs/capture.md): `{"prompt": …, "completion": …, "labels": {…}}`.
            layers: layers to keep, or "all"; negative ones count from the end.
            hook_points: hook points to keep.
            positions: all, prompt, generated, last_prompt, last, stride:k, mean_prompt or mean_generated.
            dtype: what to keep rows in; "model" for the model's own, "int8" for a byte a value (docs/store.md).
            allow_non_finite: keep rows with NaN or infinity, which otherwise fail.
            store: the folder of a store, or s3://BUCKET/FOLDER.
            session: the session in it; named after model and capture if absent.
            chunk_size: layers captured per pass, to need less memory; all in one if absent.
            progress: whether a terminal or notebook shows a bar.

        Returns:
            An iterator of rollouts; with a store, a report of what was stored, with the session's address in `session`.

        Raises:
            RequestError: if something asked for cannot be.
            TranscriptError: naming the first that is no text.
            UnreadableTextError: without a store, if the model cannot be given a text, such as one that is too long; with one,
                the report lists it.
            StoreError: if the store cannot be written, or without one, rows hold NaN or infinity.
        """
        fields = {
            "layers": layers, "hook_points": hook_points, "positions": positions, "dtype": dtype,
            "allow_non_finite": allow_non_finite,
        }  # fmt: skip
        if chunk_size is not None and chunk_size < 1:
            raise ApiError(
                400, f"chunk_size: {chunk_size} is none; allowed are whole numbers from 1", param="chunk_size"
            )
        try:
            request = ActivationRequest.model_validate(capture_fields(fields))
        except ValidationError as error:
            wrong = from_validation(error.errors())
            raise ApiError(wrong.status, f"capture.{wrong.message}", param=wrong.param, code=wrong.code) from error
        runner = self._runner
        reader = Reader(self._loaded, runner.engine, request, chunk_size)
        if isinstance(texts, str):
            texts = [texts]
        if store is None:
            return read(texts, reader, progress=progress)
        return read_into(str(store), session, texts, reader, progress=progress)


@naming_arguments()
def load(
    model: str | Path = EMBEDDED_MODEL,
    *,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap | None = None,
    quantize: Quantize = None,
    trust_remote_code: bool = False,
    stage: Callable[[str], None] = log.info,
    **options: Any,
) -> Model:
    """Load a model into this process.

    Args:
        model: "smollm2-135m" (embedded), a folder, a LoRA adapter's folder, or a hub id.
        revision: of a hub model.
        dtype: "auto" (bfloat16 where the device computes in it, else float32), "float32", "float16" or "bfloat16".
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        device_map: spreads a model over several devices, as accelerate does.
        quantize: "int8" keeps the weights of linear layers in a byte each (docs/engines.md); on a CPU.
        trust_remote_code: whether code that comes with the model may run.
        stage: told what is being done.
        options: of the engine, as `roentgen serve` has them: `max_batch`, `max_queue`, `max_prefill_tokens`,
            `max_cache_tokens`, `batch_invariant` and `prefix_cache`.

    Raises:
        RequestError: if there is no such model, its weights cannot be used, or an option is not allowed.
    """
    given = {
        "model": named(model), "revision": revision, "dtype": dtype, "device": device, "device_map": device_map,
        "quantize": quantize, "trust_remote_code": trust_remote_code, **options,
    }  # fmt: skip
    if unknown := sorted(options.keys() - ENGINE_OPTIONS):
        raise ApiError(
            400, f"{unknown[0]} is unknown; allowed are {', '.join(sorted(ENGINE_OPTIONS))}", param=unknown[0]
        )
    config = checked(ServerConfig, given)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ApiError(
            400, "device: cuda is asked for, and PyTorch finds no CUDA GPU here; use cpu, or auto", param="device"
        )
    stage(f"finding {config.model}")
    source = locate(config.model, config.revision, quantize=config.quantize, trust_remote_code=trust_remote_code)
    loaded = load_weights(
        source, config.dtype, config.device, stage, config.device_map, trust_remote_code=trust_remote_code
    )
    return Model(loaded, config)


def _run(runner: Runner, choices: list[tuple[Prompt, Choice]]) -> list[Rollout]:
    """Run generations; returns them in order."""
    constraints = compile_grammars(runner, [choice for _, choice in choices])
    makers = {
        number: partial(choice.job, constraint=constraint)
        for number, ((_, choice), constraint) in enumerate(zip(choices, constraints, strict=True))
    }
    found: dict[int, Rollout] = {}
    for number, result in run_jobs(runner.engine, makers):
        if isinstance(result, RequestError):
            raise in_python(result) from result
        if isinstance(result, Exception):
            raise result
        found[number] = _rollout(runner, *choices[number], result)
    return [found[number] for number in range(len(choices))]


def _rollout(runner: Runner, prompt: Prompt, choice: Choice, finished: Finished) -> Rollout:
    """Return a finished generation with its rows, checked as they are before they are stored."""
    asked = choice.asked or ActivationRequest()  # of one that captures nothing, only what was said is read
    entry = make_metadata(runner.model, choice.prompt, choice.role, asked, finished, session_id="", rollout_id="")
    activations, positions = {}, []
    if finished.captured is not None:
        kept = rollout_of(entry, finished.captured)
        check_finite(kept)
        activations, positions = {key: kept.as_read(key) for key in kept.tensors}, kept.position.tolist()
    return Rollout(
        prompt=prompt,
        text=finished.text,
        finish_reason=finished.finish_reason,
        stop_reason=finished.stop_reason,
        acted=actions_of(choice.probes, finished.acted),
        logprobs=[score.logprob for score in finished.scores],
        sequence=entry.sequence,
        activations=activations,
        positions=positions,
        scores={
            scorer.name: scores[:, 0] if scores.shape[1] == 1 else scores
            for scorer, scores in zip(choice.probes, finished.probed, strict=True)
        },
    )
