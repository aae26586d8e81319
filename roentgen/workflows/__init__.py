"""Commands that combine several packages: `capture_texts`, `steering_sweep`, `garbage_collection`."""
