"""Side-by-side measurements, each one command; what they found is in RESULTS.md.

    engine         the engine beside other ways to generate and capture
    fast_engine    the vLLM engine beside vLLM alone
    serving        the server beside the engine called directly
    health         `/health` under load
    memory         a replica's memory over many captured requests
    store          the store beside the bare disk
    scale          an evaluation's driver over many problems
    invariance     what `--batch-invariant` costs
    probes         fitting probes together beside one by one
    gpu            rows, speed and copies of the engine on a GPU
    architectures  makes docs/architectures.md

Machines are noisy and shared, so every claim is a ratio of interleaved runs in one process, with its interval. The other
modules serve these: `workload` (model and prompts), `ways` (to generate), `limits` (of the machine), `statistics`, `record`
(RESULTS.md).
"""
