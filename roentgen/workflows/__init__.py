"""Commands that join several packages: `capture`, `steer`, `garbage_collection`."""
