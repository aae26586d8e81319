"""Existing texts for a model to read: the answers of a run, or the lines of a file.

`from_run` turns each answer of a run directory into a `Transcript`, `from_file` each line of a JSON Lines file. Both
validate everything before a model is loaded. `serve_app.teacher_forcing` then feeds each transcript to a model in one
forward pass and stores its activations. A transcript's key identifies the rollout, so that the activations of two models on
the same answer can be joined.
"""

from roentgen.transcripts.transcript import KnownTokens, Transcript, TranscriptError

__all__ = ["KnownTokens", "Transcript", "TranscriptError"]
