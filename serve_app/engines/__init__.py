"""What generates: two engines behind one protocol, and what both share.

`protocol` is what an engine takes and gives. `transformers` runs everywhere, in its own process; `vllm` is the fast one.
Neither knows the other. Both make text of tokens (`text`, `completion`), follow grammars (`constraints`, `endless`), keep apart
what must not share a forward (`batching`) and keep within the free memory (`memory`). `served_model` is a model as its users
see it. A finished generation becomes a rollout (`rollout`) and is stored (`storage`).
"""
