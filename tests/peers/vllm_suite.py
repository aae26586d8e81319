"""A pytest plugin that lets vLLM's own entrypoint tests ask this project's server.

The tests are vLLM's and stay as they are. What they import of vLLM is faked, since only its names are needed to load a module;
a test that needs more than a server (vLLM's own classes, a LoRA, another server's options) is set aside, with the reason.
Wherever a test starts a server, it gets the one that runs, and wherever it names a model, the served one. A request that names
no seed gets one, its number in the test, so that what a test meets is the same in every run. Tests that are run with several
models are run once.
"""

import importlib.abc
import importlib.machinery
import inspect
import itertools
import json
import os
import sys
import tomllib
import types
import zlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar, cast
from unittest.mock import MagicMock

import openai
import pytest

import roentgen

URL = os.environ["PEERS_URL"]
MODEL = os.environ["PEERS_MODEL"]
TOKENIZER = os.environ["PEERS_TOKENIZER"]
SKIPPED = Path(__file__).with_name("skipped.toml")
OUTCOMES = Path(os.environ["PEERS_OUTCOMES"])
SHARE = int(os.environ["PEERS_SHARE"])
PART, PARTS = int(os.environ["PEERS_PART"]), int(os.environ["PEERS_PARTS"])
NUMBER = os.environ["PEERS_NUMBER"]
WHOLE = bool(os.environ["PEERS_WHOLE"])
"""Whether no test is left out by the command."""
BELOW = "tests/entrypoints/"
SAMPLING = ("/completions", "/responses")
"""How the routes end that draw tokens."""
FAKED = {"vllm", "openai_harmony", "mistral_common", "mcp", "pybase64", "lm_eval", "schemathesis", "gpt_oss"}
ASKING = {"server", "client", "async_client", "remote_server", "openai_server", "tool_use_client"}
"""Fixtures whose tests ask a server."""
UNLOADABLE = (
    "openai/chat_completion/test_batched_chat_completions.py",
    "openai/chat_completion/test_serving_chat.py",
    "openai/completion/test_completion_with_prompt_embeds.py",
    "openai/responses/test_serving_responses.py",
    "tests/tool_use/test_tool_choice_required.py",
)
"""Files of units that use vLLM's classes while they are loaded."""


class Server:
    """Stands in for vLLM's `RemoteOpenAIServer`: the one server that runs, whatever model and options it is made with."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.url_root = URL
        self.host, _, port = URL.removeprefix("http://").partition(":")
        self.port = int(port)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def url_for(self, *parts: str) -> str:
        return "/".join([URL, *parts])

    def get_client(self, **options: Any) -> openai.OpenAI:
        return _Client(**_options(options))

    def get_async_client(self, **options: Any) -> openai.AsyncOpenAI:
        return _AsyncClient(**_options(options))


def _options(given: dict[str, Any]) -> dict[str, Any]:
    return {"base_url": f"{URL}/v1", "api_key": "none", "max_retries": 0, "timeout": 600, **given}


class _Seeds:
    """Seeds for the requests of one test that name none."""

    left: ClassVar[Iterator[int]] = itertools.count()


def pytest_runtest_setup() -> None:
    """Begin again, so that a test's seeds do not depend on the tests before it."""
    _Seeds.left = itertools.count()


def _served(options: Any) -> Any:
    """Name the served model in a request's body, which vLLM does without, too, and a seed in one that samples."""
    if isinstance(options.json_data, dict):
        options.json_data["model"] = MODEL
        if options.url.endswith(SAMPLING):
            options.json_data.setdefault("seed", next(_Seeds.left))
    return options


class _Client(openai.OpenAI):
    def _prepare_options(self, options: Any) -> Any:
        return _served(super()._prepare_options(options))


class _AsyncClient(openai.AsyncOpenAI):
    async def _prepare_options(self, options: Any) -> Any:
        return _served(await super()._prepare_options(options))


