"""Roentgen: evaluate a language model on GSM8K and store its internal activations.

Read `contract` first: it defines the names that every part shares (hook points, positions, keys). `store`, `runs`,
`transcripts` and `linear_probe` read and write files. `serving` starts and checks a server, `cloud` manages clusters, and
`workflows` holds the commands that join several parts. `cli` is the `roentgen` command. The server itself is `serve_app`, the
evaluation `eval_jobs`, and the training of probes `probes`.
"""

__version__ = "0.1.0"
