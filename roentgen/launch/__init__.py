"""Where the work runs: this machine (`local`)."""
