"""The body of `POST /v1/activations/session/{id}/labels`."""

from typing import Annotated

from pydantic import AfterValidator, Field

from roentgen.contract import SERVER_LABELS, Labels, LabelValue
from serve_app.openai_api.messages import Wire


def _not_ours(labels: dict[str, LabelValue]) -> dict[str, LabelValue]:
    for name in SERVER_LABELS.keys() & labels.keys():
        raise ValueError(f"{name!r} is reserved; the server sets it from a request's {SERVER_LABELS[name]}")
    return labels


class LabelsRequest(Wire):
    """Labels to add, by rollout id."""

    labels: dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[Labels, AfterValidator(_not_ours)]] = (
        Field(min_length=1)
    )
