"""Other people's evaluations: their scores joined to what the server stored while they ran.

`join` reads a log (`inspect_log`, `lm_eval_log`) into `scored.Scored`, finds the rollouts of each of its samples, and adds the
scores to them as labels. `inspect_plugin` is what inspect_ai finds: `inspect_provider`, its way to this server, and a hook that
calls `inspect_join` at the end of its tasks. `inspect_scanner` reads probe scores in inspect_scout.
"""
