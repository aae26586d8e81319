"""Side-by-side measurements, each one command; what they found is in RESULTS.md.

`engine` and `fast_engine` compare the engines with other ways to generate and capture, `serving` the server with the engine
called directly. `health` and `memory` watch a server under load, `store` the store, `scale` the driver of an evaluation.
`invariance`, `prefix` and `probes` measure two options and one algorithm; `gpu` checks and measures the engines on a GPU;
`architectures` makes docs/architectures.md. Machines are noisy and shared, so every claim is a ratio of interleaved runs in one
process, with its interval.

Beneath: `workload` (model and prompts), `ways` (to generate), `limits` (of the machine), `statistics`, `record` (RESULTS.md).
"""
