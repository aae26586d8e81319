"""Teacher-forced capture: a model reads existing texts, and its activations are stored. Nothing is generated.

`tokens` converts a transcript to the token ids that the model is fed. `already_captured` finds which texts a session already
has. `forced_capture` runs the others through an engine, many texts in one forward, and stores their rows. The rows are those
that generating the same tokens would have stored: same positions, same columns, same checks.
"""
