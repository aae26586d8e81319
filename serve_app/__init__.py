"""An OpenAI-compatible server with activation capture: a Ray Serve application.

`app` builds it from a `config`. The packages below it are layers; each imports only the layers below itself:

    http                                          the ingress: routes, middleware, metrics
    replica                                       the process that holds a model, and the fleet of these processes
    requests | teacher_forcing | verification     uses of a model: generate, capture existing texts, check captures
    openai_api                                    the wire format: requests, replies, errors
    engines                                       the inference engines `transformers` and `vllm`, and what they share
    models                                        locating, identifying and reading weights
    capture                                       hook points: resolving, capturing, steering and scoring
    errors                                        the base class of every error that a client may see

`make check` enforces the layers.
"""

from serve_app.deferred_imports import defer

defer()
