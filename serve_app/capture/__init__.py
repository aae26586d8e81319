"""Where a model's hook points are (`resolver`), reading them during a forward (`observer`), and the rows kept (`rows`)."""
