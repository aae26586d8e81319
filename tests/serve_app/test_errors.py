"""Errors that a client may see: each crosses processes, Ray's and vLLM's, and arrives as it left."""

import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Iterator

import pytest
from ray import cloudpickle

import serve_app
from serve_app.errors import RequestError
from serve_app.openai_api.errors import ApiError

GIVEN = {"status": 418, "param": "p", "message": "m", "reason": "r", "code": "c", "retry_after_s": 3}


def subclasses(kind: type[RequestError]) -> Iterator[type[RequestError]]:
    for found in kind.__subclasses__():
        yield found
        yield from subclasses(found)


def every_error() -> list[RequestError]:
    for module in pkgutil.walk_packages(serve_app.__path__, "serve_app."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
    return [make(kind) for kind in subclasses(RequestError) if kind.__module__.startswith("serve_app.")]


def make(kind: type[RequestError]) -> RequestError:
    if kind.__init__ is Exception.__init__:
        return kind("m")
    return kind(**{name: GIVEN[name] for name in inspect.signature(kind.__init__).parameters if name in GIVEN})


def test_every_error_crosses_processes() -> None:
    errors = every_error()
    assert len(errors) >= 16
    for error in errors:
        for again in (pickle.loads(pickle.dumps(error)), cloudpickle.loads(cloudpickle.dumps(error))):
            assert type(again) is type(error)
            assert (str(again), again.payload()) == (str(error), error.payload())
            assert again.message


def test_python_s_own_way_would_lose_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: an exception is by default made again of its text alone."""
    errors = every_error()
    monkeypatch.delattr(RequestError, "__reduce__")
    lost = []
    for error in errors:
        try:
            pickle.loads(pickle.dumps(error))
        except TypeError:
            lost.append(type(error).__name__)
    assert {"ApiError", "CaptureRequestError", "NonFiniteLogitsError", "SchemaError"} <= set(lost)


def test_a_message_is_text_whatever_it_quotes() -> None:
    assert ApiError(400, "a\ud83d").message == "a\\ud83d"
