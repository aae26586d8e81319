"""Side-by-side measurements, each one command; what they found is in RESULTS.md.

`engine` compares the engine with other ways to generate and capture, `serving` the server with the engine called directly,
`memory` watches a replica's memory over many captured requests, `gpu` checks and measures the engine on a GPU. Machines are
noisy and shared: what is claimed is a ratio of interleaved runs of one process, with its interval, never one number against
another of another day.

Beneath: `workload` (model and prompts), `ways` (to generate), `limits` (of the machine), `statistics`, `record` (RESULTS.md).
"""
