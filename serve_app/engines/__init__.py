"""Engines: one protocol (`protocol`), and the engine that runs everywhere (`transformers_engine`)."""
