"""Integrations with other evaluation harnesses, whose scores become labels of stored rollouts.

`join` reads a log (`inspect_log`, `lm_eval_log`) as `scored.ScoredSample`, finds the rollouts of each sample, and adds the
scores to them as labels. `inspect_plugin` is inspect_ai's entry point: it registers `inspect_provider`, a model provider for
this server, and a hook that calls `inspect_join` at the end of each task. `inspect_scanner` reads probe scores in
inspect_scout.
"""
