"""Teacher-forced capture: a model reads texts that exist already, and what it holds inside is kept.

`tokens` spells a transcript as the tokens the model is fed; `held` finds out which of them a session has already; `capture`
runs the others through an engine without generating, many texts in one forward, and stores their rows. The rows are those
that generating the same tokens would have left: same positions, same columns, same checks.
"""
