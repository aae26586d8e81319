"""Models before they run: finding, identifying, reading and inspecting their weights."""
