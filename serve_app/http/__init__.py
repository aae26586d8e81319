"""The HTTP layer: the ingress and its routes, the middleware, and the metrics."""
