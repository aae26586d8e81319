"""The OpenAI route over the nnsight model: a Ray Serve application.

`app` builds it, `ingress` speaks HTTP, `replica` holds the model and the store's writer, `engines/` generate, `capture/`
resolves hook points and observes them, `openai_api/` is the wire.
"""
