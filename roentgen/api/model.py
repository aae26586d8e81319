"""A model in this process, with the server's engine, model sources and capture, but without a server or Ray.

The engine runs on its own thread, so `generate` submits requests and waits. The engine is stopped by `close`, at the end of a
"with" block, and when the model is garbage-collected.
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
"""Fields of the server's configuration that configure the engine."""


@dataclass
class _Resources:
    """Resources that a `Model` frees when it is closed."""

    loaded: LoadedModel | None
    engine: TransformersEngine | None
    traced: "TransformersModel | None" = None

    def free(self) -> None:
        """Stop the engine and free the weights."""
        engine, self.engine, self.loaded, self.traced = self.engine, None, None, None
        if engine is None:
            return
        engine.close()
        del engine
        gc.collect()  # a wrapped model is a reference cycle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Model:
    """A model loaded in this process; created by `load`."""

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
        """Stop the engine and free the weights. A second call does nothing."""
        self._finalizer()

    def __repr__(self) -> str:
        if self._held.loaded is None:
            return "Model(closed)"
        return f"Model({self.name!r}, {self.dtype}, {self._held.loaded.device})"

    @property
    def name(self) -> str:
        """The model's name in stores and runs."""
        return self._loaded.source.name

    @property
    def revision(self) -> str:
        """The loaded revision."""
        return self._loaded.source.revision

    @property
    def dtype(self) -> str:
        """The data type of the computation, such as "bfloat16"."""
        return str(self._loaded.dtype).removeprefix("torch.")

    @property
    def quantization(self) -> str | None:
        """The weights' quantization: "int8" by `load`, or the method in the model's configuration; None if there is none."""
        return self._loaded.quantization

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return self._loaded.tokenizer

    @property
    def structure(self) -> "ModelStructure":
        """The number of layers, the width, and the module of each hook point."""
        return self._loaded.structure

    @property
    def hook_points(self) -> tuple[str, ...]:
        """The model's canonical hook points, in the order of computation.

        A module path that ends in `.input` or `.output` is a hook point too.
        """
        missing = self.structure.missing
        return tuple(name for name in (*LAYER_HOOK_POINTS, *MODEL_HOOK_POINTS) if name not in missing)

    @property
    def nnsight(self) -> "TransformersModel":
        """The model wrapped by nnsight, for your own traces. It shares the loaded weights.

        A script may change the weights, and later calls must use the changed ones. So the first use turns off the prefix
        cache and, on a CPU, packed weights; int8 weights by `load` become plain weights of the same values. Load a second
        model if that is too slow. Do not trace while `generate` or `capture` runs, because the trace would see their batch.
        Use `nnsight.save(x)` to keep a value; `x.save()` is removed, because it breaks other libraries.
        """
        loaded = self._loaded
        if self._held.traced is None:
            engine = self._held.engine
            assert engine is not None
            engine.expect_changed_weights()
            # A second wrapper, because in the engine's own wrapper the engine builds the batch.
            self._held.traced = wrapped(loaded.observed._module, loaded.tokenizer)
        return self._held.traced

    @property
    def _loaded(self) -> LoadedModel:
        if self._held.loaded is None:
            raise EngineStoppedError("the model is closed; load it again with roentgen.load")
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
        """Complete texts and answer conversations in a batch, and return a `Rollout` for each, in order.

        All arguments are checked before anything runs, by the same code as the server's.

        Args:
            prompts: one or more prompts. Each is a text to complete, or a conversation (a list of `{"role": …,
                "content": …}`), which is rendered with the chat template.
            max_tokens: maximum number of tokens to generate per prompt; 0 only reads the text.
            temperature: sampling temperature; 0 is greedy.
            seed: seed of each prompt's random stream.
            n: number of completions per prompt; completions of one prompt are adjacent in the result.
            stop: strings that end a completion; they are not part of it.
            capture: activations to capture, such as `dict(layers=[8, 12], hook_points=["resid_post"], positions="all")`.
                Layers may be "all"; `dtype` and `allow_non_finite` are described in docs/http.md.
            steering: one or more vectors to add to the residual stream.
            probes: one or more probes that score every token; a mapping names them.
            stop_when: conditions by probe name. A met condition ends the generation, `{"above": 2.0, "for": 3}`, or with
                `"then": "close_reasoning"` the model's reasoning (docs/http.md).
            params: other fields of a request (docs/http.md), such as top_p, top_k, logit_bias and response_format.

        Raises:
            RequestError: if an argument is not allowed; the message names the field, the value and what is allowed.
            SavedProbeError: if there is no probe at a path.
            StoreError: if captured rows contain NaN or infinity and `allow_non_finite` is not set.
        """
        if own := sorted(params.keys() & OWN):
            raise ApiError(
                400, f"{own[0]}: not allowed here; generate sets it itself", param=own[0], code="unsupported_parameter"
            )
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
        """Capture the model's activations on existing texts. Nothing is generated.

        Without a store, this returns an iterator: texts are read in groups of some dozens while it advances, and each yields
        a `Rollout`, in order. With a store, all texts are read into one session, except those that the session already has;
        call it again to continue.

        Args:
            texts: texts, conversations (a last message by the assistant is the completion), or objects in the format of
                `roentgen capture` (docs/capture.md): `{"prompt": …, "completion": …, "labels": {…}}`.
            layers: layers to capture, or "all"; negative numbers count from the end.
            hook_points: hook points to capture.
            positions: all, prompt, generated, last_prompt, last, stride:k, mean_prompt or mean_generated.
            dtype: data type of the rows; "model" for the model's own, "int8" for one byte per value (docs/store.md).
            allow_non_finite: keep rows with NaN or infinity, which otherwise raise an error.
            store: the activation store: a folder, or s3://BUCKET/FOLDER.
            session: session in the store; by default named after model and capture.
            chunk_size: number of layers to capture per pass; fewer need less memory. None for all.
            progress: whether to show a progress bar in a terminal or notebook.

        Returns:
            An iterator of rollouts; with a store, a report whose `session` is the session's address.

        Raises:
            RequestError: if an argument is not allowed.
            TranscriptError: if an item is not a text; the message names the first one.
            UnreadableTextError: without a store, if the model cannot read a text, such as one that is too long; with a store,
                the report lists it.
            StoreError: if the store cannot be written, or without a store, if rows contain NaN or infinity.
        """
        fields = {
            "layers": layers, "hook_points": hook_points, "positions": positions, "dtype": dtype,
            "allow_non_finite": allow_non_finite,
        }  # fmt: skip
        if chunk_size is not None and chunk_size < 1:
            raise ApiError(
                400, f"chunk_size: {chunk_size} is not allowed; allowed are integers from 1", param="chunk_size"
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
        revision: revision of a hub model.
        dtype: "auto" (bfloat16 if the device supports it, else float32), "float32", "float16" or "bfloat16".
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        device_map: how to split the model over several devices, as in accelerate.
        quantize: "int8" stores the weights of linear layers in one byte each (docs/engines.md). Only on a CPU.
        trust_remote_code: whether to run code from the model's repository.
        stage: called with each stage of loading.
        options: options of the engine, as in `roentgen serve`: `max_batch`, `max_queue`, `max_prefill_tokens`,
            `max_cache_tokens`, `batch_invariant` and `prefix_cache`.

    Raises:
        RequestError: if the model does not exist, its weights cannot be used, or an option is not allowed.
    """
    given = {
        "model": named(model), "revision": revision, "dtype": dtype, "device": device, "device_map": device_map,
        "quantize": quantize, "trust_remote_code": trust_remote_code, **options,
    }  # fmt: skip
    if unknown := sorted(options.keys() - ENGINE_OPTIONS):
        raise ApiError(
            400, f"{unknown[0]}: unknown option; allowed are {', '.join(sorted(ENGINE_OPTIONS))}", param=unknown[0]
        )
    config = checked(ServerConfig, given)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ApiError(
            400, "device: cuda is not available, because PyTorch finds no CUDA GPU; use cpu or auto", param="device"
        )
    stage(f"finding {config.model}")
    source = locate(config.model, config.revision, quantize=config.quantize, trust_remote_code=trust_remote_code)
    loaded = load_weights(
        source, config.dtype, config.device, stage, config.device_map, trust_remote_code=trust_remote_code
    )
    return Model(loaded, config)


def _run(runner: Runner, choices: list[tuple[Prompt, Choice]]) -> list[Rollout]:
    """Run generations and return their rollouts, in order."""
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
    """Return a finished generation as a rollout; its rows are checked like rows that are stored."""
    asked = choice.asked or ActivationRequest()  # without capture, the entry's text is still used
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
