"""Benchmarks, one command each; the results are in RESULTS.md.

`engine` and `fast_engine` compare the engines with other ways to generate and capture, `serving` the server with direct
calls of the engine. `health` and `memory` watch a server under load, `store` measures the store, `scale` the driver of an
evaluation. `invariance`, `prefix` and `probes` measure two options and one algorithm; `gpu` checks and measures the engines
on a GPU; `architectures` generates docs/architectures.md. Machines are noisy and shared, so every claim is a ratio of
interleaved runs in one process, with its interval.

Helpers: `workload` (model and prompts), `ways` (ways to generate), `limits` (of the machine), `paired_statistics`,
`results_file` (RESULTS.md).
"""