def _get_tokenizer(*_: Any, **__: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


class _ModelConfig:
    """What tests ask of a model's configuration: how many logits it has."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def get_vocab_size(self) -> int:
        from transformers import AutoConfig

        return int(AutoConfig.from_pretrained(TOKENIZER).vocab_size)


class _Platform:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: name == "is_cuda"


class _Settings:
    VLLM_USE_RUST_FRONTEND = False

    def __getattr__(self, name: str) -> None:
        return None


TRUE = {
    "vllm.tokenizers.get_tokenizer": _get_tokenizer,
    "vllm.platforms.current_platform": _Platform(),
    "vllm.config.ModelConfig": _ModelConfig,
    "vllm.envs": _Settings(),
    "vllm.version.__version__": roentgen.__version__,
}
"""What tests use of vLLM beside its names."""


class _Fake(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - as a package has it

    def __getattr__(self, name: str) -> Any:
        full = f"{self.__name__}.{name}"
        if full in TRUE:
            return TRUE[full]
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (Exception,), {}) if name.endswith("Error") else MagicMock(name=full)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in FAKED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return cast(
            types.ModuleType, TRUE.get(spec.name) or _Fake(spec.name)
        )  # `import vllm.envs` sees what `from vllm import envs` does

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Utils(types.ModuleType):
    """Stands in for `tests.utils` and `tests.conftest`, which import most of vLLM."""

    RemoteOpenAIServer = Server
    ROCM_EXTRA_ARGS: ClassVar[list[str]] = []
    ROCM_ENV_OVERRIDES: ClassVar[dict[str, str]] = {}
    VLLM_PATH = Path()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"tests.utils.{name}")


sys.meta_path.insert(0, _Finder())
sys.modules |= {name: _Utils(name) for name in ("tests.utils", "tests.conftest")}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what cannot be loaded without vLLM, or has nothing that asks a server."""
    if collection_path.name.startswith("test_") and not _mentions_a_server(collection_path):
        return True
    return None


def _mentions_a_server(file: Path) -> bool:
    if "/".join(file.parts[-3:]) in UNLOADABLE:
        return False
    beside = [file, file.with_name("conftest.py")]
    return any("RemoteOpenAIServer" in one.read_text() for one in beside if one.exists())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what asks a server, give it the served model's name, and mark what is known not to apply."""
    listed = tomllib.loads(SKIPPED.read_text())["skipped"]
    names = [item.nodeid.removeprefix(BELOW) for item in items]
    kept = []
    for place, item in enumerate(items):
        if not isinstance(item, pytest.Function) or not _asks_a_server(item) or _is_of_a_further_model(item):
            continue
        module = item.module
        if isinstance(getattr(module, "MODEL_NAME", None), str):
            module.MODEL_NAME = MODEL
        named = getattr(item, "callspec", None)
        reason = "LoRA" if _wants_lora(item) else _reason(item.nodeid, listed)
        if named is not None and "model_name" in named.params:
            named.params["model_name"] = MODEL
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
        if place % PARTS == PART and (reason is not None or SHARE == 1 or _turn(item.nodeid)):
            kept.append(item)
    items[:] = kept
    if PART == 0 and WHOLE:
        for one in listed:
            for like in one["tests"]:
                if not any(fnmatch(name, like) for name in names):
                    _write({"test": like, "outcome": "failed", "reason": "listed, but there is no such test"})


def _asks_a_server(item: pytest.Function) -> bool:
    return bool(ASKING & set(item.fixturenames)) or "RemoteOpenAIServer" in inspect.getsource(item.function)


def _is_of_a_further_model(item: pytest.Function) -> bool:
    """Whether tests/tool_use has this test for a model before this one, which would be the served one again."""
    named = getattr(item, "callspec", None)
    return bool(named and named.indices.get("server_config", 0) > 0)


def _wants_lora(item: pytest.Function) -> bool:
    named = getattr(item, "callspec", None)
    return "lora" in item.name or bool(named and any("lora" in str(value) for value in named.params.values()))


def _reason(nodeid: str, listed: list[dict[str, Any]]) -> str | None:
    """Return why a test is not run, if it is listed."""
    test = nodeid.removeprefix(BELOW)
    return next((one["reason"] for one in listed if any(fnmatch(test, like) for like in one["tests"])), None)


def _turn(nodeid: str) -> bool:
    return zlib.crc32(f"{nodeid} {NUMBER}".encode()) % SHARE == 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Write down what became of each test."""
    report: pytest.TestReport = yield
    failed_around = report.when != "call" and report.failed
    if report.when == "call" or report.skipped or failed_around:
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed and hasattr(report.longrepr, "reprcrash"):
            reason = " ".join(report.longrepr.reprcrash.message.split())[:300]
        _write({"test": item.nodeid, "outcome": report.outcome, "reason": reason, "seconds": f"{report.duration:.1f}"})
    return report


def _write(told: dict[str, str]) -> None:
    with OUTCOMES.open("a") as file:
        file.write(json.dumps(told) + "\n")
