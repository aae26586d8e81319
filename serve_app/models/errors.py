"""Errors of loading a model by its name."""

from serve_app.errors import RequestError


class ModelNotFoundError(RequestError):
    """There are no weights for a model's name; the message names ways out."""

    status, code, param = 404, "model_not_found", "model_id"


class WeightsError(ModelNotFoundError):
    """A model's weights are damaged or belong to another model; the message names what is wrong with them."""

    status, code = 500, "weights_unusable"


class ConfigError(ModelNotFoundError):
    """A model's configuration cannot be read; the message says why."""

    status, code = 400, "config_unusable"
