"""What `usage` says of tokens that came from a cache: none where there is no cache, and null where it is not counted."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from serve_app.config import ServerConfig
from serve_app.engines.protocol import Engine
from serve_app.engines.storage import Storage
from serve_app.openai_api.chat import ChatReply, ChatRequest
from serve_app.requests.generation import Served
from serve_app.requests.planning import plan_chat
from tests.serve_app import tiny

COUNTED = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.mark.parametrize(
    ("engine", "capture", "told"),
    [("transformers", True, {"cached_tokens": 0}), ("vllm", True, {"cached_tokens": 0}), ("vllm", False, None)],
)
def test_only_a_server_without_a_cache_says_that_nothing_is_cached(engine: str, capture: bool, told: Any) -> None:
    stand_in = cast(Engine, SimpleNamespace(name=engine, capacity=128))
    served = Served(cast(Any, tiny.loaded("llama")), stand_in, cast(Storage, None))
    request = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "ab"}], **COUNTED})
    reply = plan_chat(served, request, ServerConfig(capture=capture, engine=cast(Any, engine))).reply
    assert isinstance(reply, ChatReply)
    (chunk,) = reply.opening()
    assert chunk["usage"]["prompt_tokens_details"] == told
