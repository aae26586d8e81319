"""Hook points: finds them in a model, and reads, steers and scores their values in a forward.

structure.py      what a model has to capture, and a request's hook points as taps
resolver.py       finds hook points: watches a forward (watching.py) and checks a block's equations (block.py, equations.py)
narrowing.py      makes a small random model of a configuration to try
observer.py       reads values in a forward, with nnsight
batch_layout.py   maps requests and positions to rows of the batch
rows.py           keeps rows, in memory.py
steering.py       adds vectors to rows
probe_scores.py     scores rows with probes
late_end.py       which rows to keep while it is not known where a completion ends
"""
