"""Texts that exist already, to be read by a model again: what a run's model said, or any lines of a file.

What flows through here: `run` turns each answer of a run directory into a `Transcript`, `file` each line of a JSON lines
file. Both check everything before a model is loaded. `serve_app.teacher_forcing` then gives the transcripts to a model in
one forward each and keeps its activations. A transcript's key says which rollout it is, so that what two models held inside
on the same answer can be joined.
"""

from roentgen.transcripts.transcript import KnownTokens, Transcript, TranscriptError

__all__ = ["KnownTokens", "Transcript", "TranscriptError"]
