"""Starts a server on this machine (`local_server`), and checks servers (`ports`, `preflight`, `doctor`, `smoke`)."""
