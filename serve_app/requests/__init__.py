"""What happens to one request between the wire and the engine: planning, running, probes and steering."""
