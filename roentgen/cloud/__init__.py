"""Clusters in a cloud: `up` starts one with SkyPilot, `evaluate` runs an evaluation on it, `deploy` serves the model there."""
