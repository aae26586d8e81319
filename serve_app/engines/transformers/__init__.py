"""The engine that runs a transformers model in its own process, with continuous batching over a cache of its own."""
