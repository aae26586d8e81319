"""A process that holds one model: the replica, the slot its model is in, and the fleet of replicas as the ingress sees it."""
