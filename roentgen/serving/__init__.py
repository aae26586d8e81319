"""Starts a server from this machine (`local_server`) and checks one (`ports`, `doctor`, `smoke`)."""
