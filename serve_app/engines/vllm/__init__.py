"""The fast engine: vLLM, captured from through nnsight's integration of it.

The model runs in vLLM's worker processes, and so does everything that touches its activations. A job goes to the workers with
what it wants to keep, as vLLM's `extra_args` (`orders`). There, once per step, one observer reads the whole batch's values
(`observer`) and the rows are cut per request (`collecting`) with the same code as for the other engine. When the job has
ended, the replica sends what was said, the worker joins it to the rows and writes both to the store, and only the receipt
comes back (`storage`). `worker` and `cpu_worker` are vLLM's worker classes, `engine` the replica's side, `loading` starts both.

Nothing here is imported unless this engine is chosen: vLLM need not be installed.
"""
