"""inspect_ai's entry point of this package: the provider `roentgen/…`, and the hook that joins scores.

inspect_ai imports this module for every command, so it must be cheap. The provider is imported when a model uses it, and the
scanner if inspect_scout, which also searches this module, has been imported.
"""

import sys
from typing import Any

from inspect_ai.hooks import Hooks, TaskEnd, hooks
from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="roentgen")
def roentgen() -> type[ModelAPI]:
    """Return the provider for a Roentgen server, which can capture activations of every call."""
    from roentgen.harnesses.inspect_provider import RoentgenAPI

    return RoentgenAPI


@hooks(name="roentgen_join", description="Joins a task's scores to its stored activations.")
class JoinScores(Hooks):
    """Adds a task's scores to the rollouts that its log names, at the end of the task."""

    async def on_task_end(self, data: TaskEnd) -> None:
        """Join the scores if one of the task's models is `roentgen/…`; after a failure, `roentgen join` can do it later."""
        spec = data.log.eval
        models: list[Any] = [spec.model, *(role.model for role in (spec.model_roles or {}).values())]
        if any(str(model).startswith("roentgen/") for model in models) and spec.model_args.get("join", True):
            from roentgen.harnesses.inspect_join import join_task

            await join_task(data.log)


if "inspect_scout" in sys.modules:
    import roentgen.harnesses.inspect_scanner  # noqa: F401 - the import registers it
