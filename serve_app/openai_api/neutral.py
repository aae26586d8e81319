"""Parameters that other servers act on and this one does not need to: the value that is true here is accepted.

Clients send settings on every request that say what this server does anyway (`store: false`). They are fields like any other,
so that `/openapi.json` has them, but nothing reads them. A setting has the value, or the values, that describe what happens
here; any other would change the result and is refused by name. A hint (`prompt_cache_key`) changes no result, only how fast
or under which label it comes, so any value of its type is accepted.
"""

import json
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, JsonValue
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from roentgen.contract import Int
from serve_app.openai_api.messages import Wire


class Only:
    """Accepts the values that are true here, and says which they are when it refuses another.

    Attributes:
        values: all that are accepted, as JSON.
    """

    def __init__(self, *values: JsonValue) -> None:
        self.values = values

    def check(self, value: Any) -> Any:
        """Return a value that is accepted."""
        # JSON's true is no 1, though Python's is.
        if any(value == own and isinstance(value, bool) == isinstance(own, bool) for own in self.values):
            return value
        allowed = " or ".join(map(json.dumps, self.values))
        raise PydanticCustomError("unsupported_value", "this server supports only {allowed}", {"allowed": allowed})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Tell pydantic how a value is checked."""
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Tell pydantic how the field is described."""
        return {"enum": list(self.values)}


Hint = Annotated[str, Field(description="Accepted; has no effect here.")]


class NeutralParams(Wire):
    """What chat completions and completions accept without reading it."""

    user: Hint | None = None
    metadata: dict[str, str] | None = None
    store: Annotated[JsonValue, Only(False)] = False
    service_tier: Annotated[JsonValue, Only("auto", "default")] = "auto"
    prompt_cache_key: Hint | None = None
    prompt_cache_retention: Hint | None = None
    safety_identifier: Hint | None = None
    priority: Int = 0
    skip_special_tokens: Annotated[JsonValue, Only(True)] = True
    spaces_between_special_tokens: bool = True
    use_beam_search: Annotated[JsonValue, Only(False)] = False
    length_penalty: Annotated[JsonValue, Only(1)] = 1
    early_stopping: Annotated[JsonValue, Only(False)] = False
    logits_processors: Annotated[JsonValue, Only([])] = Field(default=[])
    vllm_xargs: Annotated[JsonValue, Only({})] = Field(default={})


class NeutralChatParams(Wire):
    """What chat completions accept beside that."""

    modalities: Annotated[Any, Only(["text"])] = Field(default=["text"])
    functions: Annotated[JsonValue, Only([])] = Field(default=[])
    function_call: Annotated[JsonValue, Only("none", "auto")] = "none"
    verbosity: Annotated[JsonValue, Only("medium")] = "medium"
    prediction: dict[str, JsonValue] | None = None
    include_reasoning: Annotated[JsonValue, Only(True)] = True
    documents: Annotated[JsonValue, Only([])] = Field(default=[])
    mm_processor_kwargs: Annotated[JsonValue, Only({})] = Field(default={})


class NeutralCompletionParams(Wire):
    """What completions accept beside that."""

    suffix: Annotated[JsonValue, Only("")] = ""
