"""Processes one request between the wire format and the engine: planning, generation, probes and steering."""
