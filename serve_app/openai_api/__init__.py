"""The OpenAI wire: what clients send and get, and nothing of how it is computed.

Requests: `chat` and `completions` with the parameters they share (`params`, `probing`, `seed_spelling`), conversations
(`messages`, `tools`), their rendering (`prompt`) and the grammars they ask for (`grammars`). Replies: `reply` takes
a chat's text apart (`call_text`), `logprobs` formats scores, `tokenize` answers its own routes, `schemas` declares every reply
and `errors` every error. `responses` is the Responses API, a second wire of the chat.
"""
