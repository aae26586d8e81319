"""The OpenAI-compatible wire format: the requests and replies of every route. It does not know how a reply is computed.

Requests: `chat` and `completions`, and the parameters they share (`params`, `probe_params`, `collect_activations`). A
conversation consists of `messages` and `tools`; `prompt` renders it, and `grammars` constrains the output.

Replies: `reply_parser` splits generated text into reasoning, content and tool calls (`call_text`). `logprobs` formats scores,
`tokenize` answers its own routes, `schemas` declares every reply and `errors` every error. `responses` is the Responses API,
which wraps the chat.
"""
