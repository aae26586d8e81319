"""The engine that runs a transformers model in its own process, with continuous batching over a KV cache of its own."""
