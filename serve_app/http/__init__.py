"""The HTTP side: the ingress and its routes, what stands before every request, and what is measured."""
