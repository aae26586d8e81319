"""Model replicas: the replica's process, the slot that holds its model, and the ingress's view of all replicas."""
