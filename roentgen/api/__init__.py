"""What a script or a notebook calls: the names of `roentgen.__all__`, each in a module of its own.

model         a model in this process: `load`, `Model.generate`, `Model.capture`
rollout       what a generation gives
steering      what is added to a model's stream, and which probe is meant
evaluating    `evaluate`
serving       `serve`
results       what is made of a run: `report`, `score`, `compare`
asking        arguments of Python turned into the requests that the server takes, so that both have one set of checks
"""
