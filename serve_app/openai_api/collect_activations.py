"""`collect_activations`: the legacy format of a request for activations, and the legacy keys of its reply.

Scripts for the tool that Roentgen replaces send `{"layers", "hook_points", "return_activations"}` and read keys such as
`layer_8_input_layernorm_output`. Only this module knows that format; all other code uses canonical keys.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from roentgen.contract import DEFAULT_HOOK_POINTS, DEFAULT_LAYERS, ActivationRequest, HookPoints, Layers, split_key


class CollectActivations(BaseModel):
    """A legacy request: layers, hook points, and whether the reply contains values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: Layers = DEFAULT_LAYERS
    hook_points: HookPoints = DEFAULT_HOOK_POINTS
    return_activations: bool | Literal["reference", "sample", "full"] = Field(
        default=True,
        description="True for a sample of the values, False for a reference, or a value of `return`.",
    )

    def request(self) -> ActivationRequest:
        """Convert the request to the current format."""
        asked = self.return_activations
        delivery = asked if isinstance(asked, str) else "sample" if asked else "reference"
        return ActivationRequest(layers=self.layers, hook_points=self.hook_points, delivery=delivery)


def legacy_key(key: str, hook_point: str) -> str:
    """Return the legacy name of a canonical key and its requested hook point, such as `layer_8_input_layernorm_output`."""
    layer = split_key(key)[1]
    plain = hook_point.replace(".", "_")
    return plain if layer is None else f"layer_{layer}_{plain}"
