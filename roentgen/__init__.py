"""Roentgen: evaluate a language model on GSM8K and keep what it held inside.

This package is what the rooms share. Read `contract` first: it holds the words (hook points, positions, keys) that the
server, the store and the probes agree on.
"""

__version__ = "0.1.0"
