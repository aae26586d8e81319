"""Two engines behind one protocol, and what both share.

`protocol` defines what an engine takes and gives. `transformers` runs everywhere, in its own process; `vllm` is the fast one.
Neither imports the other. Both turn tokens into text (`text`, `completion`), follow grammars (`constraints`,
`recursive_schemas`), keep apart requests that must not share a forward (`batching`), and stay within the free memory
(`memory_budget`). `served_model` describes a model to those who serve it. A finished generation becomes a rollout
(`rollout_metadata`) and is stored (`storage`).
"""
