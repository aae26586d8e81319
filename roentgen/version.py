"""The version, for whoever has to say which one made a file or answers a request."""

__version__ = "0.1.0"
