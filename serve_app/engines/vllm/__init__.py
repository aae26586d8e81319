"""The fast engine: vLLM, with everything that touches activations in its worker processes.

A job goes to the workers with what it wants, as vLLM's `extra_args` (`orders`, `batch`). There, once per step, the whole
batch's values are read in one of two ways: by one observer, through nnsight, of a model that runs module by module
(`eager_runner`, `observer`), or from taps in a compiled graph (`graph_runner`, `graph_taps`). The rows are cut per request
(`collecting`) with the same code as for the other engine. When the job has ended, the replica sends what was said, the worker
joins it to the rows and writes both to the store, and only the receipt comes back (`storage`); scores of probes come back when
they are asked for (`scores`). `worker` and `cpu_worker` are vLLM's worker classes, `engine` the replica's side, `loading`
starts both.

Nothing here is imported unless this engine is chosen: vLLM need not be installed.
"""
