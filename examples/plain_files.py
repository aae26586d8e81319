"""Reads activations without Roentgen: shards are safetensors, the index is parquet."""

import pandas as pd
from safetensors.torch import load_file

import roentgen

with roentgen.load("smollm2-135m") as model:  # something to read
    model.capture(
        ["One.", "One, two, three."], layers=[12], positions="all", store="results/examples/store", session="plain"
    )

index = pd.read_parquet("results/examples/store/plain/index")  # a row per text: tokens, labels, which rows it has
for row in index.itertuples():
    shard = load_file(f"results/examples/store/plain/{row.shard}")
    rows = shard["layers.12.resid_post"][row.row_start : row.row_stop]
    print(repr(row.text), f"{len(row.token_ids)} tokens", tuple(rows.shape), rows.dtype)
