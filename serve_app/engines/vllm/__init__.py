"""The fast engine: vLLM, with everything that touches activations in its worker processes.

    engine.py                        the replica's side: jobs in, events out
    loading.py, requirements.py      start vLLM, and verify what can be captured
    worker.py, cpu_worker.py         vLLM's worker classes
    worker_messages.py               what the replica and the workers send each other
    batch.py, collecting.py          the requests of one worker, and their rows
    eager_runner.py, batch_observer.py read a step's values with nnsight, from a model that runs module by module
    graph_runner.py, graph_taps.py   read a step's values from taps in a compiled graph
    worker_storage.py, score_receiver.py  what comes back: receipts, and scores of probes

A job reaches the workers with its capture request, in vLLM's `extra_args`. Once per step a worker reads the whole batch's
values, in one of two ways: an observer, or taps. It cuts the rows per request with the same code as the other engine. When the
job has ended, the replica sends the worker the rollout's text and metadata; the worker joins them to the rows, writes both to
the store, and returns only the receipt.

Nothing here is imported unless this engine is chosen: vLLM need not be installed.
"""
