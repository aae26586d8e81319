"""The Python library: the names in `roentgen.__all__`, each defined in one of these modules.

model             a model in this process: `load`, `Model.generate`, `Model.capture`
rollout           `Rollout`, the result of one generation
steer             `Steer`, a vector added to the residual stream, and the ways to name a probe
evaluation        `evaluate`
server            `serve`
run_results       functions of a finished run: `report`, `score`, `compare`, `show`, `export`
request_building  converts Python arguments into the server's requests, so that both share one set of checks
text_capture      captures existing texts for `Model.capture`
"""
