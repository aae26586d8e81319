"""`collect_activations`: the older spelling of a capture request, and the keys its reply uses.

Scripts written for the tool that Roentgen replaces send `{"layers", "hook_points", "return_activations"}` and read keys such as
`layer_8_input_layernorm_output`. Both are served here and nowhere else: everywhere else keys are canonical.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from roentgen.contract import DEFAULT_HOOK_POINTS, DEFAULT_LAYERS, ActivationRequest, HookPoints, Layers, split_key


class CollectActivations(BaseModel):
    """The older request: layers, hook points, and whether the reply carries values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: Layers = DEFAULT_LAYERS
    hook_points: HookPoints = DEFAULT_HOOK_POINTS
    return_activations: bool | Literal["reference", "sample", "full"] = Field(
        default=True,
        description="True for a sample of the values, False for references; or one of the words of `return`.",
    )

    def request(self) -> ActivationRequest:
        """Say the same in the present spelling."""
        asked = self.return_activations
        delivery = asked if isinstance(asked, str) else "sample" if asked else "reference"
        return ActivationRequest(layers=self.layers, hook_points=self.hook_points, delivery=delivery)


def legacy_key(key: str, hook_point: str) -> str:
    """Spell a canonical key as the older replies do, by the hook point that was asked for: `layer_8_input_layernorm_output`."""
    layer = split_key(key)[1]
    plain = hook_point.replace(".", "_")
    return plain if layer is None else f"layer_{layer}_{plain}"
