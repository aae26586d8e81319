"""What a model has to capture (`structure`), finding it (`resolver`), reading it (`observer`), the rows kept (`rows`)."""
