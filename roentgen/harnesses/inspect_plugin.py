"""What inspect_ai finds of this package (its entry point): the provider `roentgen/…` and the hook that joins scores.

inspect_ai imports this for every command, so it costs little; the provider is imported when a model asks for it, and the
scanner where inspect_scout, which looks here for scanners too, is there already.
"""

import sys
from typing import Any

from inspect_ai.hooks import Hooks, TaskEnd, hooks
from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="roentgen")
def roentgen() -> type[ModelAPI]:
    """Return the provider: a Roentgen server, which keeps activations of every call."""
    from roentgen.harnesses.inspect_provider import RoentgenAPI

    return RoentgenAPI


@hooks(name="roentgen_join", description="Joins a task's scores to the activations that were kept of it.")
class JoinScores(Hooks):
    """At the end of a task, adds its scores to the rollouts that its log names."""

    async def on_task_end(self, data: TaskEnd) -> None:
        """Join, if one of the task's models is `roentgen/…`; what fails is a warning, and `roentgen join` can do it later."""
        spec = data.log.eval
        models: list[Any] = [spec.model, *(role.model for role in (spec.model_roles or {}).values())]
        if any(str(model).startswith("roentgen/") for model in models) and spec.model_args.get("join", True):
            from roentgen.harnesses.inspect_join import join_task

            await join_task(data.log)


if "inspect_scout" in sys.modules:
    import roentgen.harnesses.inspect_scanner  # noqa: F401 - it registers itself
