"""The suites of other servers, unchanged, against this one: `make test-peers`."""
