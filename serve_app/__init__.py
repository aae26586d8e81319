"""The OpenAI route over the nnsight model: a Ray Serve application.

`app` builds it from a `config`. Below it the packages are layers, and each imports only those below it:

    http                                          the ingress: routes, middleware, metrics
    replica                                       the process that holds a model, and the fleet of them
    requests | teacher_forcing | verification     what is done with a model: generate, read given texts, check captures
    openai_api                                    the wire: requests, replies, errors
    engines                                       what generates: `transformers` or `vllm`, and what both share
    models                                        finding, identifying and reading weights
    capture                                       hook points: finding them, reading rows, adding and scoring
    errors                                        the base of every error that a client may see

`make check` holds them to it.
"""

from serve_app.deferred_imports import defer

defer()
