"""The texts that mark reasoning and tool calls in what a model generates.

An engine keeps them in the text even where a tokenizer flags them as special tokens, because replies are parsed by them
(`openai_api.reply_parser`). They are defined here, below the OpenAI routes, so that an engine can be used without those.
"""

THINK_START = "<think>"
THINK_END = "</think>"
CALL_START = "<tool_call>"
CALL_END = "</tool_call>"
MARKERS = frozenset({THINK_START, THINK_END, CALL_START, CALL_END})
