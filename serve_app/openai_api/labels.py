"""`POST /v1/activations/session/{id}/labels`: what a request for more labels may say."""

from typing import Annotated

from pydantic import AfterValidator, Field

from roentgen.contract import Labels, LabelValue
from serve_app.openai_api.messages import Wire
from serve_app.openai_api.probing import STEERING_LABEL


def _not_ours(labels: dict[str, LabelValue]) -> dict[str, LabelValue]:
    if STEERING_LABEL in labels:
        raise ValueError(f"{STEERING_LABEL!r} is the server's to set, from what a request was steered with")
    return labels


class LabelsRequest(Wire):
    """The body: labels by the ids of rollouts."""

    labels: dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[Labels, AfterValidator(_not_ours)]] = (
        Field(min_length=1)
    )
