"""Parameters that this server accepts but does not read: their accepted values describe what it does anyway.

Clients send such settings with every request (`store: false`). They are declared as fields, so that `/openapi.json` contains
them. A setting accepts only the values that describe this server's behavior; any other value would change the result and is
refused by name. A hint (`prompt_cache_key`) does not change results, so any value of its type is accepted.
"""

import json
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, JsonValue
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from roentgen.contract import Int
from serve_app.openai_api.messages import Wire


class Only:
    """Accepts only some values; the error for any other value lists them.

    Attributes:
        values: the accepted values, as JSON.
    """

    def __init__(self, *values: JsonValue) -> None:
        self.values = values

    def check(self, value: Any) -> Any:
        """Return the value if it is accepted; else raise an error."""
        # In JSON, true is not 1, as it is in Python.
        if any(value == own and isinstance(value, bool) == isinstance(own, bool) for own in self.values):
            return value
        allowed = " or ".join(map(json.dumps, self.values))
        raise PydanticCustomError("unsupported_value", "this server supports only {allowed}", {"allowed": allowed})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return pydantic's validator."""
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the field's JSON schema."""
        return {"enum": list(self.values)}


Hint = Annotated[str, Field(description="Accepted; has no effect here.")]


class NeutralParams(Wire):
    """Parameters without effect of chat completions and completions."""

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
    """Further parameters without effect of chat completions."""

    modalities: Annotated[Any, Only(["text"])] = Field(default=["text"])
    functions: Annotated[JsonValue, Only([])] = Field(default=[])
    function_call: Annotated[JsonValue, Only("none", "auto")] = "none"
    verbosity: Annotated[JsonValue, Only("medium")] = "medium"
    prediction: dict[str, JsonValue] | None = None
    include_reasoning: Annotated[JsonValue, Only(True)] = True
    documents: Annotated[JsonValue, Only([])] = Field(default=[])
    mm_processor_kwargs: Annotated[JsonValue, Only({})] = Field(default={})


class NeutralCompletionParams(Wire):
    """Further parameters without effect of completions."""

    suffix: Annotated[JsonValue, Only("")] = ""
